"""The policy: the flow model that is trained. It encodes prompts, predicts velocities and decodes images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from egrpo_fast.config import Config, LoraConfig, ModelConfig, TailConfig
from egrpo_fast.files import is_hub_id
from egrpo_fast.models.attention import check_attention, use_arithmetic, use_attention
from egrpo_fast.models.folder import check_folder
from egrpo_fast.models.protocol import Backbone
from egrpo_fast.models.quantization import quantization_config
from egrpo_fast.models.tail import TailModel, check_tail
from egrpo_fast.models.text import Conditioning
from egrpo_fast.models.transformer import fill_buffers, fill_whole, meta_transformer, with_adapters
from egrpo_fast.rollout import TailVelocity, Velocity
from egrpo_fast.schedule import time_grid

Fill = Callable[[nn.Module, Callable[[str], Tensor]], None]
"""Gives a transformer on the meta device its parameters, which the second argument reads by name."""


class Policy:
    """A pipeline's transformer with all that is needed to draw with it, in two stages.

    A new one has looked at every file and read no weight: its transformer is on the meta device. `load` reads the
    weights. transformer: what is trained. compiled: on the meta device, what forwards without gradient use in the
    transformer's place; None: the transformer itself. tail: what tails use; None: the policy. before_call: is called
    with the time of every model call.
    """

    backbone: Backbone
    compiled: nn.Module | None = None
    tail: TailModel | None = None
    before_call: Callable[[float], None] = staticmethod(lambda t: None)
    _tiny_decoder: str | None = None

    def __init__(
        self, model: ModelConfig, folder: Path, *, embeddings: str | None = None, compiled: bool = False, seed: int = 0,
        fuse: str | None = None,
    ) -> None:  # fmt: skip
        """folder: the pipeline that `model.path` means. embeddings: a folder that stands for its text encoders. seed:
        of new adapters. fuse: a LoRA file that is added to the weights. ValueError names what the user must mend."""
        check_attention(model.attention)
        self.model, self.folder, self._embeddings = model, folder, embeddings
        self._family = check_folder(folder, model)
        how = quantization_config(model.quantization, self.dtype)
        self.transformer, weights = meta_transformer(folder, model.lora, seed, quantization=how)
        self.lora: LoraConfig | None = weights.lora
        self._weights = with_adapters(weights, self.transformer, folder, fuse, "models") if fuse else weights
        use_attention(self.transformer, model.attention)
        self.compiled = self._family.compiled(self.transformer) if compiled else None

    @classmethod
    def around(cls, backbone: Backbone, model: ModelConfig) -> "Policy":
        """One of parts that are loaded already."""
        made = cls.__new__(cls)
        made.model, made.backbone, made.transformer = model, backbone, backbone.transformer
        return made

    @classmethod
    def of(cls, config: Config, folder: Path) -> "Policy":
        """A run's own, and its tail unless `tail.path` has still to be downloaded."""
        made = cls(
            config.model, folder, embeddings=config.prompts.embeddings, compiled=config.rollout.compile,
            seed=config.seed,
        )  # fmt: skip
        if not is_hub_id(config.tail.path or ""):
            made.use_tail(config.tail)
        return made

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.model.dtype)

    def times(self, num_steps: int, shift: float | Literal["auto"]) -> Sequence[float]:
        """The grid of so many steps, from 1 to 0. ValueError: the model's own scheduler has none to train on."""
        if shift == "auto":
            return self._family.times(self.folder, self.model, num_steps)
        return time_grid(num_steps, shift)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Of one image's latents, as they are drawn."""
        return self.backbone.latent_shape

    def use_tail(self, tail: TailConfig) -> None:
        """Take these settings for tails from the next `load_tail` on. ValueError names what the user must mend."""
        check_tail(tail, self.folder)
        self.tail = None
        if tail.has_model:
            self.tail = TailModel(tail, self.transformer, self.folder, self.dtype, self.compiled is not None)
        self._tiny_decoder = tail.decoder

    def load(
        self, device: torch.device, fill: Fill | None = None, prompts: Mapping[str, Sequence[str]] | None = None,
        tell: bool = True,
    ) -> "Policy":  # fmt: skip
        """Load text encoders and image decoder, then the transformer by `fill`, or whole. ValueError.

        prompts: by the name of their setting; before the transformer is loaded, they are known to be encodable. tell:
        print which of them the encoders cut.
        """
        use_arithmetic(self.model)
        self.backbone = self._family.load(self.transformer, self.folder, self.model, device, self._embeddings)
        for field, some in (prompts or {}).items():
            self.backbone.check_prompts(some, field, tell)
        if fill:
            fill(self.transformer, self._weights)
        else:
            fill_whole(self.transformer.requires_grad_(False).eval(), self._weights, self.dtype, device)
        fill_buffers(self.transformer, self._weights, self.dtype, device)
        self._weights.files.close()
        if self.model.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        return self

    def load_tail(self, device: torch.device) -> None:
        """Load what `use_tail` asks for: a checkpoint of the tail's own, a small decoder. ValueError."""
        if self.tail:
            self.tail.load(self.backbone, device)
        if self._tiny_decoder:
            self.backbone.use_tiny_decoder(self._tiny_decoder)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the model reads of these prompts: their conditioning."""
        return self.backbone.encode(prompts)

    def velocity(self, conditioning: Conditioning, module: nn.Module | None = None) -> Velocity:
        """The policy's velocity for the prompts of `conditioning`, computed by `module`, or else the transformer."""
        module = self.transformer if module is None else module

        def velocity(latents: Tensor, t: float, rows: Tensor) -> Tensor:
            self.before_call(t)
            return self.backbone.velocity(module, latents, t, conditioning, rows)

        return velocity

    def tail_velocity(self, conditioning: Conditioning) -> TailVelocity | None:
        """The velocity of the tail's model for the prompts of `conditioning`; None: the policy's own."""
        if (tail := self.tail) is None:
            return None

        def velocity(latents: Tensor, t: float, rows: Tensor) -> Tensor:
            self.before_call(t)
            return tail.velocity(latents, t, conditioning, rows)

        return TailVelocity(velocity, tail.cache)

    @contextmanager
    def tail_follows(self, module: nn.Module) -> Iterator[None]:
        """For the length of a rollout the tail's model has the weights of `module`, the policy with whole weights."""
        with self.tail.following(module) if self.tail else nullcontext():
            yield

    def decode(self, latents: Tensor, tiny: bool = False) -> Tensor:
        """Images [B, 3, H, W], float32 in [0, 1], of latents [B, L, C]. tiny: by `tail.decoder`, if there is one."""
        return self.backbone.decode(latents, tiny)
