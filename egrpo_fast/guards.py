"""What a run watches in its own numbers: steps that were skipped, and alarms on what should stay small."""

import statistics
from collections.abc import Mapping
from typing import Any

from egrpo_fast.config import Guards

SPIKE_WINDOW = 50
"""Gradient norms that a spike is measured against."""
SPIKE_LEAST = 5
"""Gradient norms there must be before one is called a spike."""


class BadSteps(RuntimeError):
    """Too many steps in a row were not finite; the message says what was seen."""


class Guard:
    """Looks at every iteration's metrics. Its `state` goes into checkpoints, so that a resumed run warns alike."""

    def __init__(self, settings: Guards) -> None:
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
        settings, told = self._settings, []
        for name in ("policy_mismatch", "max_log_ratio", "clip_fraction", "zero_advantage_share"):
            bound = getattr(settings, name)
            if bound is not None and name in values and values[name] > bound:
                told.append(f"{name} {values[name]:.3g} is above guards.{name} {bound:g}")
        if (norm := values.get("grad_norm")) is not None:
            if len(self._norms) >= SPIKE_LEAST and settings.grad_norm_spike is not None:
                median = statistics.median(self._norms)
                if norm > settings.grad_norm_spike * median:
                    told.append(f"grad_norm {norm:.3g} is {norm / median:.0f} times its running median {median:.3g}")
            self._norms = [*self._norms[1 - SPIKE_WINDOW :], norm]
        return told
