"""E-GRPO: groups leave the anchor trajectory by merged stochastic steps."""

from collections.abc import Sequence
from typing import Literal

from egrpo_fast.methods.method import OPTIONAL, Method, Run
from egrpo_fast.plan import Plan, PlanBuilder, singly
from egrpo_fast.schedule import Schedule, Solver


class EGrpo(Method):
    """`schedule` says which steps are trained and how they merge, `rollout` how many samples leave each."""

    name: Literal["e_grpo"] = "e_grpo"
    """E-GRPO."""

    @property
    def uses(self) -> set[str]:
        return OPTIONAL

    def plan(self, run: Run) -> Plan:
        return e_grpo(run.schedule, run.group_sizes, run.tail_strides, run.antithetic, run.solver)


def e_grpo(
    schedule: Schedule,
    group_sizes: Sequence[int],
    tail_strides: Sequence[int],
    antithetic: bool = False,
    solver: Solver = "euler",
) -> Plan:
    """E-GRPO (its Algorithm 1): at every active step G_n samples leave the anchor by one merged SDE step, then ODE.

    group_sizes, tail_strides: one number per active step. The anchor stops at its last active step.
    """
    draft, steps = PlanBuilder(schedule, antithetic), schedule.num_steps
    anchor = draft.start()
    draft.ode([anchor], 0, max(schedule.active))
    for index, size, stride in zip(schedule.active, group_sizes, tail_strides, strict=True):
        length = schedule.merges[index]
        samples = draft.sde([anchor], index, size, length, keep=True)
        draft.ode(samples.rows, index + length, steps, stride, solver=solver)
        draft.train(samples, singly(samples.rows))
    return draft.plan()


def group_sizes_by_spread(spreads: Sequence[float], total: int, least: int = 2) -> list[int]:
    """Sizes G_n >= least of `total` samples in all that make `sum_n spread_n^2 / G_n` smallest.

    spreads: reward standard deviation within the group of every active step, as a run recorded it. ValueError: the
    total does not suffice.
    """
    if total < least * len(spreads):
        raise ValueError(f"total: {total} samples for {len(spreads)} groups, at least {least * len(spreads)} needed")
    sizes = [least] * len(spreads)
    for _ in range(total - sum(sizes)):
        gains = [spread**2 / (size * (size + 1)) for spread, size in zip(spreads, sizes)]
        sizes[gains.index(max(gains))] += 1
    return sizes
