"""The methods, as plans: which steps are stochastic, where rows branch, what is trained, whose rewards are compared.

One function per method, from a schedule and plain numbers to a `Plan`; `plan_of` calls the one that a configuration
names. Everywhere the last grid step is deterministic: noise that is added there would stay in the picture. What each
takes from its paper, and where public code differs: docs/methods.md.
"""

import math
import random
from collections.abc import Container, Mapping, Sequence

from egrpo_fast.config import BranchGrpo, Config, ConfigError, DanceGrpo, FlowGrpo, GranularGrpo, MixGrpo, TempFlowGrpo
from egrpo_fast.plan import Draft, Plan, PlanTooLargeError, singly
from egrpo_fast.schedule import Schedule, Solver


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
    draft, steps = Draft(schedule, antithetic), schedule.num_steps
    anchor = draft.start()
    draft.ode([anchor], 0, max(schedule.active))
    for index, size, stride in zip(schedule.active, group_sizes, tail_strides, strict=True):
        length = schedule.merges[index]
        samples = draft.sde([anchor], index, size, length, keep=True)
        draft.ode(samples.rows, index + length, steps, stride, solver=solver)
        draft.train(samples, singly(samples.rows))
    return draft.plan()


def _trajectories(
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

    Every row parts into `branching[step]` ones at a step, where given. A sample's reward is the mean of all pictures
    that came from it, and it is compared with all others of its step.
    """
    draft = Draft(schedule, antithetic)
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


def flow_grpo(
    schedule: Schedule, group_size: int, trained: Container[int], same_noise: bool = False, antithetic: bool = False
) -> Plan:
    """Flow-GRPO (arXiv 2505.05470), DanceGRPO (2505.07818): every step stochastic, one reward for all of them.

    trained: grid indices. same_noise: the trajectories share their initial noise.
    """
    every = range(schedule.num_steps - 1)
    branching, num_starts = ({0: group_size}, 1) if same_noise else ({}, group_size)
    return _trajectories(schedule, every, trained, branching, num_starts, antithetic=antithetic)


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
    return _trajectories(schedule, window, window, branching, num_starts, tail_stride, antithetic, solver=solver)


def branch_grpo(
    schedule: Schedule,
    splits: Sequence[int],
    branching: int,
    trained: Container[int],
    extremes: int = 0,
    antithetic: bool = False,
) -> Plan:
    """BranchGRPO (arXiv 2509.06040): a tree, stochastic from its first split on, each split into `branching` children.

    A node's reward is the mean of the leaves under it, its advantage is among the nodes of its depth. extremes: only
    the nodes above so many best and worst leaves are trained; 0: all.
    """
    stochastic = range(min(splits), schedule.num_steps - 1)
    return _trajectories(schedule, stochastic, trained, dict.fromkeys(splits, branching), 1, 1, antithetic, extremes)


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
    draft, steps = Draft(schedule, antithetic), schedule.num_steps
    anchor = draft.start()
    draft.ode([anchor], 0, max(schedule.active))
    for index, size in zip(schedule.active, group_sizes, strict=True):
        samples = draft.sde([anchor], index, size, keep=True)
        tails = [
            draft.ode(samples.rows, index + 1, steps, stride, place > 0, solver) for place, stride in enumerate(strides)
        ]
        draft.train(samples, *map(singly, tails))
    return draft.plan()


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
    draft, steps = Draft(schedule, antithetic), schedule.num_steps
    anchor = draft.start()
    draft.ode([anchor], 0, max(trained))
    mean = math.fsum(schedule.sde(index, 1).s for index in trained) / len(trained)
    for index in trained:
        samples = draft.sde([anchor], index, group_size, keep=True)
        draft.ode(samples.rows, index + 1, steps, tail_stride, solver=solver)
        draft.train(samples, singly(samples.rows), weight=samples.step.s / mean)
    return draft.plan()


def chosen_steps(count: int, share: float, seed: int, iteration: int) -> frozenset[int]:
    """A random `share` of the grid indices below `count`, at least one: a function of (seed, iteration)."""
    draw = random.Random(f"{seed} {iteration}")
    return frozenset(sorted(range(count), key=lambda _: draw.random())[: max(1, math.floor(share * count + 1e-9))])


def sliding_window(size: int, stride: int, every: int, count: int, iteration: int) -> range:
    """MixGRPO's window over the grid indices below `count`: `stride` further `every` iterations, until at the end."""
    start = min(iteration // every * stride, count - size)
    return range(start, start + size)


def unpruned_steps(count: int, size: int, every: int, last_split: int, iteration: int) -> list[int]:
    """Grid indices below `count` but a window of `size`, which begins at the end and slides towards the last split."""
    start = max(count - size - iteration // every, last_split + 1)
    return [index for index in range(count) if not start <= index < start + size]


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


def plan_of(config: Config, iteration: int) -> Plan:
    """The plan of one training iteration, from 0: the same on every rank. ConfigError: it would be too large."""
    try:
        return _draw(config, iteration)
    except PlanTooLargeError as error:
        settings = ["schedule.num_steps", *sorted({"schedule.active_steps", "rollout.group_size"} & config.method.uses)]
        raise ConfigError(f"{', '.join(settings)}: {error}; choose fewer") from None


def _draw(config: Config, iteration: int) -> Plan:
    schedule, method, solver = config.build_schedule(), config.method, config.tail.solver
    sizes, strides = config.per_active_step(config.rollout.group_size), config.per_active_step(config.tail.stride)
    size, stride, pairs, count = sizes[0], strides[0], config.objective.antithetic, schedule.num_steps - 1
    match method:
        case FlowGrpo(window=int(length)):
            first, end = method.window_range or (0, schedule.num_steps // 2)
            start = first + random.Random(f"{config.seed} {iteration}").randrange(end - first - length + 1)
            window = range(start, start + length)
            return mix_grpo(schedule, size, window, method.same_noise, stride, pairs, solver)
        case FlowGrpo() | DanceGrpo():
            trained = chosen_steps(count, method.fraction, config.seed, iteration)
            return flow_grpo(schedule, size, trained, method.same_noise, pairs)
        case MixGrpo():
            window = sliding_window(method.window, method.stride, method.every, count, iteration)
            return mix_grpo(schedule, size, window, method.same_noise, stride, pairs, solver)
        case BranchGrpo():
            left = unpruned_steps(count, method.pruned_steps, method.slide_every, max(method.splits), iteration)
            return branch_grpo(schedule, method.splits, method.branching, left, method.extremes, pairs)
        case GranularGrpo():
            return granular_grpo(schedule, sizes, method.strides, pairs, solver)
        case TempFlowGrpo():
            return tempflow_grpo(schedule, size, method.steps or range(count), stride, pairs, solver)
        case _:
            return e_grpo(schedule, sizes, strides, antithetic=pairs, solver=solver)
