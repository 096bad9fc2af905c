"""What a run will cost before it runs: parameters, memory per GPU by part and phase, FLOPs, bytes gathered, seconds.

Closed forms of the recipe and of the model's config.json; no model is loaded. `docs/cost.md` derives them. Parameters
and FLOPs are exact, memory is held against CPU runs (`tests/commands/test_cost.py`); what concerns a GPU is an
estimate.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from egrpo_fast.config import Config, Lora, plan_of
from egrpo_fast.config.recipe_files import read_yaml
from egrpo_fast.files import is_hub_id, read_json
from egrpo_fast.models.weight_files import WeightFiles
from egrpo_fast.plan import Plan
from egrpo_fast.shapes import CLIP, EMBEDDED, pipeline_path

GIB = 2**30
Stream = Literal["image", "text", "joint", "row"]


@dataclass(frozen=True)
class Gpu:
    """flops: dense bfloat16 peak per second. memory: bytes that torch can have. bandwidth: its own, bytes per second.
    link: bytes per second and direction to the other GPUs of its machine."""

    flops: float
    memory: float
    bandwidth: float
    link: float


GPUS = {
    "A100": Gpu(312e12, 79.1 * GIB, 2.04e12, 300e9),
    "H100": Gpu(989e12, 79.1 * GIB, 3.35e12, 450e9),
    "H200": Gpu(989e12, 139.8 * GIB, 4.8e12, 450e9),
    "B200": Gpu(2250e12, 178.0 * GIB, 8.0e12, 900e9),
    "RTX4090": Gpu(165e12, 23.5 * GIB, 1.01e12, 32e9),
    "cpu": Gpu(0.1e12, 16.0 * GIB, 0.02e12, 10e9),
}
"""Vendors' peaks: SXM modules with NVLink (A100 of 80 GB, B200 of 180 GB), RTX4090 on PCIe 4; a small CPU."""
UNITS = {"tflops": 1e12, "memory": GIB, "bandwidth": 1e9, "link": 1e9}
"""What the numbers of a GPU of one's own are given in: TFLOP/s, GiB, GB/s, GB/s; in the order of `Gpu`."""


def parse_gpu(text: str) -> tuple[str, Gpu]:
    """Name and numbers of `NAME`, one of GPUS, or `NAME={tflops: ..., memory: ..., bandwidth: ..., link: ...}`.

    ValueError: it is neither.
    """
    name, equals, numbers = text.partition("=")
    if not equals:
        if name not in GPUS:
            told = f"there are {', '.join(GPUS)}; of another give the numbers: {name}={{{': N, '.join(UNITS)}: N}}"
            raise ValueError(f"--gpu: {name!r} is unknown; {told}")
        return name, GPUS[name]
    given = read_yaml(numbers, "--gpu")
    if not isinstance(given, dict) or given.keys() != UNITS.keys():
        raise ValueError(f"--gpu: {name}={{{': N, '.join(UNITS)}: N}} is needed, not {numbers!r}")
    for key, value in given.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
            raise ValueError(f"--gpu: {key}: {value!r} is no number above 0 and below 1e9")
    return name, Gpu(*(unit * given[key] for key, unit in UNITS.items()))


RESERVE = 2 * GIB
"""Assumed for the CUDA context, NCCL, libraries' workspaces and what the allocator cannot use."""
HOST_LINK = 25e9
"""Assumed bytes per second between a GPU and host memory; the host's AdamW is taken to read and write as fast."""

FLUX_DEV = {
    "transformer": {
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    },
    "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16},
    "parameters": {"vae": 83_819_683, "text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656},
}  # fmt: skip
"""FLUX.1-dev: what is planned for where `model.path` is a hub id."""
T5_EMBEDDINGS = 32128 * 4096

CLIP_PARAMETERS = {
    "ViT-B-32": 151_277_313, "ViT-B-16": 149_620_737, "ViT-L-14": 427_616_513, "ViT-H-14": 986_109_441,
    "ViT-g-14": 1_366_678_273, "ViT-bigG-14": 2_539_567_105,
}  # fmt: skip
"""open_clip's; the rewards keep their weights in float32."""
REWARD_PARAMETERS = {
    "hps": CLIP_PARAMETERS["ViT-H-14"], "pick_score": CLIP_PARAMETERS["ViT-H-14"], "image_reward": 446_206_689,
    "jpeg": 0, "shapes_soft": 0, "shapes_strict": 0, "http": 0,
}  # fmt: skip

# Activations, measured, in units of rows x tokens x width x bytes of the dtype (keys: 2 bfloat16, 4 float32): at the
# peak of a forward; kept by a double and by a single block for its backward, and in bytes by each of its heads; beyond
# what is kept, at the peak of a backward; of a decoded picture, in units of pixels x channels x bytes.
ROLLOUT = {2: 17.5, 4: 15.2}
SAVED = {2: (29.0, 25.0), 4: (25.0, 21.0)}
SAVED_PER_HEAD = 4 * 4
BACKWARD = 8.5
DECODE = {2: 3.75, 4: 3.0}


@dataclass(frozen=True)
class Linear:
    """A linear layer with bias and what it is applied to: image tokens, text tokens, both, or once per row."""

    name: str
    inputs: int
    outputs: int
    stream: Stream

    @property
    def parameters(self) -> int:
        return (self.inputs + 1) * self.outputs


@dataclass(frozen=True)
class Transformer:
    """A FluxTransformer2DModel by its config.json."""

    config: Mapping[str, Any]

    @property
    def width(self) -> int:
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def blocks(self) -> tuple[int, int]:
        return self.config["num_layers"], self.config["num_single_layers"]

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(self._linears())

    def _linears(self) -> Iterator[Linear]:
        d, config = self.width, self.config
        double, single = self.blocks
        yield Linear("x_embedder", config["in_channels"], d, "image")
        yield Linear("context_embedder", config["joint_attention_dim"], d, "text")
        embedders = {"timestep_embedder": 256, "text_embedder": config["pooled_projection_dim"]}
        if config["guidance_embeds"]:
            embedders["guidance_embedder"] = 256
        for name, inputs in embedders.items():
            yield Linear(f"time_text_embed.{name}.linear_1", inputs, d, "row")
            yield Linear(f"time_text_embed.{name}.linear_2", d, d, "row")
        streams: tuple[tuple[Stream, str, str, tuple[str, ...]], ...] = (
            ("image", "norm1", "ff", ("to_q", "to_k", "to_v", "to_out.0")),
            ("text", "norm1_context", "ff_context", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        )
        for block in (f"transformer_blocks.{index}" for index in range(double)):
            for stream, norm, feed_forward, attention in streams:
                yield Linear(f"{block}.{norm}.linear", d, 6 * d, "row")
                yield from (Linear(f"{block}.attn.{name}", d, d, stream) for name in attention)
                yield Linear(f"{block}.{feed_forward}.net.0.proj", d, 4 * d, stream)
                yield Linear(f"{block}.{feed_forward}.net.2", 4 * d, d, stream)
        for block in (f"single_transformer_blocks.{index}" for index in range(single)):
            yield Linear(f"{block}.norm.linear", d, 3 * d, "row")
            yield from (Linear(f"{block}.attn.{name}", d, d, "joint") for name in ("to_q", "to_k", "to_v"))
            yield Linear(f"{block}.proj_mlp", d, 4 * d, "joint")
            yield Linear(f"{block}.proj_out", 5 * d, d, "joint")
        yield Linear("norm_out.linear", d, 2 * d, "row")
        channels = config.get("out_channels") or config["in_channels"]
        yield Linear("proj_out", d, config.get("patch_size", 1) ** 2 * channels, "image")

    @property
    def parameters(self) -> dict[str, int]:
        """All, and by what they are applied to; a token meets those of its own stream and the joint ones."""
        double, single = self.blocks
        norms = self.config["attention_head_dim"] * (4 * double + 2 * single)
        blocks = [linear for linear in self.linears if "blocks." in linear.name]
        parts = {
            "per_token": sum(linear.parameters for linear in blocks if linear.stream != "row"),
            "modulation": sum(linear.parameters for linear in blocks if linear.stream == "row"),
            "embedders_and_output": sum(linear.parameters for linear in self.linears if linear not in set(blocks)),
            "norms": norms,
        }
        # Of a double block's two sets of layers a token meets one.
        one_token = sum(linear.parameters for linear in blocks if linear.stream in ("image", "joint"))
        return {"total": sum(parts.values()), **parts, "met_by_one_token": one_token}

    def lora_parameters(self, lora: Lora) -> int:
        """`sum rank (inputs + outputs)` over the layers that are adapted. ConfigError: an entry that takes none."""
        taken = lora.layers([linear.name for linear in self.linears]).values()
        chosen = {name for names in taken for name in names}
        return sum(lora.rank * (linear.inputs + linear.outputs) for linear in self.linears if linear.name in chosen)

    def flops(self, image: int, text: int) -> dict[str, float]:
        """`2 inputs outputs` per token and layer, and `4 (image + text)^2 width` per attention, of one row."""
        applied = {"image": image, "text": text, "joint": image + text, "row": 1}
        linear = sum(2 * each.inputs * each.outputs * applied[each.stream] for each in self.linears)
        attention = 4 * (image + text) ** 2 * self.width * sum(self.blocks)
        return {"total": linear + attention, "attention": attention}

    def _unit(self, rows: int, tokens: int, itemsize: int) -> int:
        return rows * tokens * self.width * itemsize

    def _tables(self, tokens: int) -> int:
        return 2 * 4 * tokens * self.config["attention_head_dim"]  # rotary cosines and sines, float32

    def forward_bytes(self, rows: int, tokens: int, itemsize: int) -> float:
        """Peak activations of a forward without gradient."""
        return ROLLOUT[itemsize] * self._unit(rows, tokens, itemsize) + self._tables(tokens)

    def backward_bytes(self, rows: int, tokens: int, itemsize: int, checkpointing: bool) -> float:
        """Peak activations of a forward and backward.

        checkpointing: every block keeps its input, and one at a time all that it saves.
        """
        double, single = self.blocks
        per_head = SAVED_PER_HEAD / itemsize / self.config["attention_head_dim"]
        in_double, in_single = (saved + per_head for saved in SAVED[itemsize])
        saved = double + single + in_single if checkpointing else double * in_double + single * in_single
        return (saved + BACKWARD) * self._unit(rows, tokens, itemsize) + self._tables(tokens)


@dataclass(frozen=True)
class Vae:
    """An AutoencoderKL by its config.json: what decoding takes."""

    config: Mapping[str, Any]

    @property
    def factor(self) -> int:
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def decode_bytes(self, height: int, width: int, itemsize: int) -> float:
        """Peak activations of one picture: `DECODE height width channels`, of the block that works at full size."""
        channels = self.config["block_out_channels"]
        return DECODE[itemsize] * height * width * channels[min(1, len(channels) - 1)] * itemsize

    def decode_flops(self, height: int, width: int) -> float:
        """`2 k^2 inputs outputs` per pixel and convolution, and the attention in the middle, of one picture."""
        channels = list(reversed(self.config["block_out_channels"]))
        layers = self.config["layers_per_block"] + 1
        pixels = height * width / self.factor**2
        top = channels[0]

        def resnet(inputs: int, outputs: int) -> int:
            return 9 * outputs * (inputs + outputs) + (inputs * outputs if inputs != outputs else 0)

        total = pixels * (9 * self.config["latent_channels"] * top + 2 * resnet(top, top))
        if self.config.get("mid_block_add_attention", True):
            total += pixels * (4 * top**2 + 2 * pixels * top)
        for index, (before, here) in enumerate(zip([top, *channels], channels)):
            total += pixels * (resnet(before, here) + (layers - 1) * resnet(here, here))
            if index < len(channels) - 1:
                pixels *= 4
                total += pixels * 9 * here * here
        return 2 * (total + pixels * 9 * channels[-1] * 3)


@dataclass(frozen=True)
class Pipeline:
    """A FLUX pipeline: two configs, and the parameters of the frozen parts. source: where they were read."""

    source: str
    transformer: Transformer
    vae: Vae
    frozen: Mapping[str, int]

    @classmethod
    def read(cls, path: str) -> "Pipeline":
        """Of a local diffusers folder; FLUX.1-dev for a hub id. ValueError: no such folder, or it cannot be read."""
        folder = Path(pipeline_path(path))
        if is_hub_id(str(folder)):
            known: Any = FLUX_DEV
            dev = Transformer(known["transformer"])
            return cls("FLUX.1-dev", dev, Vae(known["vae"]), known["parameters"])
        if not folder.is_dir():
            raise ValueError(f"model.path: no folder {path}")
        try:
            configs = [read_json(folder / part / "config.json") for part in ("transformer", "vae")]
            stems = {"vae": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
            frozen = {part: _count(WeightFiles(folder / part, stem)) for part, stem in stems.items()}
            pipeline = cls(str(path), Transformer(configs[0]), Vae(configs[1]), frozen)
            pipeline.transformer.linears  # noqa: B018 - a key that the config lacks is missed here
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"model.path: {path} cannot be read as a FLUX pipeline: {error}") from None
        return pipeline


def _count(files: WeightFiles) -> int:
    total = 0
    for shape in files.shapes.values():
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


@dataclass(frozen=True)
class Cluster:
    """gpus: in all, spread evenly over nodes. network: bytes per second and GPU between machines. utilisation: share of
    the peak FLOP/s that is reached; assumed, not measured. own: numbers of a kind that is none of GPUS."""

    gpus: int = 8
    nodes: int = 1
    kind: str = "H100"
    utilisation: float = 0.4
    network: float = 50e9
    own: Gpu | None = None

    def __post_init__(self) -> None:
        if self.own is None:
            parse_gpu(self.kind)
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise ValueError(f"--nodes: {self.gpus} GPUs cannot be spread evenly over {self.nodes} machines")

    @property
    def gpu(self) -> Gpu:
        return self.own or GPUS[self.kind]

    @property
    def reserve(self) -> float:
        return 0.0 if self.kind == "cpu" else RESERVE


def default_gpus(config: Config) -> int:
    """The most GPUs, up to 8, that share an iteration's prompts evenly."""
    return max(count for count in range(1, 9) if config.prompts.per_iteration % count == 0)


@dataclass(frozen=True)
class Memory:
    """Bytes by part: on every GPU in all phases, in each phase on top of that, and in host memory per GPU."""

    always: dict[str, float] = field(default_factory=dict)
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)

    @property
    def totals(self) -> dict[str, float]:
        standing = sum(self.always.values())
        return {phase: standing + sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> float:
        return max(self.totals.values())


def _followed(config: Config, architecture: Mapping[str, Any]) -> Config:
    """The same with what `model.lora` leaves to its file."""
    lora = config.model.lora
    if lora is None or not lora.follows:
        return config
    import torch

    from egrpo_fast.models.flux.backbone import FluxBackbone  # and with it diffusers, which no other plan needs
    from egrpo_fast.models.lora import follow_lora

    with torch.device("meta"):
        transformer = FluxBackbone.transformer_class.from_config(dict(architecture))
    found, _ = follow_lora(lora, transformer, FluxBackbone.pipeline)
    return config.with_lora(found)


class Cost:
    """The cost of one recipe on one cluster. ValueError where the prompts cannot be shared among the GPUs."""

    def __init__(self, config: Config, cluster: Cluster, pipeline: Pipeline | None = None) -> None:
        self.pipeline = pipeline or Pipeline.read(config.model.path)
        self.config, self.cluster = _followed(config, self.pipeline.transformer.config), cluster
        per_iteration = config.prompts.per_iteration
        if per_iteration % cluster.gpus:
            raise ValueError(f"prompts.per_iteration: {per_iteration} is not a multiple of {cluster.gpus} GPUs")
        self.prompts = per_iteration // cluster.gpus
        factor = 2 * self.pipeline.vae.factor
        for name, size in (("height", config.model.height), ("width", config.model.width)):
            if size % factor:
                raise ValueError(f"model.{name}: {size} is not a multiple of {factor}")
        self.image_tokens = config.model.height * config.model.width // factor**2
        self.text_tokens = config.model.max_sequence_length
        self.itemsize = 2 if config.model.dtype == "bfloat16" else 4
        self.plan: Plan = plan_of(config, 0)
        self.parameters = self.pipeline.transformer.parameters["total"]
        lora = self.config.model.lora
        self.adapters = self.pipeline.transformer.lora_parameters(lora) if lora else 0
        self.trained = self.adapters if lora else self.parameters
        zero = config.deepspeed.overrides.get("zero_optimization", {})
        self.hpz = int(zero.get("zero_hpz_partition_size", 1))
        self.bucket = int(zero.get("reduce_bucket_size", 5e8))
        self.sub_group = int(zero.get("sub_group_size", 1e9))
        self.max_live = int(zero.get("stage3_max_live_parameters", 1e9))

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_tokens

    @property
    def sharded(self) -> bool:
        return self.config.deepspeed.zero_stage == 3 and self.cluster.gpus > 1

    @property
    def calls(self) -> int:
        """Model calls of one wavefront."""
        rows = [len(wave.sources) * self._per_call for wave in self.plan.waves]
        return sum(-(-count // (self.config.rollout.most_rows or count)) for count in rows)

    @property
    def _per_call(self) -> int:
        return min(self.config.rollout.prompts_per_call, self.prompts)

    @property
    def _wavefronts(self) -> int:
        return -(-self.prompts // self._per_call)

    @property
    def _moments(self) -> float:
        """AdamW's bytes per trained weight."""
        return 2 * (1 + 4 / 256) if self.config.optimizer.name == "adamw8bit" else 8.0

    @property
    def checkpoint(self) -> float:
        """Bytes of one: float32 master weights, moments and average, whatever the number of GPUs that write it."""
        return (4.0 + self._moments + (4.0 if self.config.optimizer.ema_decay is not None else 0.0)) * self.trained

    @property
    def checkpoints_on_disk(self) -> int:
        """At most: the newest, the best, and one being written."""
        return self.config.checkpoint.keep + (self.config.checkpoint.best is not None) + 1

    @cached_property
    def memory(self) -> Memory:
        """By part and phase; ZeRO's partitions are P / N of P parameters on N GPUs."""
        config, gpus, stage, size = self.config, self.cluster.gpus, self.config.deepspeed.zero_stage, self.itemsize
        weights = (self.parameters + self.adapters) * size
        share = self.trained / gpus
        always: dict[str, float] = {}
        host: dict[str, float] = {}
        on_host = config.deepspeed.offload_optimizer == "cpu"
        on_disk = config.deepspeed.offload_optimizer == "nvme"

        def put(part: str, amount: float, away: bool) -> None:
            (host if away else always)[part] = amount

        shard = weights / gpus if stage == 3 else weights
        if config.deepspeed.offload_weights != "nvme":
            put("weights", shard, config.deepspeed.offload_weights == "cpu")
        if self.hpz > 1:
            always["weights, hpZ copy"] = weights / self.hpz
        put("gradients", 4.0 * (self.trained if stage == 1 else share), (on_host or on_disk) and stage > 1)
        moments = self._moments * share
        if not on_disk:
            put("master weights", 4.0 * share, on_host)  # also of float32 weights
            put("optimizer moments", moments, on_host)
        if config.optimizer.ema_decay is not None:
            put("average of the weights", 4.0 * share, on_host)
        always["reduction bucket"] = float(self.bucket * size)
        always["VAE"] = self.pipeline.frozen["vae"] * size
        tails = float(self.parameters * (size if config.tail.weights == "exact" else 1)) * config.tail.has_weights
        if config.tail.path is not None:
            always["the tail's model"] = tails
        if config.prompts.embeddings is None:
            always["text encoders"] = self._text_encoders()
        rewards = {reward.name: self._reward(reward.name, reward.options) for reward in config.rewards}
        offloaded = {reward.name for reward in config.rewards if reward.options.get("offload")}
        always |= {f"reward {name}": amount for name, amount in rewards.items() if amount and name not in offloaded}
        host |= {f"reward {name}": amount for name, amount in rewards.items() if amount and name in offloaded}
        host["copy of a checkpoint"] = self.checkpoint / gpus
        latents = self.image_tokens * self.pipeline.transformer.config["in_channels"]
        rows = self._per_call * self.plan.num_rows
        always["state of all rows"] = float(rows * latents * (4 + (size if size == 2 else 0)))
        always["context and reserve"] = self.cluster.reserve

        gathered = 0.0
        if self.sharded or config.deepspeed.offload_weights != "none":
            gathered = float(min(self.max_live * size, weights))
        live = max(len(wave.sources) for wave in self.plan.waves) * self._per_call
        evaluated = min(config.evaluation.prompts_per_call, -(-config.evaluation.num_prompts // gpus))
        micro_batch = min(config.rollout.most_rows or 10**9, max(live, evaluated))
        pictures = min(config.model.decode_batch, len(self.plan.picture_rows) * self._per_call)
        pixels = config.model.height * config.model.width
        transformer = self.pipeline.transformer
        whole = config.rollout.weights == "gathered" and (gathered > 0)
        sub_group = min(self.sub_group, share) if stage == 3 else share
        away = on_host or on_disk
        # torch's AdamW: the square root, and on a CPU its quotient too; bitsandbytes works in place.
        temporaries = 0 if config.optimizer.name == "adamw8bit" else 2 if self.cluster.kind == "cpu" else 1
        # Every prompt's picture latents stay until the update; so do the shared states.
        kept = float(self.prompts * latents * (4 * len(self.plan.picture_rows) + (4 + size) * self.plan.trained_states))
        states = self._per_call * max(len(group.sources) for group in self.plan.groups)
        phases = {
            "rollout": {
                "gathered weights": weights if whole else gathered,
                "the tail's copy": 0.0 if config.tail.path is not None else tails,
                "the tail's cache": self._tail_cache(),
                "activations": transformer.forward_bytes(micro_batch, self.tokens, size),
                "velocities": 2.0 * size * live * latents,
                "pictures' latents": kept,
            },
            "rewards": {
                "VAE activations": pictures * self.pipeline.vae.decode_bytes(
                    config.model.height, config.model.width, size
                ),
                "pictures": 2.0 * 4 * 3 * pictures * pixels,
                "visiting reward": max((rewards[name] for name in offloaded), default=0.0),
                "pictures' latents": kept,
            },
            "update": {
                "gathered weights": gathered,
                "activations": transformer.backward_bytes(
                    states, self.tokens, size, config.model.gradient_checkpointing
                ),
                "gradients in reduction": (4.0 if size == 2 else 0.0) * min(self.bucket, self.trained),
                "pictures' latents": kept,
            },
            "optimizer step": {
                "gradient of a sub-group": 0.0 if away else 4.0 * sub_group,
                "temporaries": 0.0 if away else 4.0 * temporaries * sub_group,
            },
        }  # fmt: skip
        return Memory(always, phases, host)

    def _tail_cache(self) -> float:
        """What `tail.cache` keeps of all rows that have a tail, until the rollout ends."""
        cache, transformer = self.config.tail.cache, self.pipeline.transformer
        if cache is None:
            return 0.0
        rows = self._per_call * sum(map(len, self.plan.families))
        kept = (cache.order + 1) * self.image_tokens * transformer.config["in_channels"]
        return float(rows * kept * self.itemsize)

    def _text_encoders(self) -> float:
        clip, t5 = self.pipeline.frozen["text_encoder"], self.pipeline.frozen["text_encoder_2"]
        bits = {"none": 8 * self.itemsize, "int8": 8, "nf4": 4.5}[self.config.model.text_encoder_quantization]
        embeddings = min(T5_EMBEDDINGS, t5) if bits < 16 else 0
        return clip * self.itemsize + embeddings * self.itemsize + (t5 - embeddings) * bits / 8

    @staticmethod
    def _reward(name: str, options: Mapping[str, Any]) -> float:
        kind = name.partition("/")[0]
        if kind in ("clip", "hps") and options.get("model") == EMBEDDED:
            return 4.0 * _count(WeightFiles(CLIP, "open_clip_model"))
        model = options.get("model", "")
        return 4.0 * (CLIP_PARAMETERS.get(model, 0) if kind == "clip" else REWARD_PARAMETERS.get(kind, 0))

    @property
    def unknown_rewards(self) -> list[str]:
        """Rewards whose size is not known here, counted as nothing."""
        return [
            reward.name
            for reward in self.config.rewards
            if (kind := reward.name.partition("/")[0]) not in REWARD_PARAMETERS
            and not (kind == "clip" and reward.options.get("model") in (*CLIP_PARAMETERS, EMBEDDED))
        ]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.cluster.gpu.memory

    @cached_property
    def flops(self) -> dict[str, float]:
        """Of one prompt's iteration; scoring by the reward models is not counted, it is below 1% for ViT-H."""
        one = self.pipeline.transformer.flops(self.image_tokens, self.text_tokens)
        # Backward: gradients of inputs and of weights, each as much as the forward; adapters need no base weights'.
        passes = 1 + (1 if self.adapters else 2) + (1 if self.config.model.gradient_checkpointing else 0)
        steps = self.plan.trained_states
        references = steps if self.config.objective.optimizer_step == "active_step" else 0
        model = self.config.model
        return {
            "evaluation": one["total"],
            "attention": one["attention"],
            "rollout": self.plan.evaluations * one["total"],
            "update": (passes * steps + references) * one["total"],
            "decode": len(self.plan.picture_rows) * self.pipeline.vae.decode_flops(model.height, model.width),
        }

    @cached_property
    def traffic(self) -> dict[str, float]:
        """Bytes that every GPU receives in one iteration: gathered weights by phase, and reduced gradients."""
        gpus, steps = self.cluster.gpus, len(self.plan.groups) * self._wavefronts
        part = (gpus - 1) / gpus
        gather = (self.parameters + self.adapters) * self.itemsize * part if self.sharded else 0.0
        optimizer_steps = len(self.plan.groups) if self.config.objective.optimizer_step == "active_step" else 1
        calls = 1 if self.config.rollout.weights == "gathered" else self.calls * self._wavefronts
        references = steps if optimizer_steps > 1 else 0
        return {
            "rollout": calls * gather,
            "update, forwards": (steps + references) * gather,
            "update, backwards": steps * gather,
            "gradients": steps * self.trained * self.itemsize * part,
            "weights after a step": 0.0 if self.sharded else optimizer_steps * self.trained * self.itemsize * part,
        }

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Estimated, of one iteration; nothing overlaps."""
        gpu, flops = self.cluster.gpu, self.flops
        rate = gpu.flops * self.cluster.utilisation
        link = gpu.link if self.cluster.nodes == 1 else min(gpu.link, self.cluster.network)
        # hpZ keeps a copy inside each machine, which serves the backwards.
        inside = gpu.link if self.hpz > 1 else link
        speeds = {name: inside if name == "update, backwards" else link for name in self.traffic}
        zero, moved = self.config.deepspeed, 0.0
        if zero.offload_optimizer != "none":
            moved += (16 if zero.offload_optimizer == "cpu" else 32) * self.trained / self.cluster.gpus
        if zero.offload_weights != "none":
            forwards = 2 * len(self.plan.groups) * self._wavefronts
            calls = 1 if self.config.rollout.weights == "gathered" else self.calls * self._wavefronts
            moved += (calls + forwards) * self.parameters * self.itemsize / self.cluster.gpus
        parts = {name: flops[name] * self.prompts / rate for name in ("rollout", "decode", "update")}
        parts |= {"communication": sum(amount / speeds[name] for name, amount in self.traffic.items())}
        if zero.offload_optimizer == "none":  # gradient, weight and both moments are read, all but the first written
            parts |= {"optimizer": 7 * 4 * self.trained / self.cluster.gpus / gpu.bandwidth}
        parts |= {"host": moved / HOST_LINK}
        return parts | {"total": sum(parts.values())}

    @cached_property
    def advice(self) -> list[dict[str, Any]]:
        """What to change where it does not fit, in this order: every change that fits alone, else the first changes
        together that do. Each: settings, peak bytes, whether it fits."""
        if self.fits:
            return []
        tried = [made for settings in CHANGES if (made := self._with([settings]))]
        alone = [made for made in tried if made["fits"]]
        if alone:
            return alone
        taken: list[Mapping[str, Any]] = []
        best = self.memory.peak
        for settings in CHANGES:
            made = self._with([*taken, settings])
            if made is not None and made["peak"] <= best:  # also what helps only together with a later one
                taken, best = [*taken, settings], made["peak"]
            if made is not None and made["fits"]:
                break
        enough = max(best, 0.95 * self.cluster.gpu.memory)  # with some room to spare
        for settings in reversed(taken):  # what costs most goes first
            without = [other for other in taken if other is not settings]
            made = self._with(without)
            if made is not None and made["peak"] <= enough:
                taken = without
        made = self._with(taken) if taken else None
        return [made] if made else []

    def _with(self, changes: list[Mapping[str, Any]]) -> dict[str, Any] | None:
        """The estimate with these changes; None where they change nothing, or cannot be."""
        tree = self.config.model_dump()
        cluster = self.cluster
        settings: dict[str, Any] = {}
        told: dict[str, Any] = {}
        for change in changes:
            settings |= change
        for name, value in settings.items():
            if name == "GPUs":
                count = cluster.gpus * value
                cluster = replace(cluster, gpus=count, nodes=cluster.nodes * value)
                tree["prompts"]["per_iteration"] = max(tree["prompts"]["per_iteration"], count)
                told[name] = count
            elif name == "rewards.offload":
                for reward in tree["rewards"]:
                    large = reward["name"].partition("/")[0] in ("hps", "clip", "pick_score", "image_reward")
                    if large and not reward["options"].get("offload"):
                        reward["options"]["offload"] = told[name] = True
            else:
                *sections, leaf = name.split(".")
                node = tree
                for section in sections:
                    node = node[section]
                if node[leaf] != value and not (name == "model.lora" and node[leaf]):
                    node[leaf] = told[name] = value
        if not told:
            return None
        try:
            cost = Cost(Config.model_validate(tree), cluster, self.pipeline)
        except ValueError:
            return None
        return {"settings": told, "peak": cost.memory.peak, "host": sum(cost.memory.host.values()), "fits": cost.fits}


CHANGES: tuple[Mapping[str, Any], ...] = (
    {"model.gradient_checkpointing": True},
    {"rollout.micro_batch": 1},
    {"model.decode_batch": 1},
    {"rollout.weights": "sharded"},
    {"optimizer.name": "adamw8bit"},
    {"prompts.embeddings": "FOLDER"},
    {"rewards.offload": True},
    {"optimizer.name": "adamw", "deepspeed.offload_optimizer": "cpu"},
    {"deepspeed.offload_weights": "cpu"},
    {"optimizer.name": "adamw", "deepspeed.offload_optimizer": "none", "model.lora": {}},
    {"GPUs": 2},
    {"GPUs": 4},
)
"""What saves memory, from what costs nothing to what costs most."""


def describe(config: Config, cluster: Cluster) -> dict[str, Any]:
    """The whole estimate as plain numbers: bytes, FLOPs, seconds."""
    cost = Cost(config, cluster)
    memory = cost.memory
    return {
        "model": cost.pipeline.source,
        "cluster": {
            "gpus": cluster.gpus, "nodes": cluster.nodes, "gpu": cluster.kind, "utilisation": cluster.utilisation,
            "peak_flops": cluster.gpu.flops, "memory": cluster.gpu.memory, "memory_bandwidth": cluster.gpu.bandwidth,
            "link": cluster.gpu.link, "network": cluster.network,
        },
        "parameters": {
            **cost.pipeline.transformer.parameters, **cost.pipeline.frozen, "lora": cost.adapters,
            "trained": cost.trained,
        },
        "memory": {
            "always": memory.always, "phases": memory.phases, "totals": memory.totals, "peak": memory.peak,
            "host_per_gpu": memory.host, "fits": cost.fits, "unknown_rewards": cost.unknown_rewards,
            "advice": cost.advice,
        },
        "checkpoint": {"bytes": cost.checkpoint, "at_once": cost.checkpoints_on_disk},
        "flops_per_prompt": cost.flops,
        "tokens": {"image": cost.image_tokens, "text": cost.text_tokens},
        "bytes_per_gpu": cost.traffic,
        "prompts_per_gpu": cost.prompts,
        "seconds": cost.seconds,
    }  # fmt: skip


def summary(cost: Mapping[str, Any]) -> str:
    """`describe` in a line."""
    cluster, memory = cost["cluster"], cost["memory"]
    phase = max(memory["totals"], key=memory["totals"].get)
    return (
        f"estimated: {memory['peak'] / GIB:.1f} of {cluster['memory'] / GIB:.1f} GiB per GPU, most in the {phase}"
        f"{'' if memory['fits'] else ' (does not fit)'}; {cost['seconds']['total']:.0f} s per iteration"
    )


def report(cost: Mapping[str, Any]) -> str:
    """`describe` as text."""
    cluster, memory, seconds = cost["cluster"], cost["memory"], cost["seconds"]
    flops, parameters = cost["flops_per_prompt"], cost["parameters"]
    machines = f" on {cluster['nodes']} machines" if cluster["nodes"] > 1 else ""
    lines = [
        f"{cost['model']} on {cluster['gpus']} x {cluster['gpu']}{machines}; an estimate, no GPU was asked",
        f"  parameters   {parameters['total']:,}: {parameters['per_token']:,} in the blocks' token layers (a token "
        f"meets {parameters['met_by_one_token']:,}), {parameters['modulation']:,} modulation; trained "
        f"{parameters['trained']:,}",
        "",
        f"memory per GPU, GiB {'':<12}" + "".join(f"{phase:>16}" for phase in memory["phases"]),
    ]
    rows: dict[str, list[float]] = {name: [amount] * 4 for name, amount in memory["always"].items()}
    for place, parts in enumerate(memory["phases"].values()):
        for name, amount in parts.items():
            rows.setdefault(name, [0.0] * 4)[place] += amount
    rows["total"] = list(memory["totals"].values())
    for name, amounts in rows.items():
        if any(amounts):
            lines.append(
                f"  {name:<30}" + "".join(f"{amount / GIB:>16.2f}" if amount else " " * 16 for amount in amounts)
            )
    verdict = "fits" if memory["fits"] else "does not fit"
    lines.append(f"  peak {memory['peak'] / GIB:.1f} GiB of {cluster['memory'] / GIB:.1f}: {verdict}")
    host, checkpoint = memory["host_per_gpu"], cost["checkpoint"]
    machine = sum(host.values()) * cluster["gpus"] / cluster["nodes"]
    lines += [
        f"  host memory per machine {machine / GIB:.3g} GiB; per GPU: "
        + ", ".join(f"{name} {amount / GIB:.3g}" for name, amount in host.items()),
        f"  a checkpoint {checkpoint['bytes'] / GIB:.3g} GiB; at most {checkpoint['at_once']} on the disk at once, "
        f"{checkpoint['at_once'] * checkpoint['bytes'] / GIB:.3g} GiB",
    ]
    if memory["unknown_rewards"]:
        lines.append(f"  of unknown size, counted as 0: {', '.join(memory['unknown_rewards'])}")
    for change in memory["advice"]:
        settings = " ".join(f"{name}={value}" for name, value in change["settings"].items())
        told = "would fit" if change["fits"] else "not enough either"
        lines.append(f"  {told} at {change['peak'] / GIB:.1f} GiB: {settings}")
    if not memory["fits"] and not memory["advice"]:
        lines.append("  no change known here makes it fit")
    total = sum(flops[part] for part in ("rollout", "update", "decode"))
    lines += [
        "",
        f"compute per prompt: {total / 1e15:.4g} PFLOP = rollout {flops['rollout'] / 1e15:.4g}, update "
        f"{flops['update'] / 1e15:.4g}, decode {flops['decode'] / 1e15:.4g}; one evaluation "
        f"{flops['evaluation'] / 1e12:.4g} TFLOP, {flops['attention'] / 1e12:.4g} of them attention",
        "received per GPU and iteration, GB: "
        + ", ".join(f"{name} {amount / 1e9:.1f}" for name, amount in cost["bytes_per_gpu"].items() if amount),
        f"seconds per iteration of {cost['prompts_per_gpu']} prompt(s) per GPU: {seconds['total']:.3g} = "
        + " + ".join(f"{name} {amount:.3g}" for name, amount in seconds.items() if amount and name != "total"),
        f"  assumed: {cluster['utilisation']:.0%} of {cluster['peak_flops'] / 1e12:g} TFLOP/s, "
        f"{cluster['link'] / 1e9:.0f} GB/s inside a machine, {cluster['network'] / 1e9:.0f} GB/s per GPU between, "
        f"no overlap; rewards' own time not counted",
        "",
        summary(cost),
    ]
    return "\n".join(line.rstrip() for line in lines)
