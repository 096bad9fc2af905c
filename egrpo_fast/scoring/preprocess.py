"""Images, on their device, to what a vision model reads: antialiased bicubic resize, crop or pad, normalise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's CLIP, and of every model here that descends from it."""
ResizeMode = Literal["shortest", "longest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class Preprocess:
    """`(fit(eight_bit(images)) - mean) / std`: [B, 3, H, W] in [0, 1], any float dtype -> [B, 3, size, size] float32.

    mode: 'shortest' scales the shorter side to `size` and crops the centre; 'longest' scales the longer side and pads
    with black; 'squash' ignores the aspect. resize: 'pil' is PIL's, one pass along each side, each rounded and cut to
    8 bits; 'float' is one that never rounds, nor cuts what overshoots at edges, as torchvision's of float tensors.
    crop: where half a pixel goes that the centre is off by, to the even side as torchvision's, or 'floor' as
    transformers'.

    Images are first rounded to 8 bits: a score is of the image as it would be saved, and the originals, which read
    files, give the same. Against PIL itself: at most 2 steps of 1/255 where a rounding falls the other way, mean 0.02.
    """

    size: int
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    resize: Literal["pil", "float"] = "pil"
    crop: Literal["even", "floor"] = "even"

    def __call__(self, images: Tensor) -> Tensor:
        size = self.size
        height, width = self._target(*images.shape[-2:])
        images = _eight_bit(images.float())
        # PIL's order: along the rows first. The float resize is separable too, so both are this.
        for side, target in ((-1, (images.shape[-2], width)), (-2, (height, width))):
            if images.shape[side] != target[side]:
                images = F.interpolate(images, target, mode=self.interpolation, antialias=True)
                if self.resize == "pil":
                    images = _eight_bit(images)
        if self.mode == "longest":
            top, left = (size - height) // 2, (size - width) // 2
            images = F.pad(images, (left, size - width - left, top, size - height - top))
        else:
            whole = math.floor if self.crop == "floor" else round
            top, left = whole((height - size) / 2), whole((width - size) / 2)
            images = images[..., top : top + size, left : left + size]
        mean, std = (images.new_tensor(value).reshape(3, 1, 1) for value in (self.mean, self.std))
        return (images - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """Size after the resize, rounded as the originals round: torchvision cuts, `hpsv2` rounds."""
        size = self.size
        if self.mode == "squash":
            return size, size
        if self.mode == "longest":
            scale = size / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        return (size, int(size * width / height)) if height <= width else (int(size * height / width), size)


def _eight_bit(images: Tensor) -> Tensor:
    return images.mul(255).round().clamp(0, 255).div(255)


def check_images(images: Tensor, prompts: Sequence[str]) -> None:
    """ValueError where these are not images [B, 3, H, W] of floats, or not one for each prompt."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)}, expected [B, 3, H, W]")
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype}, expected floats in [0, 1]")
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts")


def unfit_images(images: Tensor) -> Tensor:
    """bool [B]: images with a value that is not a number in [0, 1]."""
    low, high = torch.aminmax(images.flatten(1), dim=1)
    return ~((low >= 0) & (high <= 1))  # a NaN fails both
