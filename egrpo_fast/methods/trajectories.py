"""Trajectories that stay stochastic over several steps, which several methods draw."""

from collections.abc import Container, Mapping

from egrpo_fast.plan import Plan, PlanBuilder
from egrpo_fast.schedule import Schedule, Solver


def trajectories(
    schedule: Schedule,
    stochastic: range,
    trained: Container[int],
    branching: Mapping[int, int],
    num_starts: int = 1,
    tail_stride: int = 1,
    antithetic: bool = False,
    extremes: int = 0,
    solver: Solver = "euler",
) -> Plan:
    """Trajectories from `num_starts` noises: SDE at the steps `stochastic`, ODE before and after.

    Every row parts into `branching[step]` ones at a step, where given. A sample's reward is the mean of all images
    that came from it, and it is compared with all others of its step.
    """
    draft = PlanBuilder(schedule, antithetic)
    rows = tuple(draft.start(i) for i in range(num_starts))
    draft.ode(rows, 0, stochastic.start)
    steps = []
    for index in stochastic:
        samples = draft.sde(rows, index, branching.get(index, 1))
        rows = samples.rows
        steps.append(samples)
    draft.ode(rows, stochastic.stop, schedule.num_steps, tail_stride, solver=solver)
    for samples in steps:
        if samples.index in trained and len(samples.rows) > 1:
            share = len(rows) // len(samples.rows)
            draft.train(samples, tuple(rows[i : i + share] for i in range(0, len(rows), share)))
    return draft.plan(extremes)
