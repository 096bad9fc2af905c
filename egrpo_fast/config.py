"""The typed configuration of a run: named YAML recipes, `key.path=value` overrides, everything checked before loading.

Every field has a type, a range and a line on what it means. A mistake is a `ConfigError` of one line per field.
"""

import difflib
import math
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from egrpo_fast.files import expanded
from egrpo_fast.recipe_files import ConfigError, Tree, override, read_recipe, write_yaml
from egrpo_fast.schedule import Schedule, SdeForm, Solver, make_schedule

CONFIG_FILE, RUN_FILE, CHECKPOINTS, PIPELINE = "config.yaml", "run.json", "checkpoints", "pipeline"
"""In a run's folder: its settings, what made it, its checkpoints, the trained pipeline."""

Positive = Annotated[int, Field(ge=1, lt=2**31)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Seconds = Annotated[float, Field(gt=0.0, le=1e8)]
Unit = Annotated[float, Field(ge=0.0, lt=1.0)]


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


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def takes(target: str, layer: str) -> bool:
    """Whether an entry of `Lora.target_modules` takes a layer: it is its name, or ends it after a dot (peft's rule)."""
    return layer == target or layer.endswith(f".{target}")


class Lora(_Section):
    """Low-rank adapters on the transformer's linear layers; the weights under them stay as they are (peft). With a
    path, rank, alpha and target_modules that are not given are those of its file."""

    rank: Positive = 64
    """Rank of every adapter."""
    alpha: float = Field(64.0, gt=0.0)
    """Scale of the adapters is alpha / rank."""
    target_modules: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"], min_length=1
    )
    """Linear layers that get one. An entry takes every layer with that name, or whose name ends in a dot and the entry:
    `proj_out` takes that of the single blocks and the model's output layer."""
    path: PathName | None = None
    """A LoRA file or folder to start from, in a layout that diffusers reads; none given: a new one."""

    @property
    def follows(self) -> frozenset[str]:
        """The settings that are still to be read from the file."""
        return frozenset({"rank", "alpha", "target_modules"} - self.model_fields_set if self.path else ())

    def layers(self, names: Collection[str]) -> dict[str, list[str]]:
        """Of a transformer's linear layers, those that each entry of target_modules takes.

        ConfigError: an entry that takes none.
        """
        taken = {target: [name for name in names if takes(target, name)] for target in self.target_modules}
        for target, layers in taken.items():
            if not layers:
                ends = sorted({name.rpartition(".")[2] for name in names})
                near = difflib.get_close_matches(target.rpartition(".")[2], ends, 3) or ends
                told = f"{target!r} is neither the name of a linear layer nor ends one after a dot"
                raise ConfigError(f"model.lora.target_modules: {told}; names end in {', '.join(near[:20])}, ...")
        return taken


class Model(_Section):
    path: PathName
    """Folder or hub id of a FLUX pipeline in diffusers' layout, or `shapes` for the embedded one."""
    height: Positive = 720
    """Picture height in pixels, a multiple of twice the VAE's factor (16 for FLUX)."""
    width: Positive = 720
    """Picture width in pixels, likewise."""
    guidance: float = Field(3.5, ge=0.0)
    """Guidance scale fed to models that embed it."""
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] = 512
    """Tokens of the T5 prompt; longer prompts are cut."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the transformer computes in; the master weights are float32."""
    tf32: bool = False
    """Let GPUs round the inputs of float32 products and convolutions to TF32; bfloat16 ones are not concerned."""
    attention: Literal[
        "native", "cudnn", "efficient", "flash", "flash_varlen", "flash_hub", "flash_3_hub", "flash_4_hub", "xformers"
    ] = "native"
    """Who computes attention, by diffusers' dispatcher: PyTorch by its own choice, cuDNN, or a package to install."""
    lora: Lora | None = None
    """Train adapters instead of the whole transformer; none given: all weights."""
    text_encoder_quantization: Literal["none", "int8", "nf4"] = "none"
    """Weights of the T5 encoder: as loaded, or in 8 or 4 bits by bitsandbytes."""
    decode_batch: Positive = 32
    """Pictures that the VAE decodes and the rewards score at a time."""
    vae_tiling: bool = False
    """Decode large pictures tile by tile: less memory, seams are blended."""
    gradient_checkpointing: bool = False
    """Recompute activations in the update's backward pass."""


class Prompts(_Section):
    train: PathName
    """Prompt file (.txt, .json, .jsonl, .csv, .tsv or .parquet, each also .gz), hub data set
    (`datasets:ORG/NAME:SPLIT`), or `shapes`."""
    held_out: PathName
    """The prompts of the held-out evaluation, likewise."""
    column: str = "prompt"
    """Field of the JSON objects, or column of the tables, that holds the prompt."""
    embeddings: PathName | None = None
    """Folder made by `egrpo encode` of these prompts: no text encoder is loaded; none given: encode on the fly."""
    per_iteration: Positive = 1
    """Prompts of one iteration, over all ranks together; a multiple of the number of ranks."""
    shuffle: bool = True
    """A new order every epoch, from the seed."""


class ScheduleSection(_Section):
    num_steps: Annotated[int, Field(ge=2, le=1000)] = 16
    """T, grid steps of the training rollout."""
    shift: float = Field(3.0, gt=0.0)
    """Time shift s of the grid."""
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


MERGING = ("schedule.entropy_threshold", "schedule.merge_lengths", "schedule.max_merge")
OPTIONAL = {*MERGING, "schedule.active_steps", "rollout.group_size", "tail.stride", "tail.solver"}
"""Settings outside of `method` that not every method uses."""
OWN_FORM = {"dance_grpo": "dance_grpo", "branch_grpo": "dance_grpo"}
OWN_ETA = {"flow_grpo": 0.7, "dance_grpo": 0.3, "cps": 0.8}


class EGrpo(_Section):
    """`schedule` says which steps are trained and how they merge, `rollout` how many samples leave each."""

    name: Literal["e_grpo"] = "e_grpo"
    """E-GRPO."""

    @property
    def uses(self) -> set[str]:
        """Which of OPTIONAL it uses."""
        return OPTIONAL


class FlowGrpo(_Section):
    name: Literal["flow_grpo"]
    """Flow-GRPO; with a window Flow-GRPO-Fast."""
    fraction: float = Field(1.0, gt=0.0, le=1.0)
    """Share of the steps that is trained, drawn anew every iteration."""
    same_noise: bool = False
    """Whether the trajectories of a prompt share their initial noise."""
    window: Positive | None = None
    """Steps in a row that are stochastic and trained, the others ODE, drawn anew every iteration; none given: all."""
    window_range: Annotated[tuple[Natural, Positive], Field(strict=False)] | None = None
    """Grid indices [first, end) that the window lies in; none given: the first half."""

    @property
    def uses(self) -> set[str]:
        return {"rollout.group_size", "tail.stride", "tail.solver"} if self.window else {"rollout.group_size"}


class DanceGrpo(_Section):
    name: Literal["dance_grpo"]
    """DanceGRPO."""
    fraction: float = Field(0.6, gt=0.0, le=1.0)
    """Share of the steps that is trained, drawn anew every iteration."""
    same_noise: bool = True
    """Whether the trajectories of a prompt share their initial noise."""

    @property
    def uses(self) -> set[str]:
        return {"rollout.group_size"}


class MixGrpo(_Section):
    name: Literal["mix_grpo"]
    """MixGRPO."""
    window: Positive = 4
    """Steps in a row that are stochastic and trained, the others ODE."""
    stride: Natural = 1
    """Grid steps that the window moves on at a time."""
    every: Positive = 25
    """Iterations until it moves."""
    same_noise: bool = True
    """Whether the trajectories of a prompt share their initial noise."""

    @property
    def uses(self) -> set[str]:
        return {"rollout.group_size", "tail.stride", "tail.solver"}


class BranchGrpo(_Section):
    name: Literal["branch_grpo"]
    """BranchGRPO; its tree says how many pictures there are."""
    splits: list[Natural] = Field([0, 3, 6, 9], min_length=1)
    """Grid indices at which every row splits."""
    branching: Annotated[int, Field(ge=2, le=65536)] = 2
    """Children of a split."""
    max_rows: Annotated[int, Field(ge=2, le=65536)] = 64
    """Most leaves of a prompt's tree."""
    pruned_steps: Natural = 0
    """Steps in a row that are not trained: from the end, sliding towards the last split."""
    slide_every: Positive = 30
    """Iterations until they slide by one."""
    extremes: Natural = 0
    """Only the nodes above so many best and as many worst leaves are trained; 0: all are."""

    @property
    def uses(self) -> set[str]:
        return set()


class GranularGrpo(_Section):
    name: Literal["granular_grpo"]
    """Granular-GRPO."""
    strides: list[Positive] = Field([1, 2], min_length=1)
    """Grid steps per ODE step of each of a sample's tails."""

    @property
    def uses(self) -> set[str]:
        return {"schedule.active_steps", "rollout.group_size", "tail.solver"}


class TempFlowGrpo(_Section):
    name: Literal["tempflow_grpo"]
    """TempFlow-GRPO."""
    steps: list[Natural] | None = Field(None, min_length=1)
    """Grid indices that are trained; none given: all but the last."""

    @property
    def uses(self) -> set[str]:
        return {"rollout.group_size", "tail.stride", "tail.solver"}


Method = EGrpo | FlowGrpo | DanceGrpo | MixGrpo | BranchGrpo | GranularGrpo | TempFlowGrpo


class Rollout(_Section):
    group_size: Annotated[int, Field(ge=2, le=65536)] | list[Annotated[int, Field(ge=2, le=65536)]] = 12
    """G, samples per active step: one number, or one per active step."""
    prompts_per_call: Positive = 1
    """Prompts of one rank that share a wavefront."""
    micro_batch: Positive | Literal["auto"] | None = None
    """Most rows of one model call; `auto`: found by trial before the first rollout; none given: all live rows. Out of
    memory, a rollout is repeated with half of them, where no rank waits for another within a call."""
    compile: bool = False
    """Run the transformer's blocks through torch.compile, in rollouts and evaluations; the update stays as it is."""
    overlap: bool = False
    """Decode and score the pictures of one call's prompts while the next ones' are rolled out."""
    weights: Literal["sharded", "gathered"] = "gathered"
    """Under ZeRO-3, gather the weights at every layer of every call, or once per rollout."""
    backend: Literal["auto", "reference", "triton", "extension"] = "auto"
    """Who runs the ops between model calls."""

    @property
    def most_rows(self) -> int | None:
        """`micro_batch` where it is a number. None: all live rows, or what a trial will find."""
        return self.micro_batch if isinstance(self.micro_batch, int) else None


class FirstBlock(_Section):
    """Where the first block changes a family's rows as it did at the last step that was computed, all other blocks are
    taken to change them as they did then. The host waits for one number per call."""

    name: Literal["first_block"]
    """First-block cache."""
    threshold: float = Field(0.05, gt=0.0)
    """Largest relative change, in absolute mean over the rows, of what the first block adds that counts as none."""


class TaylorSeer(_Section):
    """Between computed steps the last layer's output is extrapolated from those before: a Taylor series in steps."""

    name: Literal["taylor_seer"]
    """TaylorSeer (arXiv 2503.06923), diffusers' lite mode."""
    interval: Annotated[int, Field(ge=2)] = 2
    """Steps from one computed step to the next."""
    warm_up: Positive = 1
    """First steps of a tail that are all computed."""
    order: Positive = 1
    """Highest order of the series."""


TailCache = FirstBlock | TaylorSeer

APPROXIMATIONS = ("stride", "solver", "path", "lora", "weights", "cache", "decoder")
"""Settings of `tail` that change its pictures."""


class Tail(_Section):
    """The ODE after the last stochastic step: no policy acts there, so it may be approximated (docs/tails.md)."""

    stride: Positive | list[Positive] = 1
    """Grid steps per ODE step: one number, or one per active step."""
    solver: Solver = "euler"
    """How its steps follow each other: one at a time, or with the velocity before (`ab2`, `dpm2m`)."""
    path: PathName | None = None
    """Folder or hub id of another FLUX pipeline whose transformer makes its calls; none given: the policy's."""
    lora: PathName | None = None
    """LoRA file or folder, in a layout that diffusers reads, on that transformer for its calls alone."""
    weights: Literal["exact", "int8", "float8"] = "exact"
    """What its calls compute in: as the policy, or weights and activations in 8 bits (torchao); float8 wants a GPU of
    compute capability 8.9."""
    cache: Annotated[TailCache, Field(discriminator="name")] | None = None
    """What its calls reuse of the call before, by diffusers' caching hooks; the name alone will do where it keeps its
    defaults; none given: nothing."""
    decoder: PathName | None = None
    """Folder of a tiny decoder (diffusers' AutoencoderTiny, such as TAEF1) of the pictures that training rewards."""
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
        return self.path is not None or self.lora is not None or self.weights != "exact"

    @property
    def has_model(self) -> bool:
        """Whether its calls have a transformer of their own, be it with the policy's weights."""
        return self.has_weights or self.cache is not None

    @property
    def approximated(self) -> tuple[str, ...]:
        """Which of APPROXIMATIONS are in use."""
        return tuple(name for name in APPROXIMATIONS if getattr(self, name) != Tail.model_fields[name].default)

    @property
    def exact(self) -> bool:
        """Whether nothing is approximated."""
        return not self.approximated


class Reward(_Section):
    name: str
    """A reward of `egrpo_fast.rewards`, or any Python callable as `package.module:attribute`."""
    weight: float = Field(1.0, ge=-1e6, le=1e6)
    """Its weight in the mix; 0: only watched."""
    options: dict[str, Any] = {}
    """Arguments of that reward."""

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError("a name of printable characters is expected")
        return name


class Objective(_Section):
    mix: Literal["reward", "advantage"] = "reward"
    """Add weighted rewards and standardise, or standardise each and add."""
    clip_range: float = Field(1e-4, gt=0.0, lt=1.0)
    """Clip of the ratio around 1; log-probs are averaged over elements."""
    advantage_clip: float = Field(5.0, gt=0.0)
    """Bound on the absolute advantage."""
    on_error: Literal["skip", "drop", "stop"] = "skip"
    """Pictures that a reward fails on, or scores NaN: skip that iteration's update on all ranks, drop them from their
    groups, or end the run. The first two warn."""
    optimizer_step: Literal["iteration", "active_step"] = "iteration"
    """One optimizer step per iteration, or one per active step."""
    antithetic: bool = False
    """Samples that leave the same state come in pairs of opposite noise."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a reward is compared with: the mean of its group, or of the others in it."""
    normalise: Literal["std", "none"] = "std"
    """Divide advantages by the spread of their group, or leave them in units of the reward."""


class Optimizer(_Section):
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
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up, until the last iteration."""
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)
    """Keep an exponential moving average of the weights, sharded like them, for `egrpo export --weights ema`."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """Gradient norm bound, over all parameters and ranks."""


UNIONS = ("method",), ("tail", "cache")
"""Where a section is one of several, told apart by its name."""
OWNED_BY_US = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "bf16", "fp16", "steps_per_print",
}  # fmt: skip
"""DeepSpeed's keys that `engine.py` sets from the rest of the tree."""


class DeepSpeed(_Section):
    zero_stage: Literal[1, 2, 3] = 3
    """What is sharded over ranks: 1 optimizer, 2 and gradients, 3 and weights."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's state and the float32 weights live: on the device, in host memory, on a disk."""
    offload_weights: Literal["none", "cpu", "nvme"] = "none"
    """Where the sharded weights live between uses (ZeRO-3)."""
    nvme_path: PathName | None = None
    """Folder on a fast local disk, for `nvme`."""
    init_timeout: Annotated[int, Field(ge=1, le=10**8)] = 1800
    """Seconds that loading may wait at one parameter before the run ends and says which rank waits for what."""
    overrides: dict[str, Any] = {}
    """Merged into DeepSpeed's own configuration last, for what this tree does not name. A key that DeepSpeed does not
    read is refused."""

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _whole(cls, stage: Any) -> Any:
        if isinstance(stage, bool | float):  # equal to 1, and none of 1, 2 and 3 all the same
            raise ValueError(f"{stage!r}: 1, 2 or 3 is needed")
        return stage


class StopWhen(_Section):
    reward: str
    """The reward to watch, one of `rewards`; best one that is not trained on."""
    drop: float = Field(0.02, ge=0.0)
    """How far its held-out mean may fall below its best, in its own units."""
    patience: Positive = 2
    """Evaluations in a row below that, while the trained rewards are above what they were at the best."""


class Evaluation(_Section):
    every: Natural = 25
    """Iterations between held-out evaluations; 0: only before and after."""
    num_prompts: Positive = 64
    """Held-out prompts used, from the top of the file."""
    num_steps: Annotated[int, Field(ge=2, le=1000)] = 16
    """ODE steps of an evaluation picture."""
    prompts_per_call: Positive = 16
    """Pictures made together on one rank."""
    grid_pictures: Positive = 16
    """Pictures shown in the grids."""
    stop_when: StopWhen | None = None
    """End the run when a watched reward falls while the trained ones rise; none given: never."""


class Checkpoint(_Section):
    every: Natural = 50
    """Iterations between checkpoints; 0: only at the end."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    best: str | None = None
    """Keep also the checkpoint at which this held-out reward was highest; none given: only the newest."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory."""


class Guards(_Section):
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


class Config(_Section):
    """A whole run."""

    output_dir: Annotated[
        Path, BeforeValidator(_path), PlainSerializer(_as_written, when_used="json"), Field(strict=False)
    ]
    """Where the run writes; must not hold another run unless `resume`."""
    resume: bool = False
    """Continue the run in output_dir from its newest checkpoint; where there is no run yet, begin it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of noise, prompt order and everything else."""
    iterations: Positive = 300
    """Training iterations."""
    wandb: bool = False
    """Also log to Weights & Biases (the `wandb` extra)."""
    model: Model
    prompts: Prompts
    method: Annotated[Method, Field(discriminator="name")] = EGrpo()
    """The method; its name alone will do where it keeps its defaults."""
    schedule: ScheduleSection = ScheduleSection()
    rollout: Rollout = Rollout()
    tail: Tail = Tail()
    rewards: list[Reward] = Field(min_length=1)
    """Rewards; those of weight 0 are scored in evaluations only."""
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    deepspeed: DeepSpeed = DeepSpeed()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    guards: Guards = Guards()

    @model_validator(mode="before")
    @classmethod
    def _with_the_methods_own_defaults(cls, tree: Any) -> Any:
        """Spells out the method's name, and the form and scale of the noise that it comes with."""
        if not isinstance(tree, dict):
            return tree
        method, schedule = tree.get("method", "e_grpo"), tree.get("schedule", {})
        method = {"name": method} if isinstance(method, str) else method
        if not isinstance(method, dict) or not isinstance(schedule, dict):
            return tree
        method = {"name": "e_grpo", **method}
        form = schedule.get("sde_form", OWN_FORM.get(str(method["name"]), "flow_grpo"))
        own = {"sde_form": form, "eta": OWN_ETA.get(str(form), 0.7)}
        return tree | {"method": method, "schedule": own | schedule}

    @model_validator(mode="after")
    def _fits_the_method(self) -> "Config":
        method, last = self.method, self.schedule.num_steps - 1
        if unused := self._unused():
            raise ValueError(f"{', '.join(unused)}: not used by method {method.name}; leave it out")
        if isinstance(self.rollout.group_size, list) and "schedule.active_steps" not in method.uses:
            raise ValueError(f"rollout.group_size: one number for all steps with method {method.name}")
        if isinstance(self.tail.stride, list) and not isinstance(method, EGrpo):
            raise ValueError(f"tail.stride: one number for all steps with method {method.name}")
        if isinstance(method, FlowGrpo):
            first, end = method.window_range or (0, self.schedule.num_steps // 2)
            if method.window is None and method.window_range is not None:
                raise ValueError("method.window_range: not used without method.window")
            if method.window is not None and method.fraction != 1.0:
                raise ValueError("method.fraction: not used with method.window, whose steps are all trained")
            if end > last:
                raise ValueError(f"method.window_range: {end} is past the end; allowed: to {last}")
            if (method.window or 1) > end - first:
                told = f"{method.window} steps pass the end of [{first}, {end}); allowed: up to {end - first}"
                raise ValueError(f"method.window: {told}")
        if isinstance(method, MixGrpo) and method.window > last:
            raise ValueError(f"method.window: {method.window} steps pass the end; allowed: up to {last}")
        if isinstance(method, BranchGrpo):
            if max(method.splits) >= last:
                told = f"{max(method.splits)} is the last step or past it; allowed: 0 to {last - 1}"
                raise ValueError(f"method.splits: {told}")
            leaves = method.branching ** min(len(method.splits), 17)  # 2^17 are too many already
            if leaves > method.max_rows:
                raise ValueError(f"method.max_rows: a tree of {leaves} leaves is wider than {method.max_rows}")
            if 2 * method.extremes > leaves:
                raise ValueError(
                    f"method.extremes: {method.extremes} best and worst of {leaves}; at most {leaves // 2}"
                )
            if method.pruned_steps >= last - max(method.splits):
                room = last - max(method.splits) - 1
                raise ValueError(f"method.pruned_steps: {method.pruned_steps}; after the last split at most {room}")
        if isinstance(method, TempFlowGrpo) and method.steps and max(method.steps) >= last:
            told = f"{max(method.steps)} is the last step or past it; allowed: 0 to {last - 1}"
            raise ValueError(f"method.steps: {told}")
        for name in ("splits", "steps"):
            steps = getattr(method, name, None)
            if steps and sorted(set(steps)) != steps:
                raise ValueError(f"method.{name}: {steps} must be increasing, without repeats")
        return self

    def _unused(self, given: bool = True) -> list[str]:
        """The settings of OPTIONAL that the method does not use; with `given`, those that were given."""
        names = sorted(OPTIONAL - self.method.uses)
        if not given:
            return names
        sections = {"schedule": self.schedule, "rollout": self.rollout, "tail": self.tail}
        return [n for n in names if n.partition(".")[2] in sections[n.partition(".")[0]].model_fields_set]

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        schedule, steps = self.schedule, self.schedule.num_steps
        owned = sorted(OWNED_BY_US & set(self.deepspeed.overrides))
        if owned:
            raise ValueError(f"deepspeed.overrides: {', '.join(owned)} follow from this configuration; set them there")
        zero_keys = self.deepspeed.overrides.get("zero_optimization", {})
        if not isinstance(zero_keys, dict):
            raise ValueError("deepspeed.overrides: zero_optimization must be a mapping")
        if owned := sorted({"stage", "offload_optimizer", "offload_param", "mics_shard_size"} & set(zero_keys)):
            told = "deepspeed.zero_stage and deepspeed.offload_* say it; MiCS is not supported"
            raise ValueError(f"deepspeed.overrides: zero_optimization.{owned[0]}: {told}")
        active = schedule.active_steps
        if active is not None:
            if max(active) >= steps:
                raise ValueError(f"schedule.active_steps: {max(active)} is past the end; allowed: 0 to {steps - 1}")
            if sorted(set(active)) != active:
                raise ValueError(f"schedule.active_steps: {active} must be increasing, without repeats")
        merges = schedule.merge_lengths
        if isinstance(merges, list):
            if len(merges) != steps:
                raise ValueError(f"schedule.merge_lengths: {len(merges)} numbers, one per grid step needed ({steps})")
            for index, length in enumerate(merges):
                if index + length > steps:
                    raise ValueError(
                        f"schedule.merge_lengths: step {index} merged over {length} passes the end; "
                        f"at most {steps - index} there"
                    )
        if isinstance(merges, int):
            reach = steps - (max(active) if active is not None else steps // 2 - 1)
            if merges > reach:
                told = f"{merges} passes the end from the last active step; at most {reach}"
                raise ValueError(f"schedule.merge_lengths: {told}")
        if merges is not None and schedule.max_merge is not None:
            raise ValueError("schedule.max_merge: caps the threshold's merges; not allowed beside merge_lengths")
        num_active = len(active) if active is not None else steps // 2
        for field, value in (("rollout.group_size", self.rollout.group_size), ("tail.stride", self.tail.stride)):
            if isinstance(value, list) and len(value) != num_active:
                raise ValueError(f"{field}: {len(value)} numbers, one per active step needed ({num_active})")
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: at least one needs a weight other than 0")
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards: {names} names one twice")
        if (rule := self.evaluation.stop_when) is not None:
            if rule.reward not in names:
                raise ValueError(f"evaluation.stop_when.reward: {rule.reward!r} is none of rewards: {', '.join(names)}")
            if not any(reward.weight for reward in self.rewards if reward.name != rule.reward):
                raise ValueError(f"evaluation.stop_when.reward: nothing but {rule.reward!r} is trained on")
            if not self.evaluation.every:
                raise ValueError("evaluation.stop_when: nothing to watch with evaluation.every 0")
        if self.checkpoint.best is not None and self.checkpoint.best not in names:
            told = f"{self.checkpoint.best!r} is none of rewards: {', '.join(names)}"
            raise ValueError(f"checkpoint.best: {told}")
        zero = self.deepspeed
        if "nvme" in (zero.offload_optimizer, zero.offload_weights) and zero.nvme_path is None:
            raise ValueError("deepspeed.nvme_path: a folder is needed to offload to nvme")
        if zero.zero_stage < 3 and zero.offload_weights != "none":
            raise ValueError(f"deepspeed.offload_weights: only ZeRO-3 shards weights, zero_stage is {zero.zero_stage}")
        if zero.zero_stage < 3 and zero.offload_optimizer == "nvme":
            raise ValueError("deepspeed.offload_optimizer: nvme needs zero_stage 3")
        if self.collects_weights:
            told = "needs rollout.weights gathered: sharded ones are collected inside every call"
            if self.rollout.compile:
                raise ValueError(f"rollout.compile: true {told}")
            if self.rollout.micro_batch == "auto":
                raise ValueError(f"rollout.micro_batch: auto {told}")
        if self.model.attention not in ("native", "efficient", "xformers") and self.model.dtype != "bfloat16":
            raise ValueError(f"model.attention: {self.model.attention} computes in bfloat16, model.dtype is float32")
        if zero.offload_optimizer != "none" and self.optimizer.name == "adamw8bit":
            raise ValueError("deepspeed.offload_optimizer: bitsandbytes' 8-bit AdamW stays on the device; use adamw")
        if zero.offload_optimizer == "nvme" and self.optimizer.ema_decay is not None:
            raise ValueError("optimizer.ema_decay: the average cannot be kept on nvme; use offload_optimizer cpu")
        if self.tail.has_model and self.tail.path is None and self.collects_weights:
            name = next(name for name in ("lora", "weights", "cache") if name in self.tail.approximated)
            told = "its model follows the policy from rollout to rollout; needs rollout.weights gathered"
            raise ValueError(f"tail.{name}: {told}")
        if schedule.sde_form == "cps" and schedule.eta > 1.0:
            raise ValueError(f"schedule.eta: {schedule.eta:g}; with sde_form cps at most 1")
        try:
            made = self.build_schedule()
            finite = all(map(math.isfinite, (made.entropy(i, n) for i, n in enumerate(made.merges))))
        except ArithmeticError:
            finite = False
        if not finite or any(earlier <= later for earlier, later in pairwise(made.times)):
            raise ValueError(f"schedule: shift {schedule.shift:g} and eta {schedule.eta:g} leave no usable time grid")
        if "schedule.active_steps" in self.method.uses:
            for index in made.active:
                if not made.sde(index, made.merges[index]).s > 0.0:
                    told = f"cps adds no noise in a step to t = 0, as active step {index} is over {made.merges[index]}"
                    raise ValueError(f"schedule.sde_form: {told}; use entropy_threshold 0 or other merge_lengths")
        return self

    def with_lora(self, lora: Lora) -> "Config":
        """The same with other settings of the adapters."""
        return self.model_copy(update={"model": self.model.model_copy(update={"lora": lora})})

    @property
    def collects_weights(self) -> bool:
        """Whether a rollout's model calls gather sharded weights themselves."""
        return self.deepspeed.zero_stage == 3 and self.rollout.weights == "sharded"

    def build_schedule(self) -> Schedule:
        """The schedule as the method uses it: without merging where it knows none."""
        settings = dict(self.schedule)
        if not self.method.uses.issuperset(MERGING):
            settings["entropy_threshold"] = 0.0
        return make_schedule(**settings)

    def with_tail(self, **settings: Any) -> "Config":
        """The same with these settings of `tail`, the others at their defaults: none given, the exact one."""
        return self.model_copy(update={"tail": Tail(**settings)})

    def per_active_step(self, value: int | list[int]) -> list[int]:
        """A setting that is one number or one per active step, as a list."""
        return value if isinstance(value, list) else [value] * len(self.build_schedule().active)

    def used(self) -> Tree:
        """All settings but those that the method does not use, as YAML can say them."""
        tree = self.model_dump(mode="json")
        for name in self._unused(given=False):
            section, _, field = name.partition(".")
            del tree[section][field]
        return tree

    def yaml(self) -> str:
        """`used` as the text of a recipe."""
        return write_yaml(self.used())


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field may hold: by itself, or none, or in a list."""
    if parts := get_args(annotation):
        for part in parts:
            yield from _sections(part)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for section in _sections(field.annotation):
            names += _field_names(section, f"{prefix}{name}.")
    return names


def _nearest(where: str, given: Any) -> str:
    """Settings that an unknown one was perhaps meant as; empty: none is like it.

    Misspelt it is like the whole of a name, without its sections like the end of one.
    """
    while isinstance(given, dict) and given:  # a section that is none is known by what is in it
        inner, given = next(iter(given.items()))
        where = f"{where}.{inner}"
    parts = where.split(".")
    scores: dict[str, float] = {}
    for name in _field_names(Config):
        known = name.split(".")
        ends = {name, ".".join(known[-len(parts) :])}
        alike = max(difflib.SequenceMatcher(None, where, end).ratio() for end in ends)
        scores[name] = max(alike, 0.8 if known[-1] == parts[-1] else 0.0)
    best = max(scores.values())
    names = [name for name, score in scores.items() if score == best]
    return " or ".join(names[:3]) if best >= 0.6 else ""


def _shown(text: str) -> str:
    """In one line that is not too long."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _explain(error: ValidationError) -> str:
    lines: dict[str, str] = {}
    for item in error.errors():
        # Branches of a union add their own tags to the location; the reader knows the field alone.
        unknown = item["type"] == "extra_forbidden"
        tag = next((len(union) for union in UNIONS if item["loc"][: len(union)] == union), None)
        parts = [part for place, part in enumerate(item["loc"]) if place != tag]
        location = [str(part) for part in parts if unknown or isinstance(part, int) or str(part).isidentifier()]
        location = [part for part in location if unknown or part not in ("int", "list")]
        location += ["name"] if item["type"] == "union_tag_not_found" else []
        where, message = _shown(".".join(location)), item["msg"]
        if unknown:
            near = _nearest(where, item["input"])
            message = "unknown key" + (f"; did you mean {near}?" if near else "")
            if tag is not None and where in _field_names(Config):  # of another branch of its section
                message = f"not used by {item['loc'][tag - 1]} {item['loc'][tag]}; leave it out"
        elif item["type"] in ("missing", "union_tag_not_found"):
            message = "missing, and has no default"
        elif item["type"] == "value_error":
            message = str(item["ctx"]["error"])
        else:
            message = f"{_shown(repr(item['input']))}: {message}"
        message = message if not where else f"{where}: {message}"
        lines[where] = f"{lines[where]}; or {item['msg']}" if where in lines else message
    return "\n".join(lines.values())


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """A named recipe or a YAML file, and what it extends, with `key.path=value` overrides (YAML values), checked.

    Raises ConfigError.
    """
    tree = read_recipe(recipe)
    for assignment in overrides:
        override(tree, assignment)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
