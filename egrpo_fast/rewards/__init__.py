"""Rewards: pictures and prompts to scores. One file per reward; this one finds them and checks what they return.

A reward is a callable `score(images [B, 3, H, W] float in [0, 1], prompts) -> [B]`, on the pictures' device. It may
have a static `check(prompts, height, width)` that raises ValueError for prompts or pictures which it cannot judge.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Reward = Callable[[Tensor, Sequence[str]], Tensor]

REGISTRY = {
    "clip": "egrpo_fast.rewards.clip:ClipScore",
    "shapes_soft": "egrpo_fast.rewards.shapes:ShapesSoft",
    "shapes_strict": "egrpo_fast.rewards.shapes:ShapesStrict",
}
"""Name in a recipe -> `module:class`; the class takes the recipe's options and `device`."""


def _find(name: str) -> Any:
    if name not in REGISTRY:
        raise ValueError(f"rewards: no reward {name!r}; there are: {', '.join(REGISTRY)}")
    module, _, attribute = REGISTRY[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ValueError(f"rewards.{name}: {error.name} is not installed; pip install 'egrpo_fast[rewards]'") from None


def check_reward(name: str, options: Mapping[str, Any], prompts: Sequence[str], height: int, width: int) -> None:
    """ValueError, before any weight is read, where a recipe's reward cannot be made or cannot judge this run."""
    reward = _find(name)
    try:
        inspect.signature(reward).bind(**options, device="cpu")
        if check := getattr(reward, "check", None):
            check(prompts, height, width)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rewards.{name}: {error}") from None


def make_reward(name: str, options: Mapping[str, Any], device: torch.device | str = "cpu") -> Reward:
    """The reward a recipe names. ValueError names what is wrong with it."""
    reward = _find(name)
    try:
        return reward(**options, device=device)
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"rewards.{name}: {' '.join(str(error).split())}") from error


def score(name: str, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """`[B]` float32 scores, checked: a reward that returns the wrong shape or a number that is none stops the run."""
    scores = reward(images, prompts)
    if scores.shape != (len(images),):
        raise ValueError(f"rewards.{name}: scores of shape {tuple(scores.shape)} for {len(images)} pictures")
    wrong = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"rewards.{name}: not finite for {len(wrong)} pictures, the first of {prompts[wrong[0]]!r}")
    return scores.float()
