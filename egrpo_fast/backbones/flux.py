"""FLUX, the only room that knows diffusers' FLUX: load, encode, velocity, decode, save."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

LATENT_PATCH = 2
"""FLUX packs 2 x 2 latent pixels into one token."""


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts. t5: [P, tokens, width]; pooled: CLIP's [P, width]."""

    t5: Tensor
    pooled: Tensor


def check_folder(path: str, height: int, width: int) -> None:
    """ValueError, before any weight is read, where a local folder is no FLUX pipeline or the picture size does not fit.

    A path that is no local folder is taken for a hub id and left to diffusers.
    """
    folder = Path(path)
    if not folder.exists():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return
        raise ValueError(f"model.path: no folder {path}")
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"model.path: {path} has no model_index.json; a diffusers FLUX pipeline folder is expected")
    try:
        components = json.loads(index.read_text())
        blocks = json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model.path: {path} cannot be read as a FLUX pipeline: {error!r}") from None
    found = components.get("_class_name") if isinstance(components, dict) else type(components).__name__
    if found != "FluxPipeline":
        raise ValueError(f"model.path: {path} holds a {found}; FluxPipeline is expected")
    missing = [name for name in ("transformer", "text_encoder", "text_encoder_2") if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"model.path: {path} lacks {', '.join(missing)}")
    factor = LATENT_PATCH * 2 ** (len(blocks) - 1)
    for name, size in (("height", height), ("width", width)):
        if size % factor:
            raise ValueError(f"model.{name}: {size} is not a multiple of {factor}")


class FluxBackbone:
    """A FLUX pipeline taken apart into what training needs.

    height, width: of the pictures, in pixels. guidance: for a transformer with guidance embedding, ignored by others.
    decode_batch: pictures that `decode` takes at a time. The transformer is left where it was loaded, for the engine to
    place and shard; VAE and text encoders stay whole and frozen on the device.
    """

    def __init__(
        self,
        pipeline: FluxPipeline,
        height: int,
        width: int,
        guidance: float,
        max_sequence_length: int,
        decode_batch: int,
    ) -> None:
        self._pipeline = pipeline
        self.guidance, self.max_sequence_length = guidance, max_sequence_length
        self.height, self.width, self.decode_batch = height, width, decode_batch
        self._rows, self._columns = (size // (pipeline.vae_scale_factor * LATENT_PATCH) for size in (height, width))
        for frozen in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            frozen.requires_grad_(False).eval()
        ids = pipeline._prepare_latent_image_ids(1, self._rows, self._columns, pipeline.vae.device, torch.float32)
        self._image_ids = ids

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
    ) -> "FluxBackbone":
        """Any diffusers FLUX folder or hub id. ValueError where it cannot be loaded."""
        check_folder(path, height, width)
        try:
            pipeline = FluxPipeline.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"model.path: {path} could not be loaded: {' '.join(str(error).split())}") from None
        for frozen in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            frozen.to(device)
        return cls(pipeline, height, width, guidance, max_sequence_length, decode_batch)

    @property
    def transformer(self) -> FluxTransformer2DModel:
        """The trained module, as the pipeline holds it."""
        return self._pipeline.transformer

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(tokens, channels) of one packed picture."""
        return self._rows * self._columns, self.transformer.config.in_channels

    @property
    def device(self) -> torch.device:
        return self._pipeline.vae.device

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """T5 token embeddings and CLIP's pooled embedding of every prompt."""
        t5, pooled, _ = self._pipeline.encode_prompt(
            list(prompts), None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return Conditioning(t5, pooled)

    def velocity(
        self, module: Callable[..., tuple[Tensor]], latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor
    ) -> Tensor:
        """The model's velocity `v = x_1 - x_0` at time t in [0, 1].

        module: the transformer, or the engine that wraps it. latents [R, L, C]; rows int64 [R]: prompt of each row.
        Returns [R, L, C] in the model's dtype.
        """
        count = len(latents)
        text = conditioning.t5[rows]
        dtype = text.dtype
        guided = self.transformer.config.guidance_embeds
        return module(
            hidden_states=latents.to(dtype),
            # As the pipeline passes it: rounded to the model's dtype on the scale of 1,000, not of 1.
            timestep=torch.full((count,), t * 1000, dtype=dtype, device=latents.device) / 1000,
            guidance=torch.full((count,), self.guidance, device=latents.device) if guided else None,
            pooled_projections=conditioning.pooled[rows],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]

    def tile_decoding(self) -> None:
        """Have `decode` work tile by tile where a picture is larger than the VAE's own tile size."""
        self._pipeline.vae.enable_tiling()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], float32 in [0, 1], of packed latents [B, L, C]."""
        vae = self._pipeline.vae
        pictures = []
        for chunk in latents.split(self.decode_batch):
            unpacked = self._pipeline._unpack_latents(chunk, self.height, self.width, self._pipeline.vae_scale_factor)
            scaled = unpacked / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            pictures.append(vae.decode(scaled.to(vae.dtype), return_dict=False)[0])
        return torch.cat(pictures).float().div(2).add(0.5).clamp(0, 1)

    def save(self, folder: str | Path, state_dict: dict[str, Tensor]) -> None:
        """The whole pipeline as a diffusers folder, with these weights in the transformer's place."""
        with torch.device("meta"):
            transformer = FluxTransformer2DModel.from_config(self.transformer.config)
        transformer.load_state_dict(state_dict, assign=True)
        components = {**self._pipeline.components, "transformer": transformer}
        FluxPipeline(**components).save_pretrained(folder)
