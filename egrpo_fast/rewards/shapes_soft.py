"""How much of its caption an image of the Shapes world shows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from egrpo_fast.shapes import checker


class ShapesSoft:
    """Share of the caption that the image shows, graded, in [0, 1]: what the embedded recipe trains on."""

    check = staticmethod(checker.check)
    parameters = staticmethod(lambda: 0)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return checker.soft_score(images, list(prompts))


REWARD = ShapesSoft
