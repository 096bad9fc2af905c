"""Flow-GRPO and Flow-GRPO-Fast: every step of a trajectory is stochastic, or those of a random window."""

import math
import random
from collections.abc import Container
from typing import Annotated, Literal

from pydantic import Field

from egrpo_fast.methods.method import Method, Run
from egrpo_fast.methods.mix_grpo import mix_grpo
from egrpo_fast.methods.trajectories import trajectories
from egrpo_fast.plan import Plan
from egrpo_fast.schedule import Schedule
from egrpo_fast.section import Natural, Positive


class FlowGrpo(Method):
    name: Literal["flow_grpo"] = "flow_grpo"
    """Flow-GRPO; with a window Flow-GRPO-Fast."""
    fraction: float = Field(1.0, gt=0.0, le=1.0)
    """Share of the steps that is trained, drawn anew every iteration."""
    same_noise: bool = False
    """Whether the trajectories of a prompt share their initial noise."""
    window: Positive | None = None
    """Steps in a row that are stochastic and trained, the others ODE, drawn anew every iteration; none given: all."""
    window_range: Annotated[tuple[Natural, Positive], Field(strict=False)] | None = None
    """Grid indices [first, end) that the window lies in; none given: the first half."""

    @property
    def uses(self) -> set[str]:
        return {"rollout.group_size", "tail.stride", "tail.solver"} if self.window else {"rollout.group_size"}

    def check(self, num_steps: int) -> None:
        first, end = self.window_range or (0, num_steps // 2)
        if self.window is None and self.window_range is not None:
            raise ValueError("method.window_range: not used without method.window")
        if self.window is not None and self.fraction != 1.0:
            raise ValueError("method.fraction: not used with method.window, whose steps are all trained")
        if end > num_steps - 1:
            raise ValueError(f"method.window_range: {end} is past the end; allowed: to {num_steps - 1}")
        if (self.window or 1) > end - first:
            message = f"{self.window} steps pass the end of [{first}, {end}); allowed: up to {end - first}"
            raise ValueError(f"method.window: {message}")

    def plan(self, run: Run) -> Plan:
        if self.window is None:
            trained = chosen_steps(run.schedule.num_steps - 1, self.fraction, run.seed, run.iteration)
            return flow_grpo(run.schedule, run.group_size, trained, self.same_noise, run.antithetic)
        first, end = self.window_range or (0, run.schedule.num_steps // 2)
        start = first + random.Random(f"{run.seed} {run.iteration}").randrange(end - first - self.window + 1)
        window = range(start, start + self.window)
        return mix_grpo(
            run.schedule, run.group_size, window, self.same_noise, run.tail_stride, run.antithetic, run.solver
        )


def flow_grpo(
    schedule: Schedule, group_size: int, trained: Container[int], same_noise: bool = False, antithetic: bool = False
) -> Plan:
    """Flow-GRPO (arXiv 2505.05470), DanceGRPO (2505.07818): every step stochastic, one reward for all of them.

    trained: grid indices. same_noise: the trajectories share their initial noise.
    """
    every = range(schedule.num_steps - 1)
    branching, num_starts = ({0: group_size}, 1) if same_noise else ({}, group_size)
    return trajectories(schedule, every, trained, branching, num_starts, antithetic=antithetic)


def chosen_steps(count: int, share: float, seed: int, iteration: int) -> frozenset[int]:
    """A random `share` of the grid indices below `count`, at least one: a function of (seed, iteration)."""
    draw = random.Random(f"{seed} {iteration}")
    return frozenset(sorted(range(count), key=lambda _: draw.random())[: max(1, math.floor(share * count + 1e-9))])
