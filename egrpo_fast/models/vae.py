"""Image decoders by diffusers: a pipeline's AutoencoderKL, and the small AutoencoderTiny of a tail."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from egrpo_fast.files import read_json
from egrpo_fast.models.weight_files import WeightFiles


def scale_factor(config: Any) -> int:
    """Pixels of an image per latent, along a side, by the config of an image decoder. KeyError, TypeError."""
    if "temperal_downsample" in config:  # of a video
        return 2 ** len(config["temperal_downsample"])
    return 2 ** (len(config["block_out_channels"]) - 1)


def decoder_width(config: Any) -> int:
    """Channels of the block that works at an image's full size, by the config of an image decoder. KeyError."""
    if "base_dim" in config:  # of a video
        return config.get("decoder_base_dim") or config["base_dim"]
    channels = config["block_out_channels"]
    return channels[min(1, len(channels) - 1)]


def hollow_vae(folder: Path, kind: Any = AutoencoderKL) -> Any:
    """The image decoder of a pipeline folder, on the meta device. OSError, KeyError, TypeError: a bad config."""
    with torch.device("meta"):
        return kind.from_config(read_json(folder / "vae" / "config.json"))


def load_vae(folder: Path, kind: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The image decoder of a pipeline folder, of diffusers' class `kind`, frozen. ValueError: it cannot be loaded."""
    try:
        WeightFiles(folder / "vae")  # says which file is missing or truncated, as diffusers does not
        vae, report = kind.from_pretrained(
            folder / "vae", torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        if absent := sorted(report["missing_keys"]):
            raise ValueError(f"it lacks {len(absent)} weights, first {absent[0]}")
        return vae.requires_grad_(False).eval().to(device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"model.path: {folder / 'vae'} could not be loaded: {' '.join(str(error).split())}") from None


def check_tiny_decoder(folder: str, pipeline: Path) -> None:
    """ValueError, before any weight is read, where this is no tiny decoder of the pipeline's latents."""
    try:
        theirs, ours = (read_json(at / "config.json") for at in (Path(folder), pipeline / "vae"))
        WeightFiles(folder)
        if theirs["_class_name"] != "AutoencoderTiny":
            raise ValueError(f"it is a {theirs['_class_name']}; AutoencoderTiny is expected")
        factor = 2 ** (len(theirs["decoder_block_out_channels"]) - 1)
        for name, value, wanted in (
            ("latent channels", theirs["latent_channels"], ours["latent_channels"]),
            ("image pixels per latent", factor, scale_factor(ours)),
        ):
            if value != wanted:
                raise ValueError(f"{value} {name}, that of model.path has {wanted}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"tail.decoder: {folder} cannot be used: {' '.join(str(error).split())}") from None


def load_tiny_decoder(folder: str, like: AutoencoderKL) -> AutoencoderTiny:
    """diffusers' AutoencoderTiny in a folder, such as TAEF1, in the dtype and on the device of another. ValueError."""
    try:
        tiny = AutoencoderTiny.from_pretrained(folder, torch_dtype=like.dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"tail.decoder: {folder} could not be loaded: {' '.join(str(error).split())}") from None
    return tiny.requires_grad_(False).eval().to(like.device)
