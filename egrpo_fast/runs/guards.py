"""What a run watches in its own numbers: skipped steps, what should stay small, rewards that are hacked."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from egrpo_fast.config import Config, GuardsConfig

SPIKE_WINDOW = 50
"""Gradient norms that a spike is measured against."""
SPIKE_LEAST = 5
"""Gradient norms there must be before one is called a spike."""

History = Sequence[tuple[int, Mapping[str, float]]]
"""Every evaluation so far: iteration, and the mean of each reward on the held-out prompts."""


class BadSteps(RuntimeError):
    """Too many steps in a row were not finite; the message says what was seen."""


class Guard:
    """Looks at every iteration's metrics. Its `state` goes into checkpoints, so that a resumed run warns alike."""

    def __init__(self, settings: GuardsConfig) -> None:
        self._settings = settings
        self.bad_in_a_row = 0
        self._norms: list[float] = []

    @property
    def state(self) -> dict[str, Any]:
        return {"bad_in_a_row": self.bad_in_a_row, "norms": self._norms}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self.bad_in_a_row, self._norms = state["bad_in_a_row"], list(state["norms"])

    def skipped(self, steps: int, why: str) -> None:
        """`steps` optimizer steps of an iteration were skipped; 0: none. BadSteps: too many iterations in a row."""
        self.bad_in_a_row = self.bad_in_a_row + 1 if steps else 0
        if steps and self.bad_in_a_row >= self._settings.bad_steps:
            raise BadSteps(
                f"{self.bad_in_a_row} iterations in a row were not finite and changed nothing (guards.bad_steps "
                f"{self._settings.bad_steps}); the last: {why}"
            )

    def alarms(self, values: Mapping[str, float]) -> list[str]:
        """What is out of bounds in an iteration's metrics, a line each."""
        settings, found = self._settings, []
        for name in ("policy_mismatch", "max_log_ratio", "clip_fraction", "zero_advantage_share"):
            bound = getattr(settings, name)
            if bound is not None and name in values and values[name] > bound:
                found.append(f"{name} {values[name]:.3g} is above guards.{name} {bound:g}")
        if (norm := values.get("grad_norm")) is not None:
            if len(self._norms) >= SPIKE_LEAST and settings.grad_norm_spike is not None:
                median = statistics.median(self._norms)
                if norm > settings.grad_norm_spike * median:
                    found.append(f"grad_norm {norm:.3g} is {norm / median:.0f} times its running median {median:.3g}")
            self._norms = [*self._norms[1 - SPIKE_WINDOW :], norm]
        return found


@dataclass(frozen=True)
class Verdict:
    """best: the watched reward's highest mean, first reached at iteration best_at. alarms: evaluations in a row, up to
    the last, that were below `best - drop` with the trained rewards above what they were at best_at."""

    best: float
    best_at: int
    alarms: int
    stop: bool


def verdict(config: Config, history: History) -> Verdict | None:
    """Whether a watched reward falls on held-out prompts while what is trained on rises (reward hacking).

    A pure function, so ranks agree and a resumed run knows what it knew. None where `evaluation.stop_when` asks for no
    watch. The trained rewards count as their weighted sum, without the watched one.
    """
    rule = config.evaluation.stop_when
    if rule is None or not history:
        return None
    weights = {reward.name: reward.weight for reward in config.rewards if reward.name != rule.reward}
    best_at, best, trained_at_best, alarms = 0, float("-inf"), 0.0, 0
    for iteration, means in history:
        watched, trained = means[rule.reward], sum(weight * means[name] for name, weight in weights.items())
        if watched > best:
            best_at, best, trained_at_best = iteration, watched, trained
        alarms = alarms + 1 if watched < best - rule.drop and trained > trained_at_best else 0
    return Verdict(best, best_at, alarms, alarms >= rule.patience)
