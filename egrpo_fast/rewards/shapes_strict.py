"""Whether an image of the Shapes world shows its caption, and nothing else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from egrpo_fast.shapes import checker


class ShapesStrict:
    """1 where everything in the caption is right and nothing else is there, else 0."""

    check = staticmethod(checker.check)
    parameters = staticmethod(lambda: 0)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return checker.strict(images, list(prompts)).float()


REWARD = ShapesStrict
