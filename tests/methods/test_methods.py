"""Every method: its plan by hand, and its gradient against stored samples."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from egrpo_fast import ops
from egrpo_fast.config import ConfigError, load_config, plan_of
from egrpo_fast.kernels.reference.philox import philox_normal
from egrpo_fast.methods import Method
from egrpo_fast.methods.branch_grpo import branch_grpo, unpruned_steps
from egrpo_fast.methods.e_grpo import e_grpo, group_sizes_by_spread
from egrpo_fast.methods.flow_grpo import chosen_steps, flow_grpo
from egrpo_fast.methods.granular_grpo import granular_grpo
from egrpo_fast.methods.mix_grpo import mix_grpo, sliding_window
from egrpo_fast.methods.tempflow_grpo import tempflow_grpo
from egrpo_fast.noise import draw_word, initial_noise
from egrpo_fast.objective import Objective
from egrpo_fast.plan import singly
from egrpo_fast.rewards import fill_dropped
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.schedule import make_schedule

FOUR, FIVE = (make_schedule(steps, entropy_threshold=0) for steps in (4, 5))
REFERENCE = ops.choose("reference")
KEY = NoiseKey(3, 2, torch.tensor([4, 9]))
SHAPE = (3, 4)


def moves(plan):
    """Per wave: (source, destination, grid steps, stochastic) of every edge."""
    times = plan.schedule.times

    def length(wave, edge):
        ends = range(1, len(times) - wave.index)
        made = plan.schedule.sde if edge.step.s else lambda start, many: plan.schedule.ode(start, start + many)
        return next(many for many in ends if made(wave.index, many) == edge.step)

    return [[(e.source, e.destination, length(w, e), e.step.s > 0) for e in w.edges] for w in plan.waves]


def ode(*rows, length=1):
    return [(row, row, length, False) for row in rows]


def sde(*pairs):
    return [(*pair, 1, True) for pair in pairs]


def trained(plan):
    return [(group.index, group.sources, group.views) for group in plan.groups]


def advantages(plan, rewards, n):
    """Of a group, on policy, from one reward of every image."""
    group = plan.groups[n]
    velocity = torch.zeros(len(group.sources), *SHAPE, dtype=torch.float64)
    key = NoiseKey(0, 0, torch.tensor([0]))
    values = plan.by_group(torch.tensor(rewards, dtype=torch.float64).reshape(1, 1, -1))[n]
    return Objective(REFERENCE, (1.0,))(group, key, velocity, velocity, values).advantages[0]


def standard(*values):
    values = torch.tensor(values, dtype=torch.float64)
    return (values - values.mean()) / values.std()


def test_flow_grpo():
    plan = flow_grpo(FOUR, 2, trained={1})
    stochastic = sde((0, 0), (1, 1))
    assert moves(plan) == [stochastic, stochastic, stochastic, ode(0, 1)]
    assert plan.starts == ((0, 0), (1, 1)) and plan.evaluations == 8 and plan.trained_states == 2
    assert trained(plan) == [(1, (0, 1), (((0,), (1,)),))]
    assert plan.groups[0].draws == (draw_word(1, 0), draw_word(1, 1))
    assert torch.allclose(advantages(plan, [1.0, 4.0], 0), standard(1, 4))


def test_dance_grpo():
    """From one noise, which is evaluated once; the constant noise scale."""
    schedule = make_schedule(4, entropy_threshold=0, eta=0.3, sde_form="dance_grpo")
    plan = flow_grpo(schedule, 3, trained={0, 2}, same_noise=True)
    each = sde((0, 0), (1, 1), (2, 2))
    assert moves(plan) == [sde((0, 0), (0, 1), (0, 2)), each, each, ode(0, 1, 2)]
    assert plan.starts == ((0, 0),) and plan.evaluations == 1 + 3 * 3 and plan.trained_states == 1 + 3
    view = ((0,), (1,), (2,))
    assert trained(plan) == [(0, (0,), (view,)), (2, (0, 1, 2), (view,))]
    assert plan.image_rows == (0, 1, 2), "shared by both groups, rewarded once"
    for n in (0, 1):
        assert torch.allclose(advantages(plan, [1.0, 4.0, 2.0], n), standard(1, 4, 2))
    assert all(schedule.sigma(index) == 0.3 for index in range(4))


def test_mix_grpo():
    plan = mix_grpo(FIVE, 2, range(1, 3), tail_stride=2)
    assert moves(plan) == [ode(0), sde((0, 0), (0, 1)), sde((0, 0), (1, 1)), ode(0, 1, length=2)]
    assert plan.evaluations == 1 + 1 + 2 + 2
    view = ((0,), (1,))
    assert trained(plan) == [(1, (0,), (view,)), (2, (0, 1), (view,))]
    assert torch.allclose(advantages(plan, [1.0, 4.0], 1), standard(1, 4))


def test_branch_grpo():
    plan = branch_grpo(FOUR, [0, 1], 2, trained=range(3))
    leaves = (0, 2, 1, 3)  # the children of row 0, then those of row 1
    assert moves(plan) == [
        sde((0, 0), (0, 1)),
        sde((0, 0), (0, 2), (1, 1), (1, 3)),
        sde((0, 0), (1, 1), (2, 2), (3, 3)),
        ode(0, 1, 2, 3),
    ]
    single = singly(leaves)
    assert trained(plan) == [(0, (0,), (((0, 2), (1, 3)),)), (1, (0, 1), (single,)), (2, leaves, (single,))]
    assert plan.evaluations == 1 + 2 + 4 + 4 and plan.trained_states == 1 + 2 + 4
    assert plan.image_rows == leaves
    rewards = [1.0, 2.0, 3.0, 6.0]
    assert torch.allclose(advantages(plan, rewards, 0), standard(1.5, 4.5)), "fused upwards, among its depth"
    assert torch.allclose(advantages(plan, rewards, 1), standard(*rewards))
    assert [group.index for group in branch_grpo(FOUR, [0, 1], 2, trained=[0]).groups] == [0]


def test_a_tree_is_deterministic_until_it_splits():
    plan = branch_grpo(FOUR, [1], 3, trained=range(3))
    assert moves(plan)[:2] == [ode(0), sde((0, 0), (0, 1), (0, 2))]
    assert [group.index for group in plan.groups] == [1, 2]


def test_granular_grpo():
    schedule = make_schedule(4, entropy_threshold=0, active_steps=[0, 2])
    plan = granular_grpo(schedule, [2, 2], [1, 2])
    assert moves(plan) == [
        ode(0) + sde((0, 1), (0, 2)),
        [*ode(0, 1), (1, 3, 2, False), *ode(2), (2, 4, 2, False)],  # tails of stride 1, and of 2 in rows of their own
        sde((0, 5), (0, 6)) + ode(1, 2),
        [*ode(1, 2, 3, 4, 5), (5, 7, 1, False), *ode(6), (6, 8, 1, False)],
    ]
    assert plan.evaluations == 1 + 3 + 3 + 6 and plan.trained_states == 2
    assert trained(plan) == [(0, (0,), (((1,), (2,)), ((3,), (4,)))), (2, (0,), (((5,), (6,)), ((7,), (8,))))]
    found = advantages(plan, [1.0, 4.0, 9.0, 2.0, 0.0, 5.0, 1.0, 1.0], 0)
    assert torch.allclose(found, standard(1, 4) + standard(9, 2), atol=1e-12), "advantages added, not rewards"
    assert torch.allclose(advantages(plan, [1.0, 4.0, 9.0, 2.0, 0.0, 5.0, 1.0, 1.0], 1), standard(0, 5))


def test_tempflow_grpo():
    plan = tempflow_grpo(FOUR, 2, [0, 2])
    assert moves(plan) == [
        ode(0) + sde((0, 1), (0, 2)),
        ode(0, 1, 2),
        sde((0, 3), (0, 4)) + ode(1, 2),
        ode(1, 2, 3, 4),
    ]
    assert plan.evaluations == 1 + 3 + 3 + 4 and plan.trained_states == 2
    assert trained(plan) == [(0, (0,), (((1,), (2,)),)), (2, (0,), (((3,), (4,)),))]
    levels = [FOUR.sde(index, 1).s for index in (0, 2)]
    weights = [group.weight for group in plan.groups]
    assert sum(weights) == pytest.approx(2) and weights[0] / weights[1] == pytest.approx(levels[0] / levels[1])


def test_e_grpo_shares_no_images_between_steps():
    plan = e_grpo(make_schedule(4, merge_lengths=[1, 1, 2, 1], active_steps=[0, 2]), [2, 3], [2, 1])
    assert trained(plan) == [(0, (0,), (((1,), (2,)),)), (2, (0,), (((3,), (4,), (5,)),))]
    assert plan.evaluations_alone == 2 * (1 + 2) + 3 * (2 + 1)
    rewards = [1.0, 4.0, 2.0, 0.0, 7.0]
    assert torch.allclose(advantages(plan, rewards, 1), standard(2, 0, 7))


# Gradients


SIX = make_schedule(6, entropy_threshold=0, active_steps=[0, 1, 3])
PLANS = {
    "e_grpo": e_grpo(make_schedule(6, active_steps=[0, 1, 3]), [4, 3, 5], [1, 2, 1]),
    "flow_grpo": flow_grpo(SIX, 4, {0, 3, 4}),
    "dance_grpo": flow_grpo(replace(SIX, sde_form="dance_grpo", eta=0.3), 4, {0, 3}, same_noise=True),
    "mix_grpo": mix_grpo(SIX, 5, range(1, 4)),
    "branch_grpo": branch_grpo(SIX, [0, 2], 2, range(5)),
    "granular_grpo": granular_grpo(SIX, [4, 3, 5], [1, 2, 3]),
    "tempflow_grpo": tempflow_grpo(SIX, 4, [0, 1, 2, 4]),
    "cps": flow_grpo(replace(SIX, sde_form="cps", eta=0.8), 4, range(5)),
    "antithetic": e_grpo(make_schedule(6, active_steps=[0, 1, 3]), [4, 3, 6], [1, 2, 1], antithetic=True),
    "antithetic tree": branch_grpo(SIX, [0, 2], 2, range(5), antithetic=True),
    "pruned tree": branch_grpo(SIX, [0, 1, 2], 2, range(5), extremes=1),
}


def velocity_of(weight):
    return lambda x, t, rows: x @ weight * (1 + t) + 0.1 * rows[:, None, None]


def rolled_out(plan, weight):
    """A rollout in float64, and every row of states that the model saw, images included."""
    seen = []

    def watching(x, t, rows):
        seen.append(x.clone())
        return velocity_of(weight)(x, t, rows)

    wavefront = Wavefront(
        plan, 2, SHAPE, REFERENCE, dtype=torch.float64, model_dtype=torch.float64, keep_samples=True
    )
    rollout = wavefront.run(watching, KEY)
    return rollout, torch.cat([*seen, rollout.final_latents.flatten(0, 1)])


def stored_samples(plan, rollout, n, p, velocity):
    """The samples of group n and prompt p as the rollout drew them: [S, each, ...]."""
    group, step = plan.groups[n], plan.groups[n].step
    states = rollout.states[n].unflatten(0, (2, -1))[p]
    mean = step.c_x * states + step.c_v * velocity.detach().unflatten(0, (2, -1))[p]
    streams = torch.tensor([[KEY.iteration, int(KEY.prompts[p]), draw] for draw in group.draws])
    eps = philox_normal(streams, 12, KEY.seed, torch.float64) * torch.tensor(group.signs)[:, None]
    return mean[:, None] + step.s * eps.reshape(len(group.sources), -1, *SHAPE)


WEIGHTS = torch.tensor([0.7, 0.3], dtype=torch.float64)


def by_hand(group, place, rewards, mix, baseline, normalise):
    """Advantages [G] of one prompt from two rewards [2, images], view by view and reward by reward."""
    total = torch.zeros(group.size, dtype=torch.float64)
    terms = [(1.0, WEIGHTS @ rewards)] if mix == "reward" else list(zip(WEIGHTS, rewards))
    for view in group.views:
        for weight, reward in terms:
            values = torch.stack([torch.stack([reward[place[row]] for row in rows]).mean() for rows in view])
            mean = values.mean() if baseline == "mean" else (values.sum() - values) / (len(values) - 1)
            total += weight * (values - mean) / (values.std() if normalise == "std" else 1.0)
    return total


@pytest.mark.parametrize("log_prob", ["replayed", "stored"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("normalise", ["std", "none"])
@pytest.mark.parametrize("mix", ["reward", "advantage"])
@pytest.mark.parametrize("name", PLANS)
def test_gradient_equals_brute_force_score_function(name, mix, normalise, baseline, log_prob):
    """On policy, against stored samples, full log-densities and autograd, in float64, over all groups and prompts."""
    plan = PLANS[name]
    weight = (torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 4).requires_grad_()
    rollout, seen = rolled_out(plan, weight.detach())
    images = rollout.final_latents
    rewards = torch.stack((images.sin().mean((2, 3)), images.square().mean((2, 3))))
    objective = Objective(REFERENCE, (0.7, 0.3), mix, baseline=baseline, scale_rewards=normalise)
    by_group, kept = plan.by_group(rewards), plan.unpruned(objective.mixed(rewards))
    place = {row: i for i, row in enumerate(plan.image_rows)}
    ours = brute = 0.0
    for n, group in enumerate(plan.groups):
        rows = torch.arange(2).repeat_interleave(len(group.sources))
        velocity = velocity_of(weight)(rollout.states[n], group.time, rows)
        stored = (rollout.states[n], rollout.samples[n]) if log_prob == "stored" else None
        ours = ours + objective(group, KEY, velocity, velocity.detach(), by_group[n], kept[n], stored).loss
        for p in range(2):
            samples = stored_samples(plan, rollout, n, p, velocity)
            apart = (samples.reshape(-1, 1, 12) - seen.flatten(1)).abs().amax(-1).amin(1)
            assert apart.max() < 1e-9, "what is trained on is what the rollout went on from"
            states = rollout.states[n].unflatten(0, (2, -1))[p]
            mean = group.step.c_x * states + group.step.c_v * velocity.unflatten(0, (2, -1))[p]
            log_prob = torch.distributions.Normal(mean[:, None], group.step.s).log_prob(samples).mean((2, 3))
            chosen = by_hand(group, place, rewards[:, p], mix, baseline, normalise)
            if plan.extremes:
                leaves = sorted(plan.image_rows, key=lambda row: WEIGHTS @ rewards[:, p, place[row]])
                best_and_worst = {*leaves[: plan.extremes], *leaves[-plan.extremes :]}
                on_the_way = [bool(best_and_worst & set(rows)) for rows in group.views[0]]
                assert group.index == 0 or not all(on_the_way)
                chosen = chosen * torch.tensor(on_the_way)
            brute = brute - group.weight * (chosen * log_prob.flatten()).mean() / 2
    (our_gradient,) = torch.autograd.grad(ours, weight, retain_graph=True)
    (brute_gradient,) = torch.autograd.grad(brute, weight)
    assert brute_gradient.norm() > 1e-3
    assert torch.allclose(our_gradient, brute_gradient, rtol=1e-9, atol=1e-13)


def test_trajectories_of_one_prompt_start_from_noises_of_their_own():
    _, seen = rolled_out(PLANS["flow_grpo"], torch.eye(4, dtype=torch.float64))
    first = seen[:8].unflatten(0, (2, 4))
    for sample in range(4):
        own = initial_noise(KEY.seed, KEY.iteration, KEY.prompts, SHAPE, torch.float64, sample=sample)
        assert torch.equal(first[:, sample], own)
    assert not torch.allclose(first[:, 0], first[:, 1], atol=0.1)


def test_off_policy_ratios_of_antithetic_samples_equal_two_log_densities():
    plan, old = PLANS["antithetic"], torch.eye(4, dtype=torch.float64) / 4
    rollout, _ = rolled_out(plan, old)
    group, rows = plan.groups[0], torch.arange(2)
    before, after = (velocity_of(weight)(rollout.states[0], group.time, rows) for weight in (old, old + 0.05))
    rewards = torch.rand(1, 2, 4, dtype=torch.float64)
    found = Objective(REFERENCE, (1.0,))(group, KEY, after, before, rewards).log_ratio
    stored = rollout.states[0], rollout.samples[0]
    kept = Objective(REFERENCE, (1.0,))(group, KEY, after, before, rewards, stored=stored).log_ratio
    assert torch.allclose(found, kept, rtol=0, atol=1e-12) and found.abs().min() > 1e-4
    for p in range(2):
        samples = stored_samples(plan, rollout, 0, p, before)[0]
        old_log, new_log = (
            torch.distributions.Normal(group.step.c_x * rollout.states[0][p] + group.step.c_v * v[p], group.step.s)
            .log_prob(samples).mean((1, 2))
            for v in (before, after)
        )  # fmt: skip
        assert torch.allclose(found[p], new_log - old_log, rtol=0, atol=1e-12)


def test_antithetic_pairs_share_their_noise_with_opposite_signs():
    group = PLANS["antithetic"].groups[1]  # of three
    assert group.signs == (1, -1, 1) and group.draws == (draw_word(1, 0), draw_word(1, 0), draw_word(1, 2))


@pytest.mark.parametrize("backend", ["triton", "extension"])
def test_mirrored_samples_on_every_backend(backend):
    plan, weight = PLANS["antithetic"], torch.eye(4) / 4
    latents = [
        Wavefront(plan, 2, SHAPE, ops.choose(name), model_dtype=torch.bfloat16)
        .run(lambda x, t, rows: x.float() @ weight * (1 + t), KEY)
        .final_latents
        for name in ("reference", backend)
    ]
    assert torch.allclose(*latents, rtol=0, atol=2e-2)


# What changes over training


def test_steps_chosen_at_random_are_a_function_of_the_iteration():
    drawn = [chosen_steps(15, 0.6, 7, iteration) for iteration in range(200)]
    assert drawn == [chosen_steps(15, 0.6, 7, iteration) for iteration in range(200)]
    assert {len(steps) for steps in drawn} == {9} and len(set(drawn)) > 150
    assert set().union(*drawn) == set(range(15)) and chosen_steps(15, 0.01, 7, 0)


def test_the_window_slides_to_the_end_and_stays():
    starts = [sliding_window(4, 1, 25, 15, iteration).start for iteration in (0, 24, 25, 50, 275, 5000)]
    assert starts == [0, 0, 1, 2, 11, 11]


def test_pruned_steps_slide_towards_the_last_split():
    assert unpruned_steps(15, 3, 30, 9, 0) == list(range(12))
    assert unpruned_steps(15, 3, 30, 9, 59) == [*range(11), 14]
    assert unpruned_steps(15, 3, 30, 9, 5000) == [*range(10), 13, 14]


def test_a_wavefront_takes_the_plan_of_every_iteration():
    """Tables are kept where only what is trained changes, and rows where their number does not; results do not care."""
    weight = torch.eye(4, dtype=torch.float64) / 4
    plans = [flow_grpo(SIX, 4, {0}), flow_grpo(SIX, 4, {3}), mix_grpo(SIX, 4, range(1, 3)), PLANS["granular_grpo"]]
    made = Wavefront(plans[0], 2, SHAPE, REFERENCE, dtype=torch.float64, model_dtype=torch.float64)
    first = made.tables
    for plan in plans:
        made.use(plan)
        assert (made.tables is first) == (plan in plans[:2])
        expected, _ = rolled_out(plan, weight)
        assert torch.equal(made.run(velocity_of(weight), KEY).final_latents, expected.final_latents)


def test_group_sizes_by_spread():
    assert group_sizes_by_spread([1.0, 1.0, 1.0], 12) == [4, 4, 4]
    assert group_sizes_by_spread([3.0, 1.0], 16) == [12, 4], "as the spreads are to each other"
    assert group_sizes_by_spread([1.0, 0.0], 10) == [8, 2]
    with pytest.raises(ValueError, match="total: 5 samples for 3 groups, at least 6"):
        group_sizes_by_spread([1.0, 1.0, 1.0], 5)


@pytest.mark.parametrize("name", ["flow_grpo", "dance_grpo", "mix_grpo"])
def test_a_dropped_image_has_no_advantage_at_any_step(name):
    plan = PLANS[name]
    rewards = torch.rand(1, 1, len(plan.image_rows), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rewards[0, 0, 1] = torch.nan
    filled, share = fill_dropped(plan.compared(rewards))
    assert share == pytest.approx(1 / rewards.numel())
    for n in range(len(plan.groups)):
        found = advantages(plan, filled.flatten().tolist(), n)
        assert found[1].abs() < 1e-12 and (found[[0, 2]] != 0).all()


def test_a_dropped_tail_leaves_the_others_to_tell():
    """Granular-GRPO: one of a sample's tails is lost; what the other says of the sample still counts."""
    plan = granular_grpo(make_schedule(4, entropy_threshold=0, active_steps=[0]), [3], [1, 2])
    filled, _ = fill_dropped(plan.compared(torch.tensor([[[1.0, 4.0, 2.0, 9.0, torch.nan, 2.0]]])))
    found = advantages(plan, filled.flatten().tolist(), 0)
    assert torch.allclose(found, standard(1, 4, 2) + standard(9, 5.5, 2))


# The configuration


@pytest.mark.parametrize(
    ("overrides", "rows", "steps"),
    [
        pytest.param(["method=e_grpo"], 97, range(8), id="e_grpo"),
        pytest.param(["method=flow_grpo"], 12, range(15), id="flow_grpo"),
        pytest.param(["method={name: flow_grpo, window: 2, same_noise: true}"], 12, None, id="flow_grpo fast"),
        pytest.param(["method.name=dance_grpo"], 12, None, id="dance_grpo"),
        pytest.param(["method=mix_grpo"], 12, range(1, 5), id="mix_grpo"),
        pytest.param(["method=branch_grpo"], 16, range(15), id="branch_grpo"),
        pytest.param(["method=granular_grpo"], 193, range(8), id="granular_grpo"),
        pytest.param(["method=tempflow_grpo"], 181, range(15), id="tempflow_grpo"),
    ],
)
def test_every_method_by_its_name(overrides, rows, steps, tmp_path):
    config = load_config("shapes", overrides)
    plan = plan_of(config, 30)
    assert plan.num_rows == rows and (steps is None or [group.index for group in plan.groups] == list(steps))
    assert all(group.step.s > 0 for group in plan.groups)
    (tmp_path / "again.yaml").write_text(config.yaml())
    assert plan_of(load_config(str(tmp_path / "again.yaml")), 30) == plan


def test_a_method_brings_its_noise():
    def noise(*overrides):
        schedule = load_config("shapes", overrides).schedule
        return schedule.sde_form, schedule.eta

    assert noise() == ("flow_grpo", 0.7) and noise("method=dance_grpo") == ("dance_grpo", 0.3)
    assert noise("method=mix_grpo", "schedule.sde_form=cps") == ("cps", 0.8)
    assert noise("method=dance_grpo", "schedule.sde_form=flow_grpo", "schedule.eta=0.5") == ("flow_grpo", 0.5)


BAD = {
    "method=grpo": "method: .*'e_grpo'",
    "method={name: mix_grpo, windoww: 3}": "method.windoww: unknown key; did you mean method.window?",
    "method.window=3": "method.window: not used by method e_grpo; leave it out",
    "method={name: mix_grpo, window: 16}": "method.window: 16 steps pass the end; allowed: up to 15",
    "method={name: flow_grpo, window: 9}": "method.window: 9 steps pass the end of .0, 8.; allowed: up to 8",
    "method={name: flow_grpo, window: 2, window_range: [4, 16]}": "method.window_range: 16 is past the end",
    "method={name: flow_grpo, window_range: [0, 4]}": "method.window_range: not used without method.window",
    "method={name: flow_grpo, window: 2, fraction: 0.5}": "method.fraction: not used with method.window",
    "method={name: branch_grpo, splits: [0, 15]}": "method.splits: 15 is the last step or past it; allowed: 0 to 14",
    "method={name: branch_grpo, splits: [3, 0]}": "method.splits: .* must be increasing",
    "method={name: branch_grpo, branching: 3}": "method.max_rows: a tree of 81 leaves is wider than 64",
    "method={name: branch_grpo, extremes: 9}": "method.extremes: 9 best and worst of 16; at most 8",
    "method={name: branch_grpo, pruned_steps: 6}": "method.pruned_steps: 6; after the last split at most 5",
    "method={name: tempflow_grpo, steps: [3, 15]}": "method.steps: 15 is the last step or past it",
    "schedule={sde_form: cps, entropy_threshold: 3.5}": "schedule.sde_form: cps adds no noise in a step to t = 0",
    "schedule={sde_form: cps, eta: 1.2}": "schedule.eta: 1.2; with sde_form cps at most 1",
}


@pytest.mark.parametrize("override", BAD)
def test_what_no_plan_can_be_made_of_is_refused_by_name(override):
    with pytest.raises(ConfigError, match=BAD[override]):
        load_config("shapes", [override])


@pytest.mark.parametrize(
    ("method", "override"),
    [
        ("flow_grpo", "schedule.entropy_threshold=2"),
        ("flow_grpo", "tail.stride=2"),
        ("dance_grpo", "schedule.merge_lengths=2"),
        ("mix_grpo", "schedule.active_steps=[0]"),
        ("branch_grpo", "rollout.group_size=8"),
        ("granular_grpo", "tail.stride=2"),
        ("granular_grpo", "schedule.max_merge=2"),
        ("tempflow_grpo", "schedule.active_steps=[0, 1]"),
    ],
)
def test_a_setting_that_the_method_does_not_use_is_refused_by_name(method, override):
    field = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{field}: not used by method {method}"):
        load_config("shapes", [f"method={method}", override])


def test_a_method_of_ones_own_is_one_short_file(tmp_path):
    """A file in a folder of a user: it trains, its settings are a recipe's, and a whole run trains with it."""
    lines = Path(__file__).with_name("toy_method.py").read_text().splitlines()
    assert len(lines) < 60
    (tmp_path / "toy_method.py").write_text("\n".join(lines))
    program = """
import json
import toy_method
from egrpo_fast.api import Trainer
from egrpo_fast.config import ConfigError, load_config, plan_of

means = toy_method.train()
assert sum(means[-10:]) / 10 > sum(means[:10]) / 10 + 0.5
config = load_config("shapes", ["method.name=late_pairs", "method.first=5"])
assert [group.index for group in plan_of(config, 0).groups] == [5, 6, 7]
for wrong in ("method.first=13", "method.last=5", "method.window=2", "tail.stride=2"):
    try:
        load_config("shapes", ["method.name=late_pairs", wrong])
    except ConfigError as error:
        print(error)
short = {"schedule": {"num_steps": 8}, "evaluation": {"num_prompts": 1, "num_inference_steps": 2}}
folder = Trainer("shapes", method={"name": "late_pairs"}, iterations=1, **short).train().folder
lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
assert [list(line["spread_by_step"]["shapes_soft"]) for line in lines if "spread_by_step" in line] == [["3", "4", "5"]]
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-3000:]
    refused = ["method.first: 13; allowed: 0 to 12", "method.last: unknown key"]
    refused += ["method.window: not used by method late_pairs", "tail.stride: not used by method late_pairs"]
    assert all(told in run.stdout for told in refused), run.stdout


def test_a_method_that_nobody_imported_is_refused_by_name():
    with pytest.raises(ConfigError, match="^method: 'late_pairs' is no method; .*once its file is imported$"):
        load_config("shapes", ["method=late_pairs"])


def test_a_method_is_checked_where_the_schedule_is_none_too():
    with pytest.raises(ConfigError, match="schedule: 5: "):
        load_config("shapes", ["schedule=5", "method={antithetic: 1}"])
    with pytest.raises(ConfigError, match="method: 5: "):
        load_config("shapes", ["method=5"])
    with pytest.raises(ConfigError, match="method: 5 is no method"):
        load_config("shapes", ["method={name: 5}"])


def test_the_name_of_a_method_is_taken_once():
    with pytest.raises(TypeError, match="has a method e_grpo already"):
        type("Other", (Method,), {"name": "e_grpo", "__annotations__": {"name": str}, "__module__": "other"})
    with pytest.raises(TypeError, match="a method needs a default for `name`"):
        type("Nameless", (Method,), {})
