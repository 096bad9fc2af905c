"""Qwen-Image taken apart into what training needs: text in, velocity, images out.

Latents are packed from the start: noise is drawn as [tokens, channels], and only `decode` unpacks them.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor, nn

from egrpo_fast.models.protocol import ActivationUnits, Backbone, GuidanceKind
from egrpo_fast.models.qwen_image.text import QwenImageTextEncoder
from egrpo_fast.models.text import Conditioning


class QwenImageBackbone(Backbone):
    """Qwen-Image. Guidance keeps the length of every token's velocity as it is for the prompt."""

    pipeline, transformer_class = QwenImagePipeline, QwenImageTransformer2DModel
    text_encoder, decoder_class = QwenImageTextEncoder, AutoencoderKLQwenImage
    guidance_argument = "true_cfg_scale"
    input_sizes = ("in_channels", "joint_attention_dim")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    units = ActivationUnits(
        forward={2: 17.9, 4: 15.6},
        kept={2: {"QwenImageTransformerBlock": 29.0}, 4: {"QwenImageTransformerBlock": 25.0}},
        kept_per_head=16, backward=7.0, decode=18.1,
    )  # fmt: skip

    @classmethod
    def guidance_kind(cls, folder: Path) -> GuidanceKind:
        return "classifier_free"

    @classmethod
    def mended(cls, transformer: QwenImageTransformer2DModel) -> QwenImageTransformer2DModel:
        axes = list(transformer.config.axes_dims_rope)
        transformer.pos_embed = QwenEmbedRope(theta=10000, axes_dim=axes, scale_rope=True)
        return transformer

    @classmethod
    def blocks(cls, transformer: QwenImageTransformer2DModel) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.latent_shape = self._rows * self._columns, self.transformer.config.in_channels

    def predict(self, module: Any, latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor) -> Tensor:
        text = conditioning["text"][rows]
        return module(
            hidden_states=latents.to(text.dtype),
            # Of one row, for all have the same; rounded to the model's dtype on the scale of 1,000, as in the pipeline.
            timestep=torch.full((1,), t * 1000, dtype=text.dtype, device=latents.device) / 1000,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=conditioning["mask"][rows] if "mask" in conditioning else None,
            img_shapes=[[(1, self._rows, self._columns)]] * len(latents),
            return_dict=False,
        )[0]

    def guided(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        v = super().guided(conditional, unconditional)
        return v * (conditional.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True))

    def _unpacked(self, latents: Tensor, vae: Any) -> Tensor:
        unpacked = self.pipeline._unpack_latents(latents, self.height, self.width, self._scale_factor)
        mean, std = (
            unpacked.new_tensor(self._vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
        )
        return unpacked * std + mean
