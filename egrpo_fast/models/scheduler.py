"""The time grid of a pipeline's own scheduler, as its pipeline asks for it: what `schedule.shift: auto` stands for."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler

from egrpo_fast.files import read_json


def scheduler_config(folder: Path) -> Mapping[str, Any]:
    """Of a pipeline folder. ValueError: it cannot be read, or is of a scheduler that does not sample a flow's ODE."""
    file = folder / "scheduler" / "scheduler_config.json"
    try:
        config = read_json(file)
        name = config["_class_name"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"schedule.shift: auto needs {file}, which cannot be read: {error!r}") from None
    if name != FlowMatchEulerDiscreteScheduler.__name__:
        raise ValueError(f"schedule.shift: auto reads a FlowMatchEulerDiscreteScheduler; {file} is of a {name}")
    return config


def dynamic_mu(config: Mapping[str, Any], tokens: int) -> float:
    """mu by the number of an image's tokens, on the line that a scheduler's config gives by two of its points."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - few) / (many - few)


def uniform(num_steps: int) -> Sequence[float]:
    """`1 - i / T`, without the 0 at the end: what most pipelines give their scheduler to shift."""
    return np.linspace(1.0, 1.0 / num_steps, num_steps).tolist()


def grid(
    config: Mapping[str, Any], num_steps: int, mu: float | None, sigmas: Sequence[float] | None
) -> tuple[float, ...]:
    """The times, from 1 to 0, of a scheduler of this config. ValueError: they are no grid.

    mu: `log s` of the shift, for those of dynamic shift. sigmas: what the pipeline gives it to shift; None: nothing,
    and the scheduler begins with times of its own.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(num_steps, mu=mu, sigmas=sigmas)
    times = tuple(scheduler.sigmas.tolist())
    if times[0] != 1.0 or times[-1] != 0.0 or any(earlier <= later for earlier, later in pairwise(times)):
        message = f"from {times[0]:g} to {times[-1]:g} in {len(times) - 1} steps, not all towards 0"
        raise ValueError(f"schedule.shift: auto gives no grid that can be trained on: {message}")
    return times
