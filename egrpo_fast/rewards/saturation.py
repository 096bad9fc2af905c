"""How colourful images are: to be watched beside what is trained on, for hacked rewards often oversaturate."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Saturation:
    """`mean over pixels (max - min) / max` of the three channels, 0 for black: the S of HSV, in [0, 1].

    Prompts are not read.
    """

    parameters = staticmethod(lambda: 0)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        low, high = images.float().aminmax(dim=1)
        return ((high - low) / high.clamp(min=1e-6)).mean((1, 2))


REWARD = Saturation
