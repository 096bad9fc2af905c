"""TempFlow-GRPO: samples leave the ODE at every trained step, which its noise level weighs."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from egrpo_fast.methods.method import Method, Run, require_increasing
from egrpo_fast.plan import Plan, PlanBuilder, singly
from egrpo_fast.schedule import Schedule, Solver
from egrpo_fast.section import Natural


class TempFlowGrpo(Method):
    name: Literal["tempflow_grpo"] = "tempflow_grpo"
    """TempFlow-GRPO."""
    steps: list[Natural] | None = Field(None, min_length=1)
    """Grid indices that are trained; none given: all but the last."""

    @property
    def uses(self) -> set[str]:
        return {"rollout.group_size", "tail.stride", "tail.solver"}

    def check(self, num_steps: int) -> None:
        if self.steps is None:
            return
        if max(self.steps) >= num_steps - 1:
            message = f"{max(self.steps)} is the last step or past it; allowed: 0 to {num_steps - 2}"
            raise ValueError(f"method.steps: {message}")
        require_increasing("steps", self.steps)

    def plan(self, run: Run) -> Plan:
        trained = self.steps or range(run.schedule.num_steps - 1)
        return tempflow_grpo(run.schedule, run.group_size, trained, run.tail_stride, run.antithetic, run.solver)


def tempflow_grpo(
    schedule: Schedule,
    group_size: int,
    trained: Sequence[int],
    tail_stride: int = 1,
    antithetic: bool = False,
    solver: Solver = "euler",
) -> Plan:
    """TempFlow-GRPO (arXiv 2508.04324): at every trained step samples leave the ODE by one plain SDE step, then ODE.

    A step's loss is weighted by its noise level `s = sigma sqrt(D)`, in units of the trained steps' mean.
    """
    draft, steps = PlanBuilder(schedule, antithetic), schedule.num_steps
    anchor = draft.start()
    draft.ode([anchor], 0, max(trained))
    mean = math.fsum(schedule.sde(index, 1).s for index in trained) / len(trained)
    for index in trained:
        samples = draft.sde([anchor], index, group_size, keep=True)
        draft.ode(samples.rows, index + 1, steps, tail_stride, solver=solver)
        draft.train(samples, singly(samples.rows), weight=samples.step.s / mean)
    return draft.plan()
