"""What a model family gives: a subclass of `Backbone` in `models/FAMILY/backbone.py`. No other code knows a family."""

import inspect
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from egrpo_fast.config import GuidanceConfig, ModelConfig
from egrpo_fast.files import read_json
from egrpo_fast.models.scheduler import dynamic_mu, grid, scheduler_config, uniform
from egrpo_fast.models.text import CachedText, Conditioning, HollowText, Text, TextEncoder, joined, tell_truncated
from egrpo_fast.models.vae import decoder_width, hollow_vae, load_tiny_decoder, load_vae, scale_factor
from egrpo_fast.models.weight_files import part_identity


@dataclass(frozen=True)
class ActivationUnits:
    """Activations of a family, measured on a CPU, in units of tokens x width x bytes of the dtype.

    Keys: bytes of a number, 2 for bfloat16 and 4 for float32. forward: at the peak of one without gradient. kept: for
    the backward, by the kind of a block. kept_per_head: the same, in bytes by each of its heads and tokens. backward:
    at the peak of one, beyond what is kept. decode: at the peak of decoding an image, in units of pixels x
    `decoder_width` x bytes of the dtype; the default is that of an AutoencoderKL.
    """

    forward: Mapping[int, float]
    kept: Mapping[int, Mapping[str, float]]
    kept_per_head: float
    backward: float
    decode: float = 3.0


@dataclass(frozen=True)
class Activations:
    """Bytes that a model's activations take, per row of a call: measured once per family, and scaled by its sizes.

    forward: at the peak of one without gradient. kept: by each block for its backward. block_input: of one block, what
    gradient checkpointing keeps in their place. backward: at the peak of one, beyond what is kept. decode: of an image.
    """

    forward: float
    kept: tuple[float, ...]
    block_input: float
    backward: float
    decode: float

    def update(self, checkpointing: bool) -> float:
        """At the peak of a forward and backward. With checkpointing a block keeps all that it needs in its turn alone,
        while the inputs of those before it are kept, too."""
        turns = (number * self.block_input + kept for number, kept in enumerate(self.kept, 1))
        return (max(turns) if checkpointing else sum(self.kept)) + self.backward


MODULATION = re.compile("norm|mod")
"""Part of the names of a block's layers that modulate it: their input is one vector for all tokens."""

GuidanceKind = Literal["embedded", "classifier_free", "none"]
"""The transformer reads the scale; or a velocity is made of two; or the model is distilled to work without."""
WITHOUT = {"embedded": "embeds its guidance scale", "none": "is distilled to work without guidance"}


@dataclass(frozen=True)
class Guidance:
    """How velocities are guided. scale: as the pipeline means it. two: whether one is made of two."""

    scale: float
    two: bool
    settings: GuidanceConfig


class Backbone(ABC):
    """A diffusers pipeline taken apart into what training needs: text in, velocity, images out.

    The class says what can be known of a folder before any weight is read. An instance holds the transformer, and has
    the text encoders and the image decoder loaded, whole, frozen and on the device. A subclass is registered when it
    is defined, under the name of its `pipeline`.

    Where the transformer embeds no guidance scale, the policy is the guided velocity. `velocity` makes it of the
    model's `predict` for the prompt and for the negative prompt, and `guided` says how.
    """

    pipeline: ClassVar[Any]
    """diffusers' class. `model_index.json` names it, and it reads and writes LoRA files."""
    text_encoder: ClassVar[type[TextEncoder]]
    transformer_class: ClassVar[Any]
    """diffusers' class of what is trained, or a subclass. Its config and weights are in the folder `transformer`."""
    decoder_class: ClassVar[Any] = AutoencoderKL
    """diffusers' class of the image decoder, in the folder `vae`."""
    input_sizes: ClassVar[tuple[str, ...]]
    """What in the transformer's config says how wide its inputs are: two checkpoints with the same read the same."""
    lora_targets: ClassVar[tuple[str, ...]]
    """`model.lora.target_modules` where none are given."""
    units: ClassVar[ActivationUnits]
    evaluation_shift: ClassVar[float | Literal["auto"]] = "auto"
    """Of `egrpo evaluate` where none is given."""
    pixels_per_latent: ClassVar[int] = 2
    """A token is a square of so many latent pixels a side."""
    guidance_argument: ClassVar[str] = "guidance_scale"
    """What the pipeline calls `model.guidance_scale`."""
    unguided_scale: ClassVar[float] = 1.0
    """The guidance scale at which, and below which, a guided velocity is that of the prompt alone."""

    parts: ClassVar[tuple[str, ...]]
    """All folders of a pipeline. An export copies all but `transformer`."""

    transformer: Any
    latent_shape: tuple[int, int]
    """Of one image's latents, as they are drawn: (tokens, channels), or (channels, latent pixels)."""

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "pipeline"):
            cls.parts = ("transformer", "vae", *cls.text_encoder.encoders, *cls.text_encoder.tokenizers, "scheduler")
            BACKBONES[cls.pipeline.__name__] = cls

    # What is known of a folder without its weights.

    @classmethod
    def check(cls, folder: Path, model: ModelConfig) -> None:
        """ValueError where a part of a folder, or a setting, does not fit. The transformer is checked elsewhere.

        OSError, KeyError, TypeError: a config cannot be read.
        """
        factor = cls._pixels_per_token(folder)
        for name, size in (("height", model.height), ("width", model.width)):
            if size % factor:
                raise ValueError(f"model.{name}: {size} is not a multiple of {factor}")
        cls.guidance(folder, model)
        if (most := cls.text_encoder.most_tokens) < model.max_sequence_length:
            message = f"{model.max_sequence_length}; a {cls.pipeline.__name__} reads at most {most}"
            raise ValueError(f"model.max_sequence_length: {message}")

    @classmethod
    @abstractmethod
    def guidance_kind(cls, folder: Path) -> GuidanceKind:
        """How the model of a folder is guided."""

    @classmethod
    def guidance(cls, folder: Path, model: ModelConfig) -> Guidance:
        """By `model.guidance_scale`, or the pipeline's default. ValueError: the model takes no such settings."""
        kind, scale = cls.guidance_kind(folder), model.guidance_scale
        if kind == "none" and scale is not None and scale > cls.unguided_scale:
            message = f"{scale:g}, but {folder} {WITHOUT[kind]}; leave it out, or give null"
            raise ValueError(f"model.guidance_scale: {message}")
        if scale is None or kind == "none":
            called = inspect.signature(cls.pipeline.__call__).parameters
            scale = cls.unguided_scale if kind == "none" else float(called[cls.guidance_argument].default)
        settings = model.guidance.model_dump()
        changed = [name for name, value in GuidanceConfig().model_dump().items() if settings[name] != value]
        if changed and kind != "classifier_free":
            message = f"it is for classifier-free guidance, and {folder} {WITHOUT[kind]}"
            raise ValueError(f"model.guidance.{changed[0]}: {message}; leave it out")
        two = kind == "classifier_free" and scale > cls.unguided_scale
        if changed and not two:
            message = f"there is no guidance at a model.guidance_scale of {scale:g}; give more, or leave this out"
            raise ValueError(f"model.guidance.{changed[0]}: {message}")
        return Guidance(scale, two, model.guidance)

    @classmethod
    def _pixels_per_token(cls, folder: Path) -> int:
        """Along a side."""
        return cls.pixels_per_latent * scale_factor(read_json(folder / "vae" / "config.json"))

    @classmethod
    def tokens(cls, folder: Path, model: ModelConfig) -> int:
        """Of an image, without those of its text."""
        factor = cls._pixels_per_token(folder)
        return (model.height // factor) * (model.width // factor)

    @classmethod
    def times(cls, folder: Path, model: ModelConfig, num_steps: int) -> Sequence[float]:
        """The grid of the pipeline's own scheduler, from 1 to 0. ValueError: it is none to train on."""
        config = scheduler_config(folder)
        return grid(config, num_steps, dynamic_mu(config, cls.tokens(folder, model)), uniform(num_steps))

    @classmethod
    def fingerprints(cls, folder: Path) -> dict[str, str]:
        """Of every frozen part that shapes an image, by what people call it. ValueError names what is missing."""
        vae = part_identity("model.path", folder / "vae")
        return {"vae": vae, "text encoders": cls.text_encoder.fingerprint(folder)}

    @classmethod
    def frozen_bytes(cls, folder: Path, model: ModelConfig) -> dict[str, float]:
        """What the frozen parts will take on the device, by what people call them; by the folder's configs."""
        vae = hollow_vae(folder, cls.decoder_class).num_parameters() * getattr(torch, model.dtype).itemsize
        return {"VAE": vae, "text encoders": cls.text_encoder.weight_bytes(folder, model)}

    # The transformer alone.

    @classmethod
    def mended(cls, transformer: Any) -> Any:
        """A transformer made on the meta device, with what is computed at its making and is in no file."""
        return transformer

    @classmethod
    @abstractmethod
    def blocks(cls, transformer: Any) -> list[nn.Module]:
        """The transformer's blocks in order: what a cache may skip. Each takes `hidden_states` [rows, ...] by name."""

    @classmethod
    def kind(cls, block: nn.Module) -> str:
        """A block's key in `units`."""
        return type(block).__name__

    @classmethod
    def linear_layers(cls, transformer: Any) -> set[str]:
        """Names of the linear layers of its blocks, without those of modulation: what 8 bits are for."""
        blocks = cls.blocks(transformer)
        inside = {
            layer for block in blocks for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear) and not MODULATION.search(name)
        }  # fmt: skip
        return {name for name, layer in transformer.named_modules() if layer in inside}

    @classmethod
    def compiled(cls, transformer: Any) -> nn.Module:
        """One of the same parameters on the meta device, with compiled blocks, for forwards without gradient.

        ValueError: it has not been tried.
        """
        raise ValueError(f"rollout.compile: not for a {cls.pipeline.__name__}")

    @classmethod
    def size(cls, transformer: Any) -> tuple[int, int]:
        """(width, heads) of its blocks."""
        heads = transformer.config.num_attention_heads
        return heads * transformer.config.attention_head_dim, heads

    # All of it.

    @classmethod
    def load(
        cls, transformer: Any, folder: Path, model: ModelConfig, device: torch.device, embeddings: str | None = None
    ) -> "Backbone":
        """Load all parts but the transformer, frozen. embeddings: a folder that stands for the text encoders."""
        text: Text
        if embeddings is None:
            text = cls.text_encoder(folder, model, device)
        else:
            text = CachedText(embeddings, cls.text_encoder, folder, model, device)
        vae = load_vae(folder, cls.decoder_class, getattr(torch, model.dtype), device)
        if model.vae_tiling:  # tile by tile, where an image is larger than the VAE's own tile size
            vae.enable_tiling()
        made = cls(transformer, vae, text, model, cls.guidance(folder, model))
        if made._guidance.two and isinstance(text, CachedText):
            text.require([model.guidance.negative_prompt], "model.guidance.negative_prompt")
        return made

    @classmethod
    def hollow(cls, transformer: Any, folder: Path, model: ModelConfig) -> "Backbone":
        """One on the meta device, by a folder's configs: what it computes has a shape and a cost, and no values."""
        vae, text = hollow_vae(folder, cls.decoder_class), HollowText(cls.text_encoder.shapes(folder, model))
        return cls(transformer, vae, text, model, cls.guidance(folder, model))

    def __init__(self, transformer: Any, decoder: Any, text: Text, model: ModelConfig, guidance: Guidance) -> None:
        """decoder: of `decoder_class`. text: what encodes prompts."""
        self.transformer, self._vae, self._text, self._guidance = transformer, decoder, text, guidance
        self.height, self.width = model.height, model.width
        self.decode_batch_size = model.decode_batch_size
        """Most images that `decode` takes at a time."""
        self._tiny: AutoencoderTiny | None = None
        self._scale_factor = scale_factor(decoder.config)
        factor = self._scale_factor * self.pixels_per_latent
        self._rows, self._columns = self.height // factor, self.width // factor  # of tokens

    @property
    def rows_per_velocity(self) -> int:
        """Rows that the transformer computes for one velocity."""
        return 2 if self._guidance.two else 1

    @property
    def rows_per_call(self) -> int:
        """Of them, those that one call computes at a time."""
        return 2 if self._guidance.two and self._guidance.settings.calls == 1 else 1

    @property
    def trained_rows_per_velocity(self) -> int:
        """Of them, those that gradients flow through."""
        return 2 if self._guidance.two and self._guidance.settings.train == "both" else 1

    def tokens_by_block(self, image: int, text: int) -> list[int]:
        """How many each block works on."""
        return [image + text] * len(self.blocks(self.transformer))

    def activations(self, itemsize: int) -> Activations:
        """itemsize: bytes of a number of the model's dtype."""
        width, heads = self.size(self.transformer)
        image = self._rows * self._columns
        text = max((one.shape[1] for one in self.encode([""]).values() if one.ndim == 3), default=0)
        unit, per_head, units = (image + text) * width * itemsize, self.units.kept_per_head * heads, self.units
        kept = (
            (units.kept[itemsize][self.kind(block)] * width * itemsize + per_head) * tokens
            for block, tokens in zip(self.blocks(self.transformer), self.tokens_by_block(image, text))
        )
        return Activations(
            forward=units.forward[itemsize] * unit, kept=tuple(kept),
            block_input=unit, backward=units.backward * unit,
            decode=units.decode * self.height * self.width * decoder_width(self._vae.config) * itemsize,
        )  # fmt: skip

    def check_prompts(self, prompts: Sequence[str], field: str, tell: bool = True) -> None:
        """ValueError, which begins with `field`, where prompts cannot be encoded. tell: print which will be cut."""
        if isinstance(self._text, CachedText):
            self._text.require(prompts, field)
        elif tell and isinstance(self._text, TextEncoder):
            tell_truncated(self._text, prompts, field)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the transformer reads of these prompts. Nothing outside the family looks into it."""
        return self._text.encode(prompts)

    @cached_property
    def _unconditional(self) -> Conditioning:
        return self._text.encode([self._guidance.settings.negative_prompt])

    @abstractmethod
    def predict(self, module: nn.Module, latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor) -> Tensor:
        """As `velocity`, of the prompts alone."""

    def velocity(
        self, module: nn.Module, latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor
    ) -> Tensor:
        """The policy's velocity `v = x_1 - x_0` at time t in [0, 1]: [R, L, C] in the model's dtype, contiguous.

        module: the transformer, or what stands in for it. latents [R, L, C]. rows int64 [R]: each row's prompt.
        """
        settings = self._guidance.settings
        if not self._guidance.two or 1.0 - t > settings.truncation:
            return self.predict(module, latents, t, conditioning, rows)
        frozen = torch.is_grad_enabled() and settings.train == "conditional"
        if settings.calls == 1 and not frozen:
            both = joined(conditioning, self._unconditional)
            last = torch.full_like(rows, len(next(iter(both.values()))) - 1)
            found = self.predict(module, latents.repeat(2, 1, 1), t, both, torch.cat((rows, last)))
            conditional, unconditional = found.chunk(2)
        else:
            conditional = self.predict(module, latents, t, conditioning, rows)
            with torch.no_grad() if frozen else nullcontext():
                unconditional = self.predict(module, latents, t, self._unconditional, torch.zeros_like(rows))
        v = self.guided(conditional.float(), unconditional.float())
        if settings.normalization is not None:
            before, after = (one.float().square().sum((1, 2), keepdim=True).sqrt() for one in (conditional, v))
            v = v * (settings.normalization * before / after).clamp(max=1.0)
        return v.to(conditional.dtype)

    def guided(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """`u + scale (c - u)`, the guided velocity of that of the prompt c and that of the negative prompt u."""
        return unconditional + self._guidance.scale * (conditional - unconditional)

    def use_tiny_decoder(self, folder: str) -> None:
        """Have `decode` with `tiny` use the small decoder in a folder. ValueError."""
        self._tiny = load_tiny_decoder(folder, self._vae)

    @abstractmethod
    def _unpacked(self, latents: Tensor, vae: Any) -> Tensor:
        """Latents [B, L, C] as the image decoder reads them: unpacked, and in its own scale."""

    @torch.no_grad()
    def decode(self, latents: Tensor, tiny: bool = False) -> Tensor:
        """Images [B, 3, H, W], float32 in [0, 1], of latents [B, L, C].

        What a decoder gives with an alpha channel is laid over white. tiny: by the small decoder, if there is one.
        """
        vae = self._tiny if tiny and self._tiny is not None else self._vae
        chunks = (self._unpacked(chunk, vae).to(vae.dtype) for chunk in latents.split(self.decode_batch_size))
        images = torch.cat([vae.decode(chunk, return_dict=False)[0] for chunk in chunks])
        images = images.reshape(len(latents), -1, self.height, self.width).float().div(2).add(0.5).clamp(0, 1)
        colour, alpha = images.tensor_split((3,), dim=1)
        return colour * alpha + (1 - alpha) if alpha.shape[1] else colour


BACKBONES: dict[str, type[Backbone]] = {}
"""Every family by the name of its pipeline class."""


def families() -> dict[str, type[Backbone]]:
    """BACKBONES, with every family that has a folder here."""
    for found in pkgutil.iter_modules([str(Path(__file__).parent)], f"{__package__}."):
        if found.ispkg:
            import_module(f"{found.name}.backbone")
    return BACKBONES
