"""What a model family gives: a subclass of `Backbone` in `models/FAMILY/backbone.py`. No other code knows a family."""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from egrpo_fast.config import ModelConfig
from egrpo_fast.models.text import CachedText, Conditioning, HollowText, Text, TextEncoder, tell_truncated


@dataclass(frozen=True)
class Activations:
    """Bytes that a model's activations take, per image: measured once per family, and scaled by its sizes.

    forward: at the peak of one without gradient. kept: by each block for its backward. block_input: of one block, what
    gradient checkpointing keeps in their place. backward: at the peak of one, beyond what is kept. decode: of an image.
    """

    forward: float
    kept: tuple[float, ...]
    block_input: float
    backward: float
    decode: float

    def update(self, checkpointing: bool) -> float:
        """At the peak of a forward and backward. With checkpointing the last block keeps all that it needs, too."""
        kept = len(self.kept) * self.block_input + self.kept[-1] if checkpointing else sum(self.kept)
        return kept + self.backward


class Backbone(ABC):
    """A diffusers pipeline taken apart into what training needs: text in, velocity, images out.

    The class says what can be known of a folder before any weight is read. An instance holds the transformer, and has
    the text encoders and the image decoder loaded, whole, frozen and on the device. A subclass is registered when it
    is defined, under the name of its `pipeline`.
    """

    pipeline: ClassVar[Any]
    """diffusers' class. `model_index.json` names it, and it reads and writes LoRA files."""
    text_encoder: ClassVar[type[TextEncoder]]
    transformer_class: ClassVar[Any]
    """diffusers' class of what is trained. Its config and its weights are in the folder `transformer`."""
    parts: ClassVar[tuple[str, ...]]
    """All folders of a pipeline. An export copies all but `transformer`."""
    input_sizes: ClassVar[tuple[str, ...]]
    """What in the transformer's config says how wide its inputs are: two checkpoints with the same read the same."""

    transformer: Any
    _text: Text
    latent_shape: tuple[int, int]
    """(tokens, channels) of one image's latents."""
    decode_batch_size: int
    """Most images that `decode` takes at a time."""

    def __init_subclass__(cls) -> None:
        BACKBONES[cls.pipeline.__name__] = cls

    @classmethod
    @abstractmethod
    def check(cls, folder: Path, height: int, width: int) -> None:
        """ValueError where a part of a folder, or the image size, does not fit. The transformer is checked elsewhere.

        OSError, KeyError, TypeError: a config cannot be read.
        """

    @classmethod
    @abstractmethod
    def fingerprints(cls, folder: Path) -> dict[str, str]:
        """Of every frozen part that shapes an image, by what people call it. ValueError names what is missing."""

    @classmethod
    @abstractmethod
    def blocks(cls, transformer: Any) -> list[nn.Module]:
        """The transformer's blocks in order: what a cache may skip. Each takes `hidden_states` [rows, ...] by name."""

    @classmethod
    @abstractmethod
    def compiled(cls, transformer: Any) -> nn.Module:
        """One of the same parameters on the meta device, with compiled blocks, for forwards without gradient."""

    @classmethod
    @abstractmethod
    def load_decoder(cls, folder: Path, model: ModelConfig, device: torch.device) -> Any:
        """The image decoder, frozen. ValueError: it cannot be loaded."""

    @classmethod
    @abstractmethod
    def hollow_decoder(cls, folder: Path) -> Any:
        """The image decoder on the meta device, by its config."""

    @abstractmethod
    def __init__(self, transformer: Any, decoder: Any, text: Text, model: ModelConfig) -> None:
        """decoder: from `load_decoder` or `hollow_decoder`. text: what encodes prompts; `_text` holds it."""

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
        return cls(transformer, cls.load_decoder(folder, model, device), text, model)

    @classmethod
    def hollow(cls, transformer: Any, folder: Path, model: ModelConfig) -> "Backbone":
        """One on the meta device, by a folder's configs: what it computes has a shape and a cost, and no values."""
        return cls(transformer, cls.hollow_decoder(folder), HollowText(cls.text_encoder.shapes(folder, model)), model)

    @classmethod
    @abstractmethod
    def frozen_bytes(cls, folder: Path, model: ModelConfig) -> dict[str, float]:
        """What the frozen parts will take on the device, by what people call them; by the folder's configs."""

    @abstractmethod
    def activations(self, itemsize: int) -> Activations:
        """itemsize: bytes of a number of the model's dtype."""

    def check_prompts(self, prompts: Sequence[str], field: str, tell: bool = True) -> None:
        """ValueError, which begins with `field`, where prompts cannot be encoded. tell: print which will be cut."""
        if isinstance(self._text, CachedText):
            self._text.require(prompts, field)
        elif tell and isinstance(self._text, TextEncoder):
            tell_truncated(self._text, prompts, field)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the transformer reads of these prompts. Nothing outside the family looks into it."""
        return self._text.encode(prompts)

    @abstractmethod
    def velocity(
        self, module: nn.Module, latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor
    ) -> Tensor:
        """The model's velocity `v = x_1 - x_0` at time t in [0, 1]: [R, L, C] in the model's dtype, contiguous.

        module: the transformer, or what stands in for it. latents [R, L, C]. rows int64 [R]: each row's prompt.
        """

    @abstractmethod
    def use_tiny_decoder(self, folder: str) -> None:
        """Have `decode` with `tiny` use the small decoder in a folder. ValueError."""

    @abstractmethod
    def decode(self, latents: Tensor, tiny: bool = False) -> Tensor:
        """Images [B, 3, H, W], float32 in [0, 1], of latents [B, L, C]. tiny: by the small decoder, if there is one."""


BACKBONES: dict[str, type[Backbone]] = {}
"""Every family by the name of its pipeline class."""


def families() -> dict[str, type[Backbone]]:
    """BACKBONES, with every family that has a folder here."""
    for found in pkgutil.iter_modules([str(Path(__file__).parent)], f"{__package__}."):
        if found.ispkg:
            import_module(f"{found.name}.backbone")
    return BACKBONES
