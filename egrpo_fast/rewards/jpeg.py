"""JPEG compressibility: a reward without weights, whose optimum everyone can see (Black et al., 2023)."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class JpegCompressibility:
    """`-kilobytes(JPEG(image))`, below 0: smooth images score high. For smoke runs; prompts are not read.

    quality: of the JPEG, 1 to 95. incompressible: the opposite sign, which rewards noise. libjpeg has no GPU version
    that gives the same bytes, so the images, and they alone, go to the CPU.
    """

    parameters = staticmethod(lambda **options: 0)

    def __init__(self, quality: int = 95, incompressible: bool = False, device: torch.device | str = "cpu") -> None:
        if not 1 <= quality <= 95:
            raise ValueError(f"quality: {quality}, allowed: 1 to 95")
        self._quality, self._sign = quality, 1.0 if incompressible else -1.0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        eight_bit = images.float().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([self._sign * self._kilobytes(image) for image in eight_bit], device=images.device)

    def _kilobytes(self, image: np.ndarray) -> float:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=self._quality)
        return buffer.tell() / 1000


REWARD = JpegCompressibility
