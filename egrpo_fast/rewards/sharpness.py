"""How sharp images are: to be watched beside what is trained on, for hacked rewards often sharpen or blur."""

from collections.abc import Sequence

import torch
from torch import Tensor

KERNEL = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
LUMA = (0.299, 0.587, 0.114)


class Sharpness:
    """Variance of the Laplacian of the luma (Rec. 601) in [0, 1], over all pixels that have four neighbours.

    Prompts are not read.
    """

    parameters = staticmethod(lambda: 0)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._kernel = torch.tensor(KERNEL, device=device)[None, None]
        self._luma = torch.tensor(LUMA, device=device).view(1, 3, 1, 1)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        luma = (images.float() * self._luma).sum(1, keepdim=True)
        return torch.nn.functional.conv2d(luma, self._kernel).var((1, 2, 3), correction=0)


REWARD = Sharpness
