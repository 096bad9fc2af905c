"""A run from Python: `Trainer("shapes", rewards={"brightness": brightness}).train()`.

What takes seconds to import is imported by `Trainer.train`, once the terminal is kept clean of it.
"""

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egrpo_fast.config import PIPELINE, load_config
from egrpo_fast.terminal import keep_clean
from egrpo_fast.train import run

if TYPE_CHECKING:
    from egrpo_fast.config import Config
    from egrpo_fast.rewards import Reward


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    folder: Path
    """The run's folder: metrics.jsonl, images, checkpoints, curve.png, before_after.png."""
    pipeline: Path | None
    """The trained pipeline, which `DiffusionPipeline.from_pretrained` loads; None: a signal ended the run before."""
    iterations: int
    """Iterations done, those before a resume included."""
    history: list[tuple[int, dict[str, float]]]
    """Every evaluation: iterations done, and the mean of each reward on the held-out prompts."""

    @property
    def before(self) -> dict[str, float]:
        """Held-out rewards of the first evaluation."""
        return self.history[0][1]

    @property
    def after(self) -> dict[str, float]:
        """Held-out rewards of the last evaluation."""
        return self.history[-1][1]


class Trainer:
    """One run of a recipe, in this process. Under `deepspeed` or torchrun every rank's process makes one.

    recipe: a recipe's name, a YAML file, or what `load_config` returned. Its settings are the other keyword arguments;
    a section is a dictionary, as in `iterations=20, optimizer={"lr": 1e-4}` (docs/configuration.md).

    rewards: replaces the recipe's rewards; name -> function, number or pair. A function `score(images, prompts)` gets
    images [B, 3, H, W], float32 in [0, 1], and B prompts, and returns [B] scores. A number is the weight of a reward
    of the package with that name. A pair (function, weight) gives a function another weight than 1. A reward of weight
    0 is watched and not trained on.

    prompts, held_out_prompts: the prompts themselves. The run's config.yaml records them. prompts may also be that
    section of the settings.

    on_iteration(iterations, metrics), on_evaluation(iterations, held-out rewards), on_checkpoint(iterations): called on
    every rank. verbose: show also what DeepSpeed, torch and others print.

    ConfigError, a ValueError: a setting is wrong. Only this program can resume a run whose reward is a function of it:
    the command line cannot find the function, and says so.
    """

    def __init__(
        self,
        recipe: "str | Config" = "shapes",
        *,
        rewards: "Mapping[str, Reward | float | tuple[Reward, float]] | None" = None,
        prompts: Sequence[str] | Mapping[str, Any] | None = None,
        held_out_prompts: Sequence[str] | None = None,
        on_iteration: Callable[[int, dict[str, float]], None] | None = None,
        on_evaluation: Callable[[int, dict[str, float]], None] | None = None,
        on_checkpoint: Callable[[int], None] | None = None,
        verbose: bool = False,
        **settings: Any,
    ) -> None:
        self._functions: dict[str, Reward] = {}
        if isinstance(prompts, Mapping):
            settings["prompts"] = prompts
        elif prompts is not None:
            settings["prompts.train"] = list(prompts)
        if held_out_prompts is not None:
            settings["prompts.held_out"] = list(held_out_prompts)
        if rewards is not None:
            settings["rewards"] = [self._reward(name, value) for name, value in rewards.items()]
        self.config = load_config(recipe, [f"{name}={json.dumps(value)}" for name, value in _leaves(settings)])
        calls = {"on_iteration": on_iteration, "on_evaluation": on_evaluation, "on_checkpoint": on_checkpoint}
        self._calls: dict[str, Any] = {name: call for name, call in calls.items() if call is not None}
        self._verbose = verbose

    def _reward(self, name: str, value: "Reward | float | tuple[Reward, float]") -> dict[str, Any]:
        function, weight = value if isinstance(value, tuple) else (value, 1.0)
        if isinstance(function, int | float):
            return {"name": name, "weight": float(function)}
        self._functions[name] = function
        return {"name": name, "weight": float(weight)}

    def train(self) -> Result:
        """Run to the end, or until SIGTERM or Ctrl-C asks the run to end at the next safe place.

        ValueError: something that a user can mend, found before training; of its kinds, RewardError: a reward fails.
        """
        keep_clean(self._verbose)
        from egrpo_fast.rewards import given
        from egrpo_fast.trainer import Callbacks

        with given(self._functions), _signals():
            loop, asked = run(self.config, Callbacks(**self._calls))
        folder = loop.config.output_dir
        return Result(folder, None if asked else folder / PIPELINE, loop.iteration, loop.history)


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`key.path` and value of every setting; a dictionary is a section."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value) if isinstance(value, Path) else value


@contextmanager
def _signals() -> Iterator[None]:
    """Puts back what SIGTERM and Ctrl-C did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
