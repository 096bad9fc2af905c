"""Z-Image taken apart into what training needs: text in, velocity, images out.

Latents keep their channels apart: noise is drawn as [channels, latent pixels], and the transformer makes the tokens.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from egrpo_fast.models.protocol import ActivationUnits, Backbone, GuidanceKind
from egrpo_fast.models.text import Conditioning
from egrpo_fast.models.z_image.text import ZImageTextEncoder
from egrpo_fast.models.z_image.transformer import ZImageTransformer2DModel


class ZImageBackbone(Backbone):
    """Z-Image and Z-Image-Turbo. The model predicts minus the velocity, and its time runs from 0 to 1."""

    pipeline, transformer_class, text_encoder = ZImagePipeline, ZImageTransformer2DModel, ZImageTextEncoder
    unguided_scale = 0.0
    input_sizes = ("in_channels", "cap_feat_dim")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    units = ActivationUnits(
        forward={2: 17.7, 4: 17.4}, kept={2: {"ZImageTransformerBlock": 44.7}, 4: {"ZImageTransformerBlock": 32.7}},
        kept_per_head=16, backward=6.6,
    )  # fmt: skip

    @classmethod
    def guidance_kind(cls, folder: Path) -> GuidanceKind:
        return "classifier_free"

    @classmethod
    def blocks(cls, transformer: ZImageTransformer2DModel) -> list[nn.Module]:
        return [*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers]

    @classmethod
    def size(cls, transformer: ZImageTransformer2DModel) -> tuple[int, int]:
        return transformer.config.dim, transformer.config.n_heads

    def tokens_by_block(self, image: int, text: int) -> list[int]:
        parts = ("noise_refiner", image), ("context_refiner", text), ("layers", image + text)
        return [tokens for name, tokens in parts for _ in getattr(self.transformer, name)]

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._size = self.height // self._scale_factor, self.width // self._scale_factor
        self.latent_shape = self.transformer.config.in_channels, self._size[0] * self._size[1]

    def predict(self, module: Any, latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor) -> Tensor:
        text, mask = conditioning["text"][rows], conditioning.get("mask")
        return -module(
            hidden_states=latents.unflatten(2, self._size).to(text.dtype),
            timestep=torch.full((1,), 1.0 - t, device=latents.device),
            text=text,
            mask=None if mask is None else mask[rows],
        ).flatten(2)

    def guided(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """`c + scale (c - u)`: a scale of 0 is none."""
        return conditional + self._guidance.scale * (conditional - unconditional)

    def _unpacked(self, latents: Tensor, vae: Any) -> Tensor:
        return latents.unflatten(2, self._size) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
