"""The sections of a run's typed configuration.

Every field has a type, a range and a line on what it means. A mistake is a `ConfigError` of one line per field.
"""

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator

from egrpo_fast.config.recipe_files import ConfigError
from egrpo_fast.files import expanded
from egrpo_fast.schedule import SdeForm, Solver
from egrpo_fast.section import Natural, Positive, Seconds, Section, Unit

CONFIG_FILE, RUN_FILE, CHECKPOINTS, PIPELINE = "config.yaml", "run.json", "checkpoints", "pipeline"
"""In a run's folder: its settings, what made it, its checkpoints, the trained pipeline."""


def _path(path: Any) -> Any:
    if isinstance(path, bool | int | float):
        raise ValueError(f"{path} is read as a number or a truth value, and a path is text; quote it or write ./{path}")
    if not isinstance(path, str | Path):
        raise ValueError(f"{path!r} is no path")
    return expanded(path) if isinstance(path, str) else path


def _as_written(path: str | Path) -> str:
    """Of a path that is filled in: the text that `expanded` makes it of."""
    return str(path).replace("$", "$$")


PathName = Annotated[str, BeforeValidator(_path), PlainSerializer(_as_written, when_used="json-unless-none")]
"""A path, a hub id or a name: `~` and variables in it are filled in."""


def _prompts(given: Any) -> Any:
    if isinstance(given, list):
        if not given or not all(isinstance(prompt, str) for prompt in given):
            raise ValueError("a list of prompts holds one prompt or more, each a string")
        return given
    return _path(given)


PromptSource = Annotated[
    str | list[str],
    BeforeValidator(_prompts),
    PlainSerializer(lambda given: given if isinstance(given, list) else _as_written(given), when_used="json"),
]
"""Where prompts come from: a `PathName`, or the prompts themselves."""


def takes(target: str, layer: str) -> bool:
    """Whether an entry of `Lora.target_modules` takes a layer: it is its name, or ends it after a dot (peft's rule)."""
    return layer == target or layer.endswith(f".{target}")


class LoraConfig(Section):
    """Low-rank adapters on the transformer's linear layers; the weights under them stay as they are (peft). With a
    path, rank, alpha and target_modules that are not given are those of its file."""

    rank: Positive = 64
    """Rank of every adapter."""
    alpha: float = Field(64.0, gt=0.0)
    """Scale of the adapters is alpha / rank."""
    target_modules: list[str] | None = Field(None, min_length=1)
    """Linear layers that get one; none given: those of attention, as the model family names them. An entry takes every
    layer with that name, or whose name ends in a dot and the entry: `proj_out` takes that of FLUX.1's single blocks
    and the model's output layer."""
    path: PathName | None = None
    """A LoRA file or folder to start from, in a layout that diffusers reads; none given: a new one."""

    @property
    def follows(self) -> frozenset[str]:
        """The settings that are still to be found: in the file, or in the model's family."""
        given = self.model_fields_set if self.target_modules else self.model_fields_set - {"target_modules"}
        return frozenset({"rank", "alpha", "target_modules"} if self.path else {"target_modules"}) - given

    def layers(self, names: Collection[str]) -> dict[str, list[str]]:
        """Of a transformer's linear layers, those that each entry of target_modules takes.

        ConfigError: an entry that takes none.
        """
        targets = self.target_modules or ()
        taken = {target: [name for name in names if takes(target, name)] for target in targets}
        for target, layers in taken.items():
            if not layers:
                ends = sorted({name.rpartition(".")[2] for name in names})
                near = difflib.get_close_matches(target.rpartition(".")[2], ends, 3) or ends
                message = f"{target!r} is neither the name of a linear layer nor ends one after a dot"
                raise ConfigError(f"model.lora.target_modules: {message}; names end in {', '.join(near[:20])}, ...")
        return taken


class GuidanceConfig(Section):
    """Classifier-free guidance, for models that do not embed their guidance scale: the velocity of the prompt and that
    of the negative prompt are made into one, and that is the policy."""

    negative_prompt: str = ""
    """What guidance leads away from."""
    train: Literal["both", "conditional"] = "both"
    """Which of the two velocities gradients flow through. Both is Flow-GRPO's choice."""
    calls: Literal[1, 2] = 1
    """Both velocities in one model call, or in two of half the memory."""
    normalization: float | None = Field(None, gt=0.0)
    """Most that guidance may lengthen the velocity of an image, as a multiple of the prompt's own; none given: no
    bound."""
    truncation: float = Field(1.0, ge=0.0, le=1.0)
    """Time 1 - t after which there is no guidance; 1: there is to the end."""


class ModelConfig(Section):
    path: PathName
    """Folder or hub id of a pipeline in diffusers' layout, or `shapes` for the embedded one."""
    height: Positive = 720
    """Image height in pixels, a multiple of what the model family needs, which is 16 for most."""
    width: Positive = 720
    """Image width in pixels, likewise."""
    guidance_scale: float | None = Field(None, ge=0.0)
    """What the model's diffusers pipeline calls its guidance scale: embedded, or of classifier-free guidance. None
    given: that pipeline's default, 3.5 for FLUX.1."""
    guidance: GuidanceConfig = GuidanceConfig()
    """Classifier-free guidance."""
    max_sequence_length: Annotated[int, Field(ge=1, le=1024)] = 512
    """Tokens of a prompt that the model reads; longer prompts are cut."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the transformer computes in; the master weights are float32."""
    tf32: bool = False
    """Let GPUs round the inputs of float32 products and convolutions to TF32; bfloat16 ones are not concerned."""
    attention: Literal[
        "native", "cudnn", "efficient", "flash", "flash_varlen", "flash_hub", "flash_3_hub", "flash_4_hub", "xformers"
    ] = "native"
    """Who computes attention, by diffusers' dispatcher: PyTorch by its own choice but cuDNN, cuDNN, or a package to
    install."""
    lora: LoraConfig | None = None
    """Train adapters instead of the whole transformer; none given: all weights."""
    quantization: Literal["none", "int8", "nf4", "float8"] = "none"
    """How the weights under the adapters are kept: as loaded, in 8 bits with a scale per row (torchao), or in 4 bits
    with a scale per block (bitsandbytes). Layers compute in model.dtype."""
    text_encoder_quantization: Literal["none", "int8", "nf4"] = "none"
    """Weights of the largest text encoder: as loaded, or in 8 or 4 bits by bitsandbytes."""
    decode_batch_size: Positive = 32
    """Images that the VAE decodes and the rewards score at a time."""
    vae_tiling: bool = False
    """Decode large images tile by tile: less memory, seams are blended."""
    gradient_checkpointing: bool = False
    """Recompute activations in the update's backward pass."""

    @field_validator("guidance", mode="before")
    @classmethod
    def _no_number(cls, guidance: Any) -> Any:
        if isinstance(guidance, int | float):
            raise ValueError("is called model.guidance_scale now")
        return guidance


class PromptsConfig(Section):
    train: PromptSource
    """Prompt file (.txt, .json, .jsonl, .csv, .tsv or .parquet, each also .gz), hub data set
    (`datasets:ORG/NAME:SPLIT`), `shapes`, or a list of the prompts themselves."""
    held_out: PromptSource
    """The prompts of the held-out evaluation, likewise."""
    column: str = "prompt"
    """Field of the JSON objects, or column of the tables, that holds the prompt."""
    embeddings: PathName | None = None
    """Folder made by `egrpo encode` of these prompts: no text encoder is loaded; none given: encode on the fly."""
    per_iteration: Positive = 1
    """Prompts of one iteration, over all ranks together; a multiple of the number of ranks."""
    shuffle: bool = True
    """A new order every epoch, from the seed."""


class ScheduleConfig(Section):
    num_steps: Annotated[int, Field(ge=2, le=1000)] = 16
    """T, grid steps of the training rollout."""
    shift: Annotated[float, Field(gt=0.0)] | Literal["auto"] = 3.0
    """Time shift s of the grid; `auto`: the grid of the model's own scheduler at this size and number of steps."""
    sde_form: SdeForm = "flow_grpo"
    """The stochastic step: Flow-GRPO's, DanceGRPO's of constant noise, or coefficients-preserving sampling. Not given:
    the method's own (dance_grpo for DanceGRPO and BranchGRPO)."""
    eta: float = Field(0.7, gt=0.0)
    """Noise scale a of the stochastic step. Not given: 0.7, 0.3 or 0.8 for the forms above."""
    entropy_threshold: float = Field(2.2, ge=0.0)
    """tau: steps of lower per-dimension entropy are merged until they reach it; 0 never merges."""
    merge_lengths: Positive | list[Positive] | None = None
    """Fixed merge, one number or one per grid step, in place of the threshold."""
    max_merge: Positive | None = None
    """Cap on what the threshold merges."""
    active_steps: list[Natural] | None = Field(None, min_length=1)
    """Grid indices that are trained; none given: the first half."""


OWN_ETA = {"flow_grpo": 0.7, "dance_grpo": 0.3, "cps": 0.8}


class RolloutConfig(Section):
    group_size: Annotated[int, Field(ge=2, le=65536)] | list[Annotated[int, Field(ge=2, le=65536)]] = 12
    """G, samples per active step: one number, or one per active step."""
    prompts_per_rollout: Positive = 1
    """Prompts of one rank that share a wavefront."""
    max_rows_per_call: Positive | Literal["auto"] | None = None
    """Most rows of one model call; `auto`: found by trial before the first rollout; none given: all live rows. Out of
    memory, a rollout is repeated with half of them, where no rank waits for another within a call."""
    compile: bool = False
    """Run the transformer's blocks through torch.compile, in rollouts and evaluations; the update stays as it is."""
    overlap: bool = False
    """Decode and score the images of one call's prompts while the next ones' are rolled out."""
    parameters: Literal["sharded", "gathered"] = "gathered"
    """Under ZeRO-3, gather the weights at every layer of every call, or once per rollout."""
    backend: Literal["auto", "reference", "triton", "extension"] = "auto"
    """Who runs the ops between model calls."""

    @property
    def most_rows(self) -> int | None:
        """`max_rows_per_call` where it is a number. None: all live rows, or what a trial will find."""
        return self.max_rows_per_call if isinstance(self.max_rows_per_call, int) else None


class TaylorSeerConfig(Section):
    """Between computed steps the last layer's output is extrapolated from those before: a Taylor series in steps."""

    name: Literal["taylor_seer"]
    """TaylorSeer (arXiv 2503.06923), diffusers' lite mode."""
    interval: Annotated[int, Field(ge=2)] = 2
    """Steps from one computed step to the next."""
    warm_up: Positive = 1
    """First steps of a tail that are all computed."""
    order: Positive = 1
    """Highest order of the series."""


APPROXIMATIONS = ("stride", "solver", "path", "lora", "quantization", "cache", "decoder")
"""Settings of `tail` that change its images."""


class TailConfig(Section):
    """The ODE after the last stochastic step: no policy acts there, so it may be approximated (docs/tails.md)."""

    stride: Positive | list[Positive] = 1
    """Grid steps per ODE step: one number, or one per active step."""
    solver: Solver = "euler"
    """How its steps follow each other: one at a time, or with the velocity before (`ab2`, `dpm2m`)."""
    path: PathName | None = None
    """Folder or hub id of another pipeline of the same family whose transformer makes its calls; none given: the
    policy's."""
    lora: PathName | None = None
    """LoRA file or folder, in a layout that diffusers reads, on that transformer for its calls alone."""
    quantization: Literal["none", "int8", "float8"] = "none"
    """What its calls compute in: as the policy, or weights and activations in 8 bits (torchao); float8 wants a GPU of
    compute capability 8.9."""
    cache: TaylorSeerConfig | None = None
    """What its calls reuse of the call before, by diffusers' caching hooks; the name alone will do where it keeps its
    defaults; none given: nothing."""
    decoder: PathName | None = None
    """Folder of a tiny decoder (diffusers' AutoencoderTiny, such as TAEF1) of the images that training rewards."""
    check_every: Natural = 25
    """Iterations between comparisons of an approximated tail with the exact one; 0: never."""
    target: float = Field(0.95, gt=0.0, lt=1.0)
    """Rank correlation within groups below which the run goes on with the exact tail."""

    @field_validator("cache", mode="before")
    @classmethod
    def _named(cls, cache: Any) -> Any:
        return {"name": cache} if isinstance(cache, str) else cache

    @property
    def has_weights(self) -> bool:
        """Whether its calls have weights of their own."""
        return self.path is not None or self.lora is not None or self.quantization != "none"

    @property
    def has_model(self) -> bool:
        """Whether its calls have a transformer of their own, be it with the policy's weights."""
        return self.has_weights or self.cache is not None

    @property
    def approximated(self) -> tuple[str, ...]:
        """Which of APPROXIMATIONS are in use."""
        return tuple(name for name in APPROXIMATIONS if getattr(self, name) != TailConfig.model_fields[name].default)

    @property
    def exact(self) -> bool:
        """Whether nothing is approximated."""
        return not self.approximated


class RewardConfig(Section):
    name: str
    """A reward of `egrpo_fast.rewards`, or any Python callable as `package.module:attribute`."""
    weight: float = Field(1.0, ge=-1e6, le=1e6)
    """Its weight in the mix; 0: only watched."""
    options: dict[str, Any] = Field({})
    """Arguments of that reward."""

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError("a name of printable characters is expected")
        return name


class ObjectiveConfig(Section):
    mix: Literal["reward", "advantage"] = "reward"
    """Add weighted rewards and standardise, or standardise each and add."""
    clip_range: float = Field(1e-4, gt=0.0, lt=1.0)
    """Clip of the ratio around 1; log-probs are averaged over elements."""
    advantage_clip: float = Field(5.0, gt=0.0)
    """Bound on the absolute advantage."""
    on_error: Literal["skip", "drop", "stop"] = "skip"
    """Images that a reward fails on, or scores NaN: skip that iteration's update on all ranks, drop them from their
    groups, or end the run. The first two warn."""
    optimizer_step: Literal["iteration", "active_step"] = "iteration"
    """One optimizer step per iteration, or one per active step."""
    antithetic: bool = False
    """Samples that leave the same state come in pairs of opposite noise."""
    log_prob: Literal["replayed", "stored"] = "replayed"
    """Draw a sample's noise again when its log-prob is needed, or keep the samples as most trainers do: the same
    gradient for G times the memory."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a reward is compared with: the mean of its group, or of the others in it."""
    scale_rewards: Literal["std", "none"] = "std"
    """Divide advantages by the spread of their group, or leave them in units of the reward."""


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW, or bitsandbytes' with both moments in 8 bits."""
    lr: float = Field(2e-6, gt=0.0)
    """Peak learning rate of AdamW."""
    betas: Annotated[tuple[Unit, Unit], Field(strict=False)] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: float = Field(1e-8, gt=0.0)
    """AdamW's epsilon."""
    weight_decay: float = Field(1e-4, ge=0.0)
    """Decoupled weight decay."""
    warmup_steps: Natural = 0
    """Optimizer steps of linear warm-up."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up, until the last iteration."""
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)
    """Keep an exponential moving average of the weights, sharded like them, for `egrpo export --weights ema`."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """Gradient norm bound, over all parameters and ranks."""


OWNED_BY_US = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "bf16", "fp16", "steps_per_print",
}  # fmt: skip
"""DeepSpeed's keys that `distributed/engine.py` sets from the rest of the tree."""


class DeepSpeedConfig(Section):
    zero_stage: Literal[1, 2, 3] = 3
    """What is sharded over ranks: 1 optimizer, 2 and gradients, 3 and weights."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's state and the float32 weights live: on the device, in host memory, on a disk."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Where the sharded weights live between uses (ZeRO-3)."""
    nvme_path: PathName | None = None
    """Folder on a fast local disk, for `nvme`."""
    init_timeout: Annotated[int, Field(ge=1, le=10**8)] = 1800
    """Seconds that loading may wait at one parameter before the run ends and says which rank waits for what."""
    overrides: dict[str, Any] = Field({})
    """Merged into DeepSpeed's own configuration last, for what this tree does not name. A key that DeepSpeed does not
    read is refused."""

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _whole(cls, stage: Any) -> Any:
        if isinstance(stage, bool | float):  # equal to 1, and none of 1, 2 and 3 all the same
            raise ValueError(f"{stage!r}: 1, 2 or 3 is needed")
        return stage


class StopWhenConfig(Section):
    reward: str
    """The reward to watch, one of `rewards`; best one that is not trained on."""
    drop: float = Field(0.02, ge=0.0)
    """How far its held-out mean may fall below its best, in its own units."""
    patience: Positive = 2
    """Evaluations in a row below that, while the trained rewards are above what they were at the best."""


class EvaluationConfig(Section):
    every: Natural = 25
    """Iterations between held-out evaluations; 0: only before and after."""
    num_prompts: Positive = 64
    """Held-out prompts used, from the top of the file."""
    num_inference_steps: Annotated[int, Field(ge=2, le=1000)] = 16
    """ODE steps of an evaluation image."""
    batch_size: Positive = 16
    """Images made together on one rank."""
    grid_images: Positive = 16
    """Images shown in the grids."""
    stop_when: StopWhenConfig | None = None
    """End the run when a watched reward falls while the trained ones rise; none given: never."""


class SamplesConfig(Section):
    """Pictures of what is trained on: of a prompt, the image with the highest mixed reward and that with the lowest."""

    every: Natural = 10
    """Iterations between them, the first included; 0: none."""
    prompts: Positive = 2
    """Of how many prompts, from the first of rank 0 on."""


class CheckpointConfig(Section):
    every: Natural = 50
    """Iterations between checkpoints; 0: only at the end."""
    save_total_limit: Positive = 2
    """Newest checkpoints kept."""
    best: str | None = None
    """Keep also the checkpoint at which this held-out reward was highest; none given: only the newest."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory."""


class GuardsConfig(Section):
    """What a run does when a number or a rank goes wrong."""

    bad_steps: Positive = 3
    """Iterations in a row with a loss, gradient, reward or latent that is not finite: skipped, until so many end it."""
    stop_seconds: Seconds = 120.0
    """Seconds that a run may take to end with a checkpoint after SIGTERM or Ctrl-C; then it ends without."""
    stall_seconds: Seconds = 3600.0
    """Seconds without progress in one phase after which the run ends and says which rank is where."""
    grad_norm_spike: float | None = Field(10.0, gt=1.0)
    """Warn where the gradient norm is so many times its running median."""
    policy_mismatch: float | None = Field(0.1, gt=0.0)
    """Warn where update and rollout differ by more of the step's noise than this."""
    max_log_ratio: float | None = Field(0.01, gt=0.0)
    """Warn where a log-ratio of new to old policy is larger than this: the policy drifts within one iteration."""
    clip_fraction: float | None = Field(None, gt=0.0, le=1.0)
    """Warn where more of the ratios are clipped than this."""
    zero_advantage_share: float | None = Field(0.5, gt=0.0, le=1.0)
    """Warn where more of the advantages are 0 than this: the reward tells the samples apart no more."""
