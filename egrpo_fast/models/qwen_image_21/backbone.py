"""Qwen-Image 2.1 taken apart into what training needs: text in, velocity, images out; without condition images.

Latents are packed from the start: noise is drawn as [tokens, channels], and only `decode` unpacks them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Rope
from torch import Tensor, nn

from egrpo_fast.config import ModelConfig
from egrpo_fast.files import read_json
from egrpo_fast.models.protocol import ActivationUnits, Backbone, GuidanceKind
from egrpo_fast.models.qwen_image_21.text import QwenImage21TextEncoder
from egrpo_fast.models.qwen_image_21.transformer import Attention, QwenImage21Transformer2DModel
from egrpo_fast.models.scheduler import dynamic_mu, grid, scheduler_config, uniform
from egrpo_fast.models.text import Conditioning

MULTIPLE = 32
"""Of an image's sides in pixels. A token is 16 x 16 of them, and the pipeline takes an even number of tokens a side."""


class QwenImage21Backbone(Backbone):
    """Qwen-Image 2.1 and its Turbo. They are made to be sampled without guidance, which is therefore the default."""

    pipeline, transformer_class = QwenImage21Pipeline, QwenImage21Transformer2DModel
    text_encoder, decoder_class = QwenImage21TextEncoder, AutoencoderKLQwenImage21
    pixels_per_latent = 1
    guidance_argument = "true_cfg_scale"
    input_sizes = ("in_channels", "context_in_dim")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    units = ActivationUnits(
        forward={2: 16.0, 4: 15.9},
        kept={2: {"QwenImage21TransformerBlock": 35.3}, 4: {"QwenImage21TransformerBlock": 31.3}},
        kept_per_head=16, backward=6.1, decode=21.9,
    )  # fmt: skip

    @classmethod
    def check(cls, folder: Path, model: ModelConfig) -> None:
        for name, size in (("height", model.height), ("width", model.width)):
            if size % MULTIPLE:
                raise ValueError(f"model.{name}: {size} is not a multiple of {MULTIPLE}")
        super().check(folder, model)
        if not read_json(folder / "transformer" / "config.json").get("causal_condition", True):
            raise ValueError(f"model.path: the transformer of {folder} has causal_condition false; true is expected")

    @classmethod
    def guidance_kind(cls, folder: Path) -> GuidanceKind:
        return "classifier_free"

    @classmethod
    def times(cls, folder: Path, model: ModelConfig, num_steps: int) -> Sequence[float]:
        config, sigmas = scheduler_config(folder), read_json(folder / "model_index.json").get("sample_sigmas")
        if sigmas is not None and len(sigmas) != num_steps:
            raise ValueError(
                f"schedule.shift: auto is the grid of {len(sigmas)} steps in {folder / 'model_index.json'}, not of "
                f"{num_steps}; give schedule.num_steps and evaluation.num_inference_steps that number, or a shift"
            )
        return grid(config, num_steps, dynamic_mu(config, cls.tokens(folder, model)), sigmas or uniform(num_steps))

    @classmethod
    def mended(cls, transformer: QwenImage21Transformer2DModel) -> QwenImage21Transformer2DModel:
        axes = list(transformer.config.axes_dims_rope)
        transformer.pos_embed = QwenImage21Rope(theta=10000, axes_dim=axes)
        # Its table would be rounded with the weights, which the pipeline's is not. `forward` does without.
        transformer.time_text_embed.time_proj = nn.Identity()
        for block in transformer.transformer_blocks:
            block.attn.set_processor(Attention())
        return transformer

    @classmethod
    def blocks(cls, transformer: QwenImage21Transformer2DModel) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.latent_shape = self._rows * self._columns, self.transformer.config.in_channels

    def predict(self, module: Any, latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor) -> Tensor:
        text, mask = conditioning["text"][rows], conditioning.get("mask")
        return module(
            hidden_states=latents.to(text.dtype),
            # Rounded to the model's dtype on the scale of 1,000, as in the pipeline.
            timestep=torch.full((1,), t * 1000, dtype=text.dtype, device=latents.device) / 1000,
            text=text,
            size=(self._rows, self._columns),
            mask=None if mask is None else mask[rows],
        )

    def _unpacked(self, latents: Tensor, vae: Any) -> Tensor:
        unpacked = self.pipeline._unpack_latents(latents, self.height, self.width, self._scale_factor)
        mean, std = (
            unpacked.new_tensor(self._vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
        )
        return unpacked * std + mean
