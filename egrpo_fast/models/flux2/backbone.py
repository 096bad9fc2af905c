"""FLUX.2 taken apart into what training needs: text in, velocity, images out.

Latents are packed from the start: noise is drawn as [tokens, channels], and only `decode` unpacks them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from egrpo_fast.config import ModelConfig
from egrpo_fast.files import read_json
from egrpo_fast.models.flux2.text import Flux2KleinTextEncoder, Flux2TextEncoder
from egrpo_fast.models.protocol import ActivationUnits, Backbone, GuidanceKind
from egrpo_fast.models.scheduler import grid, scheduler_config, uniform
from egrpo_fast.models.text import Conditioning, TextEncoder


class Flux2Backbone(Backbone):
    """FLUX.2-dev."""

    pipeline, transformer_class, decoder_class = Flux2Pipeline, Flux2Transformer2DModel, AutoencoderKLFlux2
    text_encoder: ClassVar[type[TextEncoder]] = Flux2TextEncoder
    input_sizes = ("in_channels", "joint_attention_dim")
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj"
    )  # fmt: skip
    units = ActivationUnits(
        forward={2: 22.6, 4: 22.3},
        kept={2: {"Flux2TransformerBlock": 33.0, "Flux2SingleTransformerBlock": 30.9},
              4: {"Flux2TransformerBlock": 29.0, "Flux2SingleTransformerBlock": 25.0}},
        kept_per_head=16, backward=16.0,
    )  # fmt: skip

    @classmethod
    def guidance_kind(cls, folder: Path) -> GuidanceKind:
        return "embedded"

    @classmethod
    def times(cls, folder: Path, model: ModelConfig, num_steps: int) -> Sequence[float]:
        mu = compute_empirical_mu(cls.tokens(folder, model), num_steps)
        return grid(scheduler_config(folder), num_steps, mu, uniform(num_steps))

    @classmethod
    def blocks(cls, transformer: Flux2Transformer2DModel) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.latent_shape = self._rows * self._columns, self.transformer.config.in_channels
        device = self._vae.device
        self._image_ids = self.pipeline._prepare_latent_ids(torch.empty(1, 1, self._rows, self._columns))[0].to(device)

    def predict(self, module: Any, latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor) -> Tensor:
        text = conditioning["tokens"][rows]
        dtype, device = text.dtype, latents.device
        text_ids = torch.zeros(text.shape[1], 4, device=device)
        text_ids[:, 3] = torch.arange(text.shape[1], device=device)
        embeds = self.transformer.config.guidance_embeds
        return module(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=text,
            # Of one row, for all have the same; rounded to the model's dtype on the scale of 1,000, as in the pipeline.
            timestep=torch.full((1,), t * 1000, dtype=dtype, device=device) / 1000,
            guidance=torch.full((1,), self._guidance.scale, device=device) if embeds else None,
            txt_ids=text_ids,
            img_ids=self._image_ids,
            return_dict=False,
        )[0]

    def _unpacked(self, latents: Tensor, vae: Any) -> Tensor:
        norm = self._vae.bn
        spread = (norm.running_var + self._vae.config.batch_norm_eps).sqrt().to(latents.dtype)
        scaled = latents * spread + norm.running_mean.to(latents.dtype)
        return self.pipeline._unpatchify_latents(scaled.transpose(1, 2).unflatten(2, (self._rows, self._columns)))


class Flux2KleinBackbone(Flux2Backbone):
    """FLUX.2-klein: the distilled models, and the base models with classifier-free guidance."""

    pipeline, text_encoder = Flux2KleinPipeline, Flux2KleinTextEncoder

    @classmethod
    def guidance_kind(cls, folder: Path) -> GuidanceKind:
        return "none" if read_json(folder / "model_index.json").get("is_distilled") else "classifier_free"
