"""A method of one's own, whole, as a test trains with it: pairs that part late, the later the heavier."""

from typing import Literal

import torch

from egrpo_fast import ops
from egrpo_fast.methods import Method, Run
from egrpo_fast.objective import Objective
from egrpo_fast.plan import Plan, PlanBuilder, singly
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.schedule import Schedule, make_schedule


def late_pairs(schedule: Schedule, steps: range) -> Plan:
    """At every step of `steps` one antithetic pair leaves the ODE trajectory and skips to the end in one step."""
    draft, end = PlanBuilder(schedule, antithetic=True), schedule.num_steps
    anchor = draft.start()
    draft.ode([anchor], 0, steps.stop - 1)
    for index in steps:
        pair = draft.sde([anchor], index, 2, keep=True)
        draft.ode(pair.rows, index + 1, end, stride=end)
        draft.train(pair, singly(pair.rows), weight=index / steps.stop)
    return draft.plan()


class LatePairs(Method):
    name: Literal["late_pairs"] = "late_pairs"
    """Late pairs."""
    first: int = 3
    """First grid index that is trained; the two after it are trained too."""

    def check(self, num_steps: int) -> None:
        if not 0 <= self.first < num_steps - 3:
            raise ValueError(f"method.first: {self.first}; allowed: 0 to {num_steps - 4}")

    def plan(self, run: Run) -> Plan:
        return late_pairs(run.schedule, range(self.first, self.first + 3))


def train(iterations: int = 60) -> list[float]:
    """Mean rewards of a linear model that is to draw larger numbers, iteration by iteration."""
    plan, reference = late_pairs(make_schedule(8), range(3, 6)), ops.choose("reference")
    wavefront, objective = Wavefront(plan, 4, (2, 4), reference), Objective(reference, (1.0,))
    shift = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=0.02)
    means = []
    for iteration in range(iterations):
        key = NoiseKey(0, iteration, torch.arange(4))
        rollout = wavefront.run(lambda x, t, rows: 0.2 * x + shift, key)
        rewards = rollout.final_latents.mean((2, 3))[None]
        for n, group in enumerate(plan.groups):
            velocity = 0.2 * rollout.states[n] + shift
            objective(group, key, velocity, velocity.detach(), plan.by_group(rewards)[n]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(rewards.mean().item())
    return means
