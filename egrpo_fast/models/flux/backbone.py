"""FLUX.1 taken apart into what training needs: text in, velocity, images out.

Latents are packed from the start: noise is drawn as [tokens, channels], and only `decode` unpacks them.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from egrpo_fast.files import read_json
from egrpo_fast.models.flux.compiled import CompiledFlux
from egrpo_fast.models.flux.text import FluxTextEncoder
from egrpo_fast.models.protocol import ActivationUnits, Backbone, GuidanceKind
from egrpo_fast.models.text import Conditioning


class FluxBackbone(Backbone):
    """FLUX.1-dev, -schnell and their kin."""

    pipeline, transformer_class, text_encoder = FluxPipeline, FluxTransformer2DModel, FluxTextEncoder
    input_sizes = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    evaluation_shift = 3.0  # the paper's, in training as in evaluation
    units = ActivationUnits(
        forward={2: 17.5, 4: 15.2},
        kept={2: {"FluxTransformerBlock": 29.0, "FluxSingleTransformerBlock": 25.0},
              4: {"FluxTransformerBlock": 25.0, "FluxSingleTransformerBlock": 21.0}},
        kept_per_head=16, backward=8.5,
    )  # fmt: skip

    @classmethod
    def guidance_kind(cls, folder: Path) -> GuidanceKind:
        return "embedded" if read_json(folder / "transformer" / "config.json").get("guidance_embeds") else "none"

    @classmethod
    def blocks(cls, transformer: FluxTransformer2DModel) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    @classmethod
    def compiled(cls, transformer: FluxTransformer2DModel) -> CompiledFlux:
        return CompiledFlux.of(transformer)

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.latent_shape = self._rows * self._columns, self.transformer.config.in_channels
        device = self._vae.device
        self._image_ids = FluxPipeline._prepare_latent_image_ids(1, self._rows, self._columns, device, torch.float32)

    def predict(self, module: Any, latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor) -> Tensor:
        text = conditioning["t5"][rows]
        # Time, guidance and pooled text modulate every block: where all rows have the same, it is computed once.
        pooled = conditioning["pooled"]
        pooled = pooled if len(pooled) == 1 else pooled[rows]
        count = len(pooled)
        dtype = text.dtype
        embeds = self.transformer.config.guidance_embeds
        return module(
            hidden_states=latents.to(dtype),
            # As the pipeline passes it: rounded to the model's dtype on the scale of 1,000, not of 1.
            timestep=torch.full((count,), t * 1000, dtype=dtype, device=latents.device) / 1000,
            guidance=torch.full((count,), self._guidance.scale, device=latents.device) if embeds else None,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]

    def _unpacked(self, latents: Tensor, vae: Any) -> Tensor:
        unpacked = FluxPipeline._unpack_latents(latents, self.height, self.width, self._scale_factor)
        return unpacked / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
