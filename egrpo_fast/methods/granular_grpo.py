"""Granular-GRPO: plain stochastic steps, several ODE tails of every sample."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from egrpo_fast.methods.method import Method, Run
from egrpo_fast.plan import Plan, PlanBuilder, singly
from egrpo_fast.schedule import Schedule, Solver
from egrpo_fast.section import Positive


class GranularGrpo(Method):
    name: Literal["granular_grpo"] = "granular_grpo"
    """Granular-GRPO."""
    strides: list[Positive] = Field([1, 2], min_length=1)
    """Grid steps per ODE step of each of a sample's tails."""

    @property
    def uses(self) -> set[str]:
        return {"schedule.active_steps", "rollout.group_size", "tail.solver"}

    def plan(self, run: Run) -> Plan:
        return granular_grpo(run.schedule, run.group_sizes, self.strides, run.antithetic, run.solver)


def granular_grpo(
    schedule: Schedule,
    group_sizes: Sequence[int],
    strides: Sequence[int],
    antithetic: bool = False,
    solver: Solver = "euler",
) -> Plan:
    """Granular-GRPO (arXiv 2510.01982): one plain SDE step per active step, ODE tails of several strides per sample.

    group_sizes: one number per active step. The advantages that the tails of each stride give are added.
    """
    draft, steps = PlanBuilder(schedule, antithetic), schedule.num_steps
    anchor = draft.start()
    draft.ode([anchor], 0, max(schedule.active))
    for index, size in zip(schedule.active, group_sizes, strict=True):
        samples = draft.sde([anchor], index, size, keep=True)
        tails = [
            draft.ode(samples.rows, index + 1, steps, stride, place > 0, solver) for place, stride in enumerate(strides)
        ]
        draft.train(samples, *map(singly, tails))
    return draft.plan()
