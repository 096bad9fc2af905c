"""The objective's gradient is the policy gradient, and its ratio is 1 before the first update."""

import pytest
import torch

from egrpo_fast import ops
from egrpo_fast.kernels.reference.group_advantage_clip_loss import group_advantage_ref
from egrpo_fast.kernels.reference.philox import philox_normal
from egrpo_fast.methods.e_grpo import e_grpo
from egrpo_fast.objective import Objective, policy_mismatch
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.schedule import make_schedule

SHAPE = (3, 4)
SCHEDULE = make_schedule(8, active_steps=[0, 1, 3])
PLAN = e_grpo(SCHEDULE, [6, 5, 4], [1, 1, 1])
REFERENCE = ops.choose("reference")
KEY = NoiseKey(3, 2, torch.tensor([4, 9]))


def linear_model(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 4, dtype=torch.float64, generator=generator) / 4
    return weight.requires_grad_()


def velocity_of(weight):
    return lambda x, t, rows: x @ weight * (1 + t) + 0.1 * rows[:, None, None]


def rollout_of(weight):
    wavefront = Wavefront(PLAN, 2, SHAPE, REFERENCE, dtype=torch.float64, model_dtype=torch.float64)
    return wavefront.run(velocity_of(weight), KEY)


def made_up_rewards(rollout, n, first):
    images = rollout.final_latents[:, first : first + PLAN.groups[n].size]
    return torch.stack((images.sin().mean((2, 3)), images.square().mean((2, 3))))


@pytest.mark.parametrize("mix", ["reward", "advantage"])
def test_gradient_equals_brute_force_score_function(mix):
    """Against stored samples, full log-densities and autograd, in float64; summed over active steps and prompts."""
    weight = linear_model()
    rollout = rollout_of(weight)
    objective = Objective(REFERENCE, (0.7, 0.3), mix, clip_range=1e-4)
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
    rows, first = torch.arange(2), 0
    ours = brute = 0.0
    for n, group in enumerate(PLAN.groups):
        time = SCHEDULE.times[group.index]
        rewards = made_up_rewards(rollout, n, first)
        first += group.size
        velocity = velocity_of(weight)(rollout.states[n], time, rows)
        ours = ours + objective(group, KEY, velocity, velocity.detach(), rewards).loss

        advantages = group_advantage_ref(rewards[:, :, None], weights, mix, 5.0)[:, 0]
        step, terms = group.step, []
        for p, prompt in enumerate(KEY.prompts.tolist()):
            mean = step.c_x * rollout.states[n][p] + step.c_v * velocity[p]
            for i, draw in enumerate(group.draws):
                eps = philox_normal(torch.tensor([[2, prompt, draw]]), 12, 3, torch.float64).reshape(SHAPE)
                sample = (mean + step.s * eps).detach()
                log_prob = torch.distributions.Normal(mean, step.s).log_prob(sample).mean()
                terms.append(advantages[p, i] * log_prob)
        brute = brute - torch.stack(terms).mean()
    (our_gradient,) = torch.autograd.grad(ours, weight, retain_graph=True)
    (brute_gradient,) = torch.autograd.grad(brute, weight)
    assert brute_gradient.norm() > 1e-3
    assert torch.allclose(our_gradient, brute_gradient, rtol=1e-10, atol=1e-14)


def test_log_ratio_equals_two_log_densities_after_an_update():
    """Off policy: replayed ratios against stored samples under the old and the new weights, float64."""
    old_weight, new_weight = linear_model(0), linear_model(0).detach() + 0.02
    rollout = rollout_of(old_weight.detach())
    group, rows = PLAN.groups[1], torch.arange(2)
    time = SCHEDULE.times[group.index]
    old, new = (velocity_of(w.detach())(rollout.states[1], time, rows) for w in (old_weight, new_weight))
    part = Objective(REFERENCE, (1.0,))(group, KEY, new, old, torch.rand(1, 2, 5, dtype=torch.float64))
    for p, prompt in enumerate(KEY.prompts.tolist()):
        for i, draw in enumerate(group.draws):
            eps = philox_normal(torch.tensor([[2, prompt, draw]]), 12, 3, torch.float64).reshape(SHAPE)
            means = [group.step.c_x * rollout.states[1][p] + group.step.c_v * v[p] for v in (old, new)]
            sample = means[0] + group.step.s * eps
            before, after = (torch.distributions.Normal(mean, group.step.s).log_prob(sample) for mean in means)
            assert part.log_ratio[p, i] == pytest.approx((after - before).mean().item(), abs=1e-13)


def test_ratio_is_one_before_the_first_update_and_not_after():
    weight = linear_model()
    rollout = rollout_of(weight.detach())
    rewards = torch.rand(1, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v = velocity_of(weight)(rollout.states[0], 1.0, torch.arange(2))
    before = Objective(REFERENCE, (1.0,))(PLAN.groups[0], KEY, v, v.detach(), rewards)
    assert torch.equal(before.log_ratio.exp(), torch.ones(2, 6, dtype=torch.float64))
    after = Objective(REFERENCE, (1.0,))(PLAN.groups[0], KEY, v + 0.01, v.detach(), rewards)
    assert (after.log_ratio.exp() != 1).all()


def test_clipping_stops_the_gradient_of_samples_that_have_gone_far_enough():
    advantages = torch.tensor([[[3.0, 1.0, -1.0, -3.0]]]).double()
    log_ratio = torch.tensor([[[0.1, -0.1, -0.1, 0.1]]], dtype=torch.float64, requires_grad=True)
    loss, told, clip_fraction = REFERENCE.group_advantage_clip_loss(
        advantages[None], log_ratio, torch.ones(1).double(), "reward", 0.05, 5.0
    )
    loss.backward()
    assert (told[0, 0].sign() == torch.tensor([1, 1, -1, -1])).all()
    # Up and good, down and bad: past the clip, no gradient. Down and good, up and bad: pulled back with full weight.
    assert (log_ratio.grad[0, 0] == 0).tolist() == [True, False, True, False]
    assert clip_fraction == 0.5


def test_advantages():
    rewards = torch.tensor([[[[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]], [[[0.0, 0.0, 9.0], [1.0, 2.0, 3.0]]]]).double()
    weights = torch.tensor([1.0, 0.5]).double()
    mixed = group_advantage_ref(rewards, weights, "advantage", 5.0)[0]
    nine = torch.tensor([-3.0, -3.0, 6.0]) / torch.tensor([-3.0, -3.0, 6.0]).std()
    assert torch.allclose(mixed[0], torch.tensor([-1.0, 0.0, 1.0]).double() + 0.5 * nine.double(), atol=1e-6)
    assert torch.allclose(mixed[1], 0.5 * torch.tensor([-1.0, 0.0, 1.0]).double())
    summed = group_advantage_ref(rewards, weights, "reward", 5.0)[0, 0]
    total = torch.tensor([1.0, 2.0, 7.5]).double()
    assert torch.allclose(summed, (total - total.mean()) / total.std())
    assert group_advantage_ref(rewards, weights, "advantage", 0.3).abs().max() == 0.3


def test_a_group_without_spread_has_no_advantage():
    constant = torch.full((1, 1, 1, 4), 0.1)
    assert torch.equal(group_advantage_ref(constant, torch.ones(1), "reward", 5.0), torch.zeros(1, 1, 4))
    assert torch.equal(group_advantage_ref(constant[..., :1], torch.ones(1), "reward", 5.0), torch.zeros(1, 1, 1))


def test_policy_mismatch_is_in_units_of_the_steps_noise():
    v = torch.randn(2, *SHAPE)
    group = PLAN.groups[0]
    assert policy_mismatch(group, v, v) == 0
    shifted = policy_mismatch(group, v + 0.5, v)
    assert shifted == pytest.approx(abs(0.5 * group.step.c_v / group.step.s), rel=1e-5)
