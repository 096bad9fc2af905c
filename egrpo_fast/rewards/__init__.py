"""Rewards: images and prompts to scores. One file per reward, found by its name; a recipe may name other code as well.

A reward is a callable `score(images [B, 3, H, W] float in [0, 1], prompts) -> [B]`, on the images' device. It may have
- a static `check(prompts, height, width)`, which raises ValueError for prompts or images that it cannot judge;
- a static `parameters(**options)`, the number of its weights, which are float32;
- `sends_images = True`, where images and a secret leave this machine.
"""

import inspect
import os
import pickle
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import torch

from egrpo_fast.scoring.call import (
    Reward,
    RewardError,
    fill_dropped,
    score,
    score_or_nan,
    text_of,
    try_reward,
    users_code,
)

__all__ = [
    "GIVEN",
    "NAMES",
    "Reward",
    "RewardError",
    "check_reward",
    "fill_dropped",
    "given",
    "make_reward",
    "require_trust",
    "score",
    "score_or_nan",
    "try_reward",
]

NAMES = tuple(file.name for file in pkgutil.iter_modules(__path__))
"""Names in a recipe: each is a file here, whose `REWARD` is meant. A recipe may also name any `module:attribute`, and
tell two of a kind apart by a label: `http/hps`, `http/pick`.

A class is made with the options and `device`. A function is the reward: called with images, prompts and the options.
"""
GIVEN: dict[str, Reward] = {}
"""Rewards by name that this Python program gave itself, while `given` lasts."""


@contextmanager
def given(functions: Mapping[str, Reward]) -> Iterator[None]:
    """Meanwhile these rewards are found by their names, before any other. ValueError: a name has another meaning."""
    for name in functions:
        if built_in(name) or ":" in name:
            raise ValueError(f"rewards.{name}: a reward of the package has this name; give yours another")
    GIVEN.update(functions)
    try:
        yield
    finally:
        GIVEN.clear()


def built_in(name: str) -> bool:
    """Whether a recipe's reward is one of the package."""
    return name.partition("/")[0] in NAMES


def parameters(name: str, options: Mapping[str, Any]) -> int | None:
    """Of a recipe's reward: how many weights it will load; None: it does not say, or is not installed."""
    if not built_in(name):
        return None  # a plan runs no code of a stranger's recipe
    try:
        count = getattr(_find(name), "parameters", None)
        with _naming(name):
            return count(**options) if count else None
    except ValueError:
        return None


def _find(name: str) -> Any:
    if name in GIVEN:
        return GIVEN[name]
    kind = name.partition("/")[0]
    module, colon, attribute = (f"{__name__}.{kind}:REWARD" if kind in NAMES else name).partition(":")
    if not colon:
        raise ValueError(f"rewards: no reward {name!r}; there are: {', '.join(NAMES)}, or any module:attribute")
    try:
        if kind not in NAMES and (here := os.getcwd()) not in sys.path:
            sys.path.append(here)  # a user's own file beside the command; last, so it shadows nothing
        with users_code(name):
            reward = getattr(import_module(module), attribute)
    except RewardError as error:
        if not isinstance(missing := error.__cause__, ModuleNotFoundError):
            raise
        message = "it is neither in this folder nor on Python's path"
        if kind in NAMES:
            extras = metadata("egrpo_fast").get_all("Provides-Extra") or []
            message = f"pip install 'egrpo_fast[{kind}]'" if kind in extras else "install egrpo_fast again"
        raise RewardError(f"rewards.{name}: {missing.name} is not installed; {message}", error.trace) from None
    if not callable(reward):
        raise ValueError(f"rewards.{name}: {type(reward).__name__} is no class and no function")
    return reward


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """As `users_code`. What a reward refuses by a ValueError, or of arguments, keeps its own words alone."""
    try:
        with users_code(name):
            yield
    except RewardError as error:
        cause = error.__cause__
        if isinstance(cause, pickle.UnpicklingError):
            # From libraries that read their own checkpoints, by torch's `weights_only`: refused, and not executed.
            raise ValueError(f"rewards.{name}: a checkpoint holds more than tensors, and is not executed") from None
        if isinstance(cause, (TypeError, ValueError, OSError, RuntimeError)):
            trace = "" if built_in(name) else error.trace
            raise RewardError(f"rewards.{name}: {text_of(cause)}", trace) from cause
        raise


def _bind(reward: Any, options: Mapping[str, Any]) -> None:
    """TypeError where the options are not those of the reward."""
    if isinstance(reward, type):
        inspect.signature(reward).bind(**options, device="cpu")
    else:
        inspect.signature(reward).bind("images", "prompts", **options)


def require_trust(names: Iterable[str], file: Path) -> None:
    """ValueError where a file that may be a stranger's names rewards that run code, or send images and a token."""
    if wary := [name for name in names if not built_in(name) or getattr(_find(name), "sends_images", False)]:
        raise ValueError(
            f"rewards: {file} asks for {', '.join(wary)}. Such a reward runs Python code from your disk, or sends "
            "images and your token to an address in that file. If you trust the file, add --trust-run; or name the "
            "rewards yourself on the command line"
        )


def check_reward(name: str, options: Mapping[str, Any], prompts: Sequence[str], height: int, width: int) -> None:
    """ValueError, before any weight is read, where a recipe's reward cannot be made or cannot judge this run."""
    reward = _find(name)
    with _naming(name):
        _bind(reward, options)
        if check := getattr(reward, "check", None):
            check(prompts, height, width)


def make_reward(name: str, options: Mapping[str, Any], device: torch.device | str = "cpu") -> Reward:
    """The reward a recipe names. ValueError names what is wrong with it."""
    reward = _find(name)
    with _naming(name):
        _bind(reward, options)
        made: Reward = reward(**options, device=device) if isinstance(reward, type) else partial(reward, **options)
        if not callable(made):
            raise TypeError(f"what {type(made).__name__} makes is not callable")
        return made
