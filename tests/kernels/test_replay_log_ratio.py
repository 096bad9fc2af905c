"""`replay_log_ratio`: value and gradient against float64, its precision inside the clip range, ratio 1 at no change."""

import pytest
import torch

from egrpo_fast.kernels.reference import gaussian_log_prob_ref, replay_log_ratio_ref, sde_step_ref
from egrpo_fast.ops import Ops
from egrpo_fast.schedule import make_schedule

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SEED = 2**40 + 11


def with_gradient(ops: Ops, velocity, old_velocity, coefficients, streams, weight):
    velocity = velocity.detach().requires_grad_()
    log_ratio = ops.replay_log_ratio(velocity, old_velocity, coefficients, streams, SEED)
    (log_ratio * weight).sum().backward()
    return log_ratio.detach(), velocity.grad


def test_matches_float64(triton_ops, reference_ops, normal, coefficients, streams, judge, dtype, shape):
    groups, samples = 2, 2
    old, step = normal(groups, *shape, dtype=dtype), normal(groups, *shape, dtype=dtype)
    new, weight = old + 0.05 * step, normal(groups, samples)
    c, s = coefficients(groups, noisy=True), streams(groups, samples)
    result, gradient = with_gradient(triton_ops, new, old, c, s, weight)
    eager, eager_gradient = with_gradient(reference_ops, new, old, c, s, weight)
    truth, true_gradient = with_gradient(reference_ops, new.double(), old.double(), c.double(), s, weight.double())
    judge("log_ratio", result, eager, truth)
    judge("velocity.grad", gradient, eager_gradient, true_gradient)


def inside_the_clip_range(normal, row):
    """New and old velocity and the coefficients of a low-entropy step, whose ratios lie within 1e-4 of 1."""
    old = normal(1, *row)
    step = make_schedule(entropy_threshold=0.0).sde(3, 1)
    return old + 2e-3 * normal(1, *row), old, old.new_tensor([[step.c_x, step.c_v, step.s]])


@pytest.mark.parametrize("row", [(64, 16), (2025, 64)], ids=["shapes", "flux"])
def test_precision_inside_the_clip_range(triton_ops, normal, streams, row):
    (new, old, c), s = inside_the_clip_range(normal, row), streams(1, 12)
    truth = replay_log_ratio_ref(new.double(), old.double(), c.double(), s, SEED)
    assert 1e-7 < truth.abs().max() < 1e-4
    assert (triton_ops.replay_log_ratio(new, old, c, s, SEED).double() - truth).abs().max() < 1e-7


def test_stored_samples_are_not_precise_enough(normal, streams, device):
    """Control: samples kept in bfloat16 and two log-probs subtracted, as public codes do, are 3e-4 off: three clips."""
    (new, old, c), s = inside_the_clip_range(normal, (64, 16)), streams(1, 12)
    truth = replay_log_ratio_ref(new.double(), old.double(), c.double(), s, SEED)[0]
    x = normal(1, 64, 16).expand(12, 64, 16)
    new, old, c = (tensor.expand(12, *tensor.shape[1:]) for tensor in (new, old, c))
    sample, _ = sde_step_ref(x, old, c, s[0], SEED, torch.float32)
    old_log_prob = gaussian_log_prob_ref(sample, x, old, c)
    difference = gaussian_log_prob_ref(sample.bfloat16(), x, new, c) - old_log_prob
    assert (difference.double() - truth).abs().max() > 2e-4


def test_no_change_is_ratio_one(triton_ops, normal, coefficients, streams, dtype):
    v = normal(2, 1000, dtype=dtype)
    assert torch.equal(
        triton_ops.replay_log_ratio(v, v.clone(), coefficients(2, noisy=True), streams(2, 3), SEED).exp(),
        torch.ones(2, 3, device=v.device),
    )


def test_views(triton_ops, normal, coefficients, streams, aligned):
    old, new, c, s, weight = normal(4, 160), normal(4, 160), coefficients(4, noisy=True), streams(4, 2), normal(4, 2)
    expected = with_gradient(triton_ops, new, old, c, s, weight)
    view = aligned(new).detach().requires_grad_()
    result = triton_ops.replay_log_ratio(view, aligned(old), c, s, SEED)
    (gradient,) = torch.autograd.grad((result * weight).sum(), view)
    assert torch.equal(result, expected[0]) and torch.equal(gradient, expected[1])


def test_unaligned_views(triton_ops, normal, coefficients, streams, unaligned):
    old, new, c, s, weight = normal(4, 160), normal(4, 160), coefficients(4, noisy=True), streams(4, 2), normal(4, 2)
    expected = with_gradient(triton_ops, new, old, c, s, weight)
    one, other = (with_gradient(triton_ops, cut(new), cut(old), c, s, weight) for cut in unaligned)
    torch.testing.assert_close(one[0], expected[0])
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], expected[1]) and torch.equal(other[1], expected[1])


def test_a_sample_knows_nothing_of_its_group(triton_ops, normal, coefficients, streams):
    new, old, c, s = normal(2, 40_000), normal(2, 40_000), coefficients(2, noisy=True), streams(2, 3)
    together = triton_ops.replay_log_ratio(new, old, c, s, SEED)
    assert torch.equal(together, triton_ops.replay_log_ratio(new, old, c, s, SEED)), "the sum has one order"
    alone = triton_ops.replay_log_ratio(new[1:], old[1:], c[1:], s[1:, 2:].contiguous(), SEED)
    assert torch.equal(alone, together[1:, 2:])


@pytest.mark.parametrize(("groups", "samples"), [(0, 3), (2, 0)])
def test_no_rows(triton_ops, normal, coefficients, streams, groups, samples):
    v, c = normal(groups, 8), coefficients(groups, noisy=True)
    assert triton_ops.replay_log_ratio(v, v, c, streams(groups, samples), SEED).shape == (groups, samples)


@pytest.mark.filterwarnings("ignore:(overflow|invalid):RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("scale", [1e15, 1e20, 1e-30, 1e-42], ids=str)
def test_huge_and_denormal(triton_ops, reference_ops, normal, coefficients, streams, judge, scale):
    new, old, c, s = normal(2, 500) * scale, normal(2, 500) * scale, coefficients(2, noisy=True), streams(2, 2)
    weight = torch.ones(2, 2, device=c.device)
    result, gradient = with_gradient(triton_ops, new, old, c, s, weight)
    eager, eager_gradient = with_gradient(reference_ops, new, old, c, s, weight)
    truth, true_gradient = with_gradient(reference_ops, new.double(), old.double(), c.double(), s, weight.double())
    judge("log_ratio", result, eager, truth)
    judge("velocity.grad", gradient, eager_gradient, true_gradient)


def test_it_is_the_difference_of_two_densities():
    """The identity itself, in float64, for samples drawn by the step; and its gradient by gradcheck."""
    torch.manual_seed(0)
    x, old, new = (torch.randn(1, 5, 4, dtype=torch.float64) for _ in range(3))
    c = torch.tensor([[0.9, -0.2, 0.7]], dtype=torch.float64)
    s = torch.tensor([[[1, 2, 3], [1, 2, 4], [9, 2, 4]]])
    rows = [tensor.expand(3, *tensor.shape[1:]) for tensor in (x, old, new, c)]
    sample, _ = sde_step_ref(rows[0], rows[1], rows[3], s[0], SEED, torch.float64)
    densities = [gaussian_log_prob_ref(sample, rows[0], v, rows[3]) for v in (rows[2], rows[1])]
    torch.testing.assert_close(replay_log_ratio_ref(new, old, c, s, SEED)[0], densities[0] - densities[1])
    assert torch.autograd.gradcheck(lambda v: replay_log_ratio_ref(v, old, c, s, SEED), new.requires_grad_())
