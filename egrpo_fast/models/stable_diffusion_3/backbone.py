"""Stable Diffusion 3 and 3.5 taken apart into what training needs: text in, velocity, images out.

Latents keep their channels apart: noise is drawn as [channels, latent pixels], and the transformer makes the tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from egrpo_fast.config import ModelConfig
from egrpo_fast.files import read_json
from egrpo_fast.models.protocol import ActivationUnits, Backbone, GuidanceKind
from egrpo_fast.models.scheduler import dynamic_mu, grid, scheduler_config
from egrpo_fast.models.stable_diffusion_3.text import StableDiffusion3TextEncoder
from egrpo_fast.models.text import Conditioning


class StableDiffusion3Backbone(Backbone):
    """Stable Diffusion 3 medium, 3.5 medium and large."""

    pipeline, transformer_class = StableDiffusion3Pipeline, SD3Transformer2DModel
    text_encoder = StableDiffusion3TextEncoder
    input_sizes = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    units = ActivationUnits(
        forward={2: 12.0, 4: 10.8}, kept={2: {"plain": 29.0, "dual": 38.2}, 4: {"plain": 25.0, "dual": 31.6}},
        kept_per_head=16, backward=2.3,
    )  # fmt: skip

    @classmethod
    def check(cls, folder: Path, model: ModelConfig) -> None:
        super().check(folder, model)
        largest = 16 * read_json(folder / "transformer" / "config.json")["pos_embed_max_size"]
        for name, size in (("height", model.height), ("width", model.width)):
            if size > largest:
                raise ValueError(f"model.{name}: {size}; the model in {folder} knows positions up to {largest}")

    @classmethod
    def guidance_kind(cls, folder: Path) -> GuidanceKind:
        return "classifier_free"

    @classmethod
    def times(cls, folder: Path, model: ModelConfig, num_steps: int) -> Sequence[float]:
        config = scheduler_config(folder)
        dynamic = config.get("use_dynamic_shifting")
        return grid(config, num_steps, dynamic_mu(config, cls.tokens(folder, model)) if dynamic else None, None)

    @classmethod
    def blocks(cls, transformer: SD3Transformer2DModel) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    @classmethod
    def kind(cls, block: Any) -> str:
        return "dual" if block.use_dual_attention else "plain"

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._size = self.height // self._scale_factor, self.width // self._scale_factor
        self.latent_shape = self.transformer.config.in_channels, self._size[0] * self._size[1]

    def predict(self, module: Any, latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor) -> Tensor:
        text, pooled = conditioning["tokens"][rows], conditioning["pooled"]
        # Time and pooled text modulate every block: where all rows have the same, it is computed once.
        pooled = pooled if len(pooled) == 1 else pooled[rows]
        return module(
            hidden_states=latents.unflatten(2, self._size).to(text.dtype),
            timestep=torch.full((len(pooled),), t * 1000, device=latents.device),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0].flatten(2)

    def _unpacked(self, latents: Tensor, vae: Any) -> Tensor:
        return latents.unflatten(2, self._size) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
