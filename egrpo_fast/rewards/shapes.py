"""The Shapes world's programmatic judges as rewards."""

from collections.abc import Sequence

import torch
from torch import Tensor

from egrpo_fast.shapes import checker
from egrpo_fast.shapes.world import SIDE, parse


def check(prompts: Sequence[str], height: int, width: int) -> None:
    """ValueError where a run's prompts or pictures are not of the Shapes world."""
    if (height, width) != (SIDE, SIDE):
        raise ValueError(f"judges pictures of {SIDE}x{SIDE} pixels, not {height}x{width}")
    for prompt in prompts:
        parse(prompt)


class ShapesSoft:
    """Share of the caption that the picture shows, graded, in [0, 1]: what the embedded recipe trains on."""

    check = staticmethod(check)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return checker.soft_score(images, list(prompts))


class ShapesStrict:
    """1 where everything in the caption is right and nothing else is there, else 0."""

    check = staticmethod(check)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return checker.strict(images, list(prompts)).float()
