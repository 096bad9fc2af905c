"""What a method gives: its settings, which shared settings it uses, what it refuses, and its plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from egrpo_fast.plan import Plan
from egrpo_fast.schedule import Schedule, SdeForm, Solver
from egrpo_fast.section import Section

MERGING = ("schedule.entropy_threshold", "schedule.merge_lengths", "schedule.max_merge")
OPTIONAL = {*MERGING, "schedule.active_steps", "rollout.group_size", "tail.stride", "tail.solver"}
"""Settings outside of `method` that not every method uses."""


@dataclass(frozen=True)
class Run:
    """What a plan is drawn from beside the method's own settings.

    group_sizes, tail_strides: one number per active step. iteration: from 0.
    """

    schedule: Schedule
    group_sizes: Sequence[int]
    tail_strides: Sequence[int]
    solver: Solver
    antithetic: bool
    seed: int
    iteration: int

    @property
    def group_size(self) -> int:
        """For a method that has one number for all steps."""
        return self.group_sizes[0]

    @property
    def tail_stride(self) -> int:
        """For a method that has one number for all steps."""
        return self.tail_strides[0]


METHODS: dict[str, type["Method"]] = {}
"""Every method by its name."""


class Method(Section):
    """A method's section of a recipe. A class with a default `name` is registered under it when it is defined."""

    name: str

    sde_form: ClassVar[SdeForm] = "flow_grpo"
    """The stochastic step that the method comes with, where a recipe gives none."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        name = cls.model_fields["name"].default
        if not isinstance(name, str):
            raise TypeError(f"{cls.__name__}: a method needs a default for `name`, which is its name in recipes")
        known = METHODS.setdefault(name, cls)
        if known.__module__ != cls.__module__:
            raise TypeError(f"{cls.__name__}: {known.__module__} has a method {name} already; give yours another name")
        METHODS[name] = cls

    @property
    def uses(self) -> set[str]:
        """Which of OPTIONAL it uses; the others are refused by name."""
        return {"rollout.group_size"}

    def check(self, num_steps: int) -> None:
        """ValueError, which names the setting, where the method does not fit a grid of so many steps."""

    def plan(self, run: Run) -> Plan:
        """The plan of one iteration: a function of the settings, the same on every rank."""
        raise NotImplementedError


def require_increasing(name: str, steps: Sequence[int]) -> None:
    """ValueError unless the grid indices of the setting `method.name` increase."""
    if sorted(set(steps)) != list(steps):
        raise ValueError(f"method.{name}: {steps} must be increasing, without repeats")
