"""MixGRPO: a window of stochastic steps slides over the grid."""

from typing import Literal

from egrpo_fast.methods.method import Method, Run
from egrpo_fast.methods.trajectories import trajectories
from egrpo_fast.plan import Plan
from egrpo_fast.schedule import Schedule, Solver
from egrpo_fast.section import Natural, Positive


class MixGrpo(Method):
    name: Literal["mix_grpo"] = "mix_grpo"
    """MixGRPO."""
    window: Positive = 4
    """Steps in a row that are stochastic and trained, the others ODE."""
    stride: Natural = 1
    """Grid steps that the window moves on at a time."""
    every: Positive = 25
    """Iterations until it moves."""
    same_noise: bool = True
    """Whether the trajectories of a prompt share their initial noise."""

    @property
    def uses(self) -> set[str]:
        return {"rollout.group_size", "tail.stride", "tail.solver"}

    def check(self, num_steps: int) -> None:
        if self.window > num_steps - 1:
            raise ValueError(f"method.window: {self.window} steps pass the end; allowed: up to {num_steps - 1}")

    def plan(self, run: Run) -> Plan:
        window = sliding_window(self.window, self.stride, self.every, run.schedule.num_steps - 1, run.iteration)
        return mix_grpo(
            run.schedule, run.group_size, window, self.same_noise, run.tail_stride, run.antithetic, run.solver
        )


def mix_grpo(
    schedule: Schedule,
    group_size: int,
    window: range,
    same_noise: bool = True,
    tail_stride: int = 1,
    antithetic: bool = False,
    solver: Solver = "euler",
) -> Plan:
    """MixGRPO (arXiv 2507.21802), Flow-GRPO-Fast: the steps of `window` are stochastic and trained, the others ODE."""
    branching, num_starts = ({window.start: group_size}, 1) if same_noise else ({}, group_size)
    return trajectories(schedule, window, window, branching, num_starts, tail_stride, antithetic, solver=solver)


def sliding_window(size: int, stride: int, every: int, count: int, iteration: int) -> range:
    """MixGRPO's window over the grid indices below `count`: `stride` further `every` iterations, until at the end."""
    start = min(iteration // every * stride, count - size)
    return range(start, start + size)
