"""Rewards: pictures and prompts to scores. One file per reward; this one finds them by name.

A reward is a callable `score(images [B, 3, H, W] float in [0, 1], prompts) -> [B]`, on the pictures' device. It may
have a static `check(prompts, height, width)` that raises ValueError for prompts or pictures which it cannot judge.
"""

import inspect
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch

from egrpo_fast.rewards.scoring import Reward, RewardError, fill_dropped, score, score_or_nan

__all__ = ["REGISTRY", "Reward", "RewardError", "check_reward", "fill_dropped", "make_reward", "score", "score_or_nan"]

REGISTRY = {
    "clip": "egrpo_fast.rewards.clip:ClipScore",
    "hps": "egrpo_fast.rewards.hps:HpsScore",
    "pick_score": "egrpo_fast.rewards.pick_score:PickScore",
    "image_reward": "egrpo_fast.rewards.image_reward:ImageReward",
    "jpeg": "egrpo_fast.rewards.jpeg:JpegCompressibility",
    "shapes_soft": "egrpo_fast.rewards.shapes:ShapesSoft",
    "shapes_strict": "egrpo_fast.rewards.shapes:ShapesStrict",
    "http": "egrpo_fast.rewards.http:HttpReward",
}
"""Name in a recipe -> `module:attribute`. A recipe may also name any such path itself, and tell two of a kind apart by
a label: `http/hps`, `http/pick`.

A class is made with the options and `device`. A function is the reward: called with pictures, prompts and the
options.
"""


def _find(name: str) -> Any:
    kind = name.partition("/")[0]
    module, colon, attribute = REGISTRY.get(kind, name).partition(":")
    if not colon:
        raise ValueError(f"rewards: no reward {name!r}; there are: {', '.join(REGISTRY)}, or any module:attribute")
    try:
        if kind not in REGISTRY and (here := os.getcwd()) not in sys.path:
            sys.path.append(here)  # a user's own file beside the command; last, so it shadows nothing
        reward = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        told = "it is neither in this folder nor on Python's path"
        if kind in REGISTRY:
            told = f"pip install 'egrpo_fast[{'http' if kind == 'http' else 'rewards'}]'"
        raise ValueError(f"rewards.{name}: {error.name} is not installed; {told}") from None
    except (AttributeError, ImportError) as error:
        raise ValueError(f"rewards.{name}: {error}") from None
    if not callable(reward):
        raise ValueError(f"rewards.{name}: {type(reward).__name__} is no class and no function")
    return reward


def check_reward(name: str, options: Mapping[str, Any], prompts: Sequence[str], height: int, width: int) -> None:
    """ValueError, before any weight is read, where a recipe's reward cannot be made or cannot judge this run."""
    reward = _find(name)
    try:
        if isinstance(reward, type):
            inspect.signature(reward).bind(**options, device="cpu")
        else:
            inspect.signature(reward).bind("images", "prompts", **options)
        if check := getattr(reward, "check", None):
            check(prompts, height, width)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rewards.{name}: {error}") from None


def make_reward(name: str, options: Mapping[str, Any], device: torch.device | str = "cpu") -> Reward:
    """The reward a recipe names. ValueError names what is wrong with it."""
    reward = _find(name)
    try:
        if not isinstance(reward, type):
            inspect.signature(reward).bind("images", "prompts", **options)
            return partial(reward, **options)
        return reward(**options, device=device)
    except pickle.UnpicklingError:
        # From libraries that read their own checkpoints, by torch's `weights_only`: refused, and not executed.
        raise ValueError(f"rewards.{name}: a checkpoint holds more than tensors, and is not executed") from None
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"rewards.{name}: {' '.join(str(error).split())}") from error
