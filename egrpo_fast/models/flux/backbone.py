"""FLUX.1 taken apart into what training needs: text in, velocity, images out.

Latents are packed from the start: noise is drawn as [tokens, channels], and only `decode` unpacks them.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from egrpo_fast.config import ModelConfig
from egrpo_fast.files import read_json
from egrpo_fast.models.fingerprint import part_identity
from egrpo_fast.models.flux.compiled import CompiledFlux
from egrpo_fast.models.flux.text import FluxTextEncoder
from egrpo_fast.models.protocol import Activations, Backbone
from egrpo_fast.models.text import Conditioning, Text
from egrpo_fast.models.vae import decode_bytes, hollow_vae, load_tiny_decoder, load_vae, scale_factor

LATENT_PATCH = 2
"""FLUX packs 2 x 2 latent pixels into one token."""

# Activations, measured on a CPU, in units of tokens x width x bytes of the dtype (keys: 2 bfloat16, 4 float32): at the
# peak of a forward; kept for the backward by a double and by a single block, and in bytes by each of its heads and
# tokens; beyond what is kept, at the peak of a backward.
FORWARD = {2: 17.5, 4: 15.2}
KEPT = {2: {"FluxTransformerBlock": 29.0, "FluxSingleTransformerBlock": 25.0},
        4: {"FluxTransformerBlock": 25.0, "FluxSingleTransformerBlock": 21.0}}  # fmt: skip
KEPT_PER_HEAD = 4 * 4
BACKWARD = 8.5


class FluxBackbone(Backbone):
    """FLUX.1-dev, -schnell and their kin. `model.guidance_scale` is for transformers that embed it."""

    pipeline, transformer_class, text_encoder = FluxPipeline, FluxTransformer2DModel, FluxTextEncoder
    input_sizes = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    parts = ("transformer", "vae", *FluxTextEncoder.encoders, *FluxTextEncoder.tokenizers, "scheduler")

    @classmethod
    def check(cls, folder: Path, height: int, width: int) -> None:
        factor = LATENT_PATCH * scale_factor(read_json(folder / "vae" / "config.json"))
        for name, size in (("height", height), ("width", width)):
            if size % factor:
                raise ValueError(f"model.{name}: {size} is not a multiple of {factor}")

    @classmethod
    def fingerprints(cls, folder: Path) -> dict[str, str]:
        vae = part_identity("model.path", folder / "vae")
        return {"vae": vae, "text encoders": FluxTextEncoder.fingerprint(folder)}

    @classmethod
    def blocks(cls, transformer: FluxTransformer2DModel) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    @classmethod
    def compiled(cls, transformer: FluxTransformer2DModel) -> CompiledFlux:
        return CompiledFlux.of(transformer)

    @classmethod
    def load_decoder(cls, folder: Path, model: ModelConfig, device: torch.device) -> AutoencoderKL:
        vae = load_vae(folder, getattr(torch, model.dtype), device)
        if model.vae_tiling:  # tile by tile, where an image is larger than the VAE's own tile size
            vae.enable_tiling()
        return vae

    @classmethod
    def hollow_decoder(cls, folder: Path) -> AutoencoderKL:
        return hollow_vae(folder)

    @classmethod
    def frozen_bytes(cls, folder: Path, model: ModelConfig) -> dict[str, float]:
        vae = hollow_vae(folder).num_parameters() * getattr(torch, model.dtype).itemsize
        return {"VAE": vae, "text encoders": FluxTextEncoder.weight_bytes(folder, model)}

    def __init__(self, transformer: Any, decoder: AutoencoderKL, text: Text, model: ModelConfig) -> None:
        self.transformer, self._vae, self._text, self._guidance = transformer, decoder, text, model.guidance_scale
        self.height, self.width, self.decode_batch_size = model.height, model.width, model.decode_batch_size
        self._tiny: AutoencoderTiny | None = None
        self._scale_factor = scale_factor(decoder.config)
        rows, columns = (size // (self._scale_factor * LATENT_PATCH) for size in (self.height, self.width))
        self.latent_shape = rows * columns, transformer.config.in_channels
        self._image_ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, decoder.device, torch.float32)

    def activations(self, itemsize: int) -> Activations:
        heads, head_dim = (self.transformer.config.num_attention_heads, self.transformer.config.attention_head_dim)
        tokens = self.latent_shape[0] + self.encode([""])["t5"].shape[1]
        unit, per_head = tokens * heads * head_dim * itemsize, KEPT_PER_HEAD * tokens * heads
        blocks = (KEPT[itemsize][type(block).__name__] for block in self.blocks(self.transformer))
        return Activations(
            forward=FORWARD[itemsize] * unit, kept=tuple(units * unit + per_head for units in blocks),
            block_input=unit, backward=BACKWARD * unit,
            decode=decode_bytes(self._vae.config, self.height, self.width, itemsize),
        )  # fmt: skip

    def velocity(self, module: Any, latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor) -> Tensor:
        text = conditioning["t5"][rows]
        # Time, guidance and pooled text modulate every block: where all rows have the same, it is computed once.
        pooled = conditioning["pooled"]
        pooled = pooled if len(pooled) == 1 else pooled[rows]
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
        for chunk in latents.split(self.decode_batch_size):
            unpacked = FluxPipeline._unpack_latents(chunk, self.height, self.width, self._scale_factor)
            scaled = unpacked / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            images.append(vae.decode(scaled.to(vae.dtype), return_dict=False)[0])
        return torch.cat(images).float().div(2).add(0.5).clamp(0, 1)
