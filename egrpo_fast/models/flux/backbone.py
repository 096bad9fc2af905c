"""FLUX.1 taken apart into what training needs: text in, velocity, images out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from egrpo_fast.config import Model
from egrpo_fast.files import read_json
from egrpo_fast.models.fingerprint import part_identity
from egrpo_fast.models.flux.compiled import CompiledFlux
from egrpo_fast.models.flux.text import (
    CachedText,
    Conditioning,
    FluxTextEncoder,
    encoder_fingerprint,
    open_text,
    tell_truncated,
)
from egrpo_fast.models.protocol import Backbone
from egrpo_fast.models.vae import load_tiny_decoder, load_vae, scale_factor

LATENT_PATCH = 2
"""FLUX packs 2 x 2 latent pixels into one token."""


class Text(Protocol):
    """What turns prompts into what the transformer reads: the text encoders, or a cache of what they gave."""

    def encode(self, prompts: Sequence[str]) -> Conditioning: ...


class FluxBackbone(Backbone):
    """FLUX.1-dev, -schnell and their kin. `model.guidance` is for transformers that embed it, others ignore it."""

    pipeline, transformer_class = FluxPipeline, FluxTransformer2DModel
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")

    @classmethod
    def check(cls, folder: Path, height: int, width: int) -> None:
        factor = LATENT_PATCH * scale_factor(read_json(folder / "vae" / "config.json"))
        for name, size in (("height", height), ("width", width)):
            if size % factor:
                raise ValueError(f"model.{name}: {size} is not a multiple of {factor}")

    @classmethod
    def fingerprints(cls, folder: Path) -> dict[str, str]:
        return {"vae": part_identity("model.path", folder / "vae"), "text encoders": encoder_fingerprint(folder)}

    @classmethod
    def blocks(cls, transformer: FluxTransformer2DModel) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    @classmethod
    def compiled(cls, transformer: FluxTransformer2DModel) -> CompiledFlux:
        return CompiledFlux.of(transformer)

    def __init__(
        self, transformer: Any, vae: AutoencoderKL, text: Text, height: int, width: int, guidance: float,
        decode_batch: int,
    ) -> None:  # fmt: skip
        self.transformer, self._vae, self._text, self.decode_batch = transformer, vae, text, decode_batch
        self.height, self.width, self._guidance = height, width, guidance
        self._tiny: AutoencoderTiny | None = None
        self._scale_factor = scale_factor(vae.config)
        rows, columns = (size // (self._scale_factor * LATENT_PATCH) for size in (height, width))
        self.latent_shape = rows * columns, transformer.config.in_channels
        self._image_ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, vae.device, torch.float32)

    @classmethod
    def load(
        cls, transformer: Any, folder: Path, model: Model, device: torch.device, embeddings: str | None = None
    ) -> "FluxBackbone":
        text = open_text(model, embeddings, folder, device)
        vae = load_vae(folder, getattr(torch, model.dtype), device)
        if model.vae_tiling:  # tile by tile, where an image is larger than the VAE's own tile size
            vae.enable_tiling()
        return cls(transformer, vae, text, model.height, model.width, model.guidance, model.decode_batch)

    def check_prompts(self, prompts: Sequence[str], field: str, tell: bool = True) -> None:
        if isinstance(self._text, CachedText):
            self._text.require(prompts, field)
        elif tell and isinstance(self._text, FluxTextEncoder):
            tell_truncated(self._text, prompts, field)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """T5's token embeddings and CLIP's pooled embedding of every prompt."""
        return self._text.encode(prompts)

    def velocity(self, module: Any, latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor) -> Tensor:
        text = conditioning.t5[rows]
        # Time, guidance and pooled text modulate every block: where all rows have the same, it is computed once.
        alike = len(conditioning.pooled) == 1
        pooled = conditioning.pooled if alike else conditioning.pooled[rows]
        count = len(pooled)
        dtype = text.dtype
        guided = self.transformer.config.guidance_embeds
        return module(
            hidden_states=latents.to(dtype),
            # As the pipeline passes it: rounded to the model's dtype on the scale of 1,000, not of 1.
            timestep=torch.full((count,), t * 1000, dtype=dtype, device=latents.device) / 1000,
            guidance=torch.full((count,), self._guidance, device=latents.device) if guided else None,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]

    def use_tiny_decoder(self, folder: str) -> None:
        self._tiny = load_tiny_decoder(folder, self._vae)

    @torch.no_grad()
    def decode(self, latents: Tensor, tiny: bool = False) -> Tensor:
        vae = self._tiny if tiny and self._tiny is not None else self._vae
        images = []
        for chunk in latents.split(self.decode_batch):
            unpacked = FluxPipeline._unpack_latents(chunk, self.height, self.width, self._scale_factor)
            scaled = unpacked / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            images.append(vae.decode(scaled.to(vae.dtype), return_dict=False)[0])
        return torch.cat(images).float().div(2).add(0.5).clamp(0, 1)
