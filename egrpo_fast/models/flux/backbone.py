"""A FLUX pipeline taken apart into what training needs: text in, velocity, pictures out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from egrpo_fast.config import Config
from egrpo_fast.models.flux.folder import LATENT_PATCH, check_folder, load_transformer, load_vae, resolve
from egrpo_fast.models.flux.text import Conditioning, FluxTextEncoder


class Text(Protocol):
    """What turns prompts into what the transformer reads: the text encoders, or a cache of what they gave."""

    def encode(self, prompts: Sequence[str]) -> Conditioning: ...


class FluxBackbone:
    """A FLUX pipeline taken apart into what training needs.

    height, width: of the pictures, in pixels. guidance: for a transformer with guidance embedding, ignored by others.
    decode_batch: pictures that `decode` takes at a time. VAE and text encoders are whole, frozen and on the device.
    """

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        vae: AutoencoderKL,
        text: Text,
        height: int,
        width: int,
        guidance: float,
        decode_batch: int,
    ) -> None:
        self.transformer, self._text = transformer, text
        self._vae = vae.requires_grad_(False).eval()
        self._tiny: AutoencoderTiny | None = None
        self.guidance, self.height, self.width, self.decode_batch = guidance, height, width, decode_batch
        self._scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._rows, self._columns = (size // (self._scale_factor * LATENT_PATCH) for size in (height, width))
        self._image_ids = FluxPipeline._prepare_latent_image_ids(
            1, self._rows, self._columns, vae.device, torch.float32
        )

    @classmethod
    def of(
        cls, config: Config, folder: Path, transformer: FluxTransformer2DModel, text: Text, device: torch.device
    ) -> "FluxBackbone":
        """A run's own, around its transformer: the pipeline folder's VAE, and the decoder of its tail."""
        model = config.model
        vae = load_vae(folder, getattr(torch, model.dtype), device)
        if model.vae_tiling:  # tile by tile, where a picture is larger than the VAE's own tile size
            vae.enable_tiling()
        backbone = cls(transformer, vae, text, model.height, model.width, model.guidance, model.decode_batch)
        if config.tail.decoder is not None:
            backbone.use_tiny_decoder(config.tail.decoder)
        return backbone

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        height: int,
        width: int,
        guidance: float = 3.5,
        max_sequence_length: int = 512,
        decode_batch: int = 32,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        lora: str | None = None,
    ) -> "FluxBackbone":
        """Any diffusers FLUX folder or hub id, whole, on one device. ValueError where it cannot be loaded.

        lora: a LoRA file or its folder, whose adapters are added to the transformer's weights.
        """
        folder = resolve(path)
        check_folder(str(folder), height, width)
        text = FluxTextEncoder.from_pretrained(str(folder), max_sequence_length, dtype, device)
        transformer = load_transformer(folder, dtype, device, lora)
        vae = load_vae(folder, dtype, device)
        return cls(transformer, vae, text, height, width, guidance, decode_batch)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(tokens, channels) of one packed picture."""
        return self._rows * self._columns, self.transformer.config.in_channels

    @property
    def device(self) -> torch.device:
        return self._vae.device

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """T5 token embeddings and CLIP's pooled embedding of every prompt."""
        return self._text.encode(prompts)

    def velocity(
        self, module: Callable[..., tuple[Tensor]], latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor
    ) -> Tensor:
        """The model's velocity `v = x_1 - x_0` at time t in [0, 1].

        module: the transformer, or the engine that wraps it. latents [R, L, C]; rows int64 [R]: prompt of each row.
        Returns [R, L, C] in the model's dtype.
        """
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
            guidance=torch.full((count,), self.guidance, device=latents.device) if guided else None,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]

    def use_tiny_decoder(self, folder: str) -> None:
        """Have `decode` with `tiny` use diffusers' AutoencoderTiny in a folder, such as TAEF1. ValueError."""
        try:
            tiny = AutoencoderTiny.from_pretrained(folder, torch_dtype=self._vae.dtype)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"tail.decoder: {folder} could not be loaded: {' '.join(str(error).split())}") from None
        self._tiny = tiny.requires_grad_(False).eval().to(self._vae.device)

    @torch.no_grad()
    def decode(self, latents: Tensor, tiny: bool = False) -> Tensor:
        """Pictures [B, 3, H, W], float32 in [0, 1], of packed latents [B, L, C]; tiny: by that decoder, where given."""
        vae = self._tiny if tiny and self._tiny is not None else self._vae
        pictures = []
        for chunk in latents.split(self.decode_batch):
            unpacked = FluxPipeline._unpack_latents(chunk, self.height, self.width, self._scale_factor)
            scaled = unpacked / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            pictures.append(vae.decode(scaled.to(vae.dtype), return_dict=False)[0])
        return torch.cat(pictures).float().div(2).add(0.5).clamp(0, 1)
