"""`group_advantage_clip_loss`: advantages, loss, gradient and clip fraction against float64, and the odd groups."""

import pytest
import torch

from egrpo_fast.kernels.reference import group_advantage_clip_loss_ref
from egrpo_fast.ops import MIXES, Ops

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CLIP, BOUND = 1e-4, 5.0


def with_gradient(ops: Ops, rewards, log_ratio, weights, mix, clip_range=CLIP, advantage_clip=BOUND):
    log_ratio = log_ratio.detach().requires_grad_()
    loss, advantages, clip_fraction = ops.group_advantage_clip_loss(
        rewards, log_ratio, weights, mix, clip_range, advantage_clip
    )
    (3.0 * loss).backward()
    assert not advantages.requires_grad and not clip_fraction.requires_grad
    return loss.detach(), advantages, clip_fraction, log_ratio.grad


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("prompts", "steps", "samples", "rewards"), [(1, 1, 2, 1), (1, 8, 12, 2), (4, 8, 12, 1), (2, 3, 127, 3)]
)
def test_matches_float64(triton_ops, reference_ops, normal, judge, mix, prompts, steps, samples, rewards):
    scores, log_ratio = normal(rewards, prompts, steps, samples), 1e-4 * normal(prompts, steps, samples)
    weights = normal(rewards).abs()
    result = with_gradient(triton_ops, scores, log_ratio, weights, mix)
    eager = with_gradient(reference_ops, scores, log_ratio, weights, mix)
    truth = with_gradient(reference_ops, scores.double(), log_ratio.double(), weights.double(), mix)
    for what, *values in zip(("loss", "advantages", "clip_fraction", "log_ratio.grad"), result, eager, truth):
        judge(what, *values)


def test_any_strides(triton_ops, normal):
    scores, log_ratio, weights = normal(2, 4, 3, 12), 1e-4 * normal(4, 3, 12), normal(2).abs()
    expected = with_gradient(triton_ops, scores, log_ratio, weights, "advantage")
    scores, log_ratio = (tensor.transpose(-3, -1).contiguous().transpose(-3, -1) for tensor in (scores, log_ratio))
    assert not scores.is_contiguous()
    assert all(map(torch.equal, with_gradient(triton_ops, scores, log_ratio, weights, "advantage"), expected))


@pytest.mark.parametrize("backend", ["triton_ops", "reference_ops"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    "group",
    [[0.7], [0.1] * 12, [-3e38] * 5, [1e-45] * 4, [0.3, 0.3 + 2**-27, 0.3]],
    ids=["G=1", "equal", "huge", "denormal", "equal once rounded"],
)
def test_no_spread_no_advantage(request, backend, device, mix, group):
    scores = torch.tensor(group, device=device).reshape(1, 1, 1, -1)
    log_ratio = torch.zeros_like(scores[0])
    ops = request.getfixturevalue(backend)
    for value in with_gradient(ops, scores, log_ratio, scores.new_ones(1), mix):
        assert (value == 0).all()


@pytest.mark.parametrize("backend", ["triton_ops", "reference_ops"])
@pytest.mark.parametrize("scale", [2.0**-149, 1e-38, 1e-20, 1e20, 1e38], ids=str)
def test_advantages_do_not_depend_on_the_scale_of_rewards(request, backend, device, scale):
    """Squares of such rewards leave float32; their standardised values do not."""
    scores = (torch.tensor([0.0, 1.0, 2.0, 3.0], device=device).double() * scale).float().reshape(1, 1, 1, -1)
    ops = request.getfixturevalue(backend)
    _, advantages, _, _ = with_gradient(ops, scores, torch.zeros_like(scores[0]), scores.new_ones(1), "reward")
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5], device=device) / (5 / 3) ** 0.5
    torch.testing.assert_close(advantages.flatten(), expected, rtol=1e-6, atol=1e-6)


def test_ratios_far_outside_the_clip_range(triton_ops, reference_ops, normal, judge):
    scores = normal(1, 2, 2, 12)
    log_ratio = 40.0 * normal(2, 2, 12)
    weights = torch.ones(1, device=scores.device)
    result = with_gradient(triton_ops, scores, log_ratio, weights, "reward", 0.2)
    eager = with_gradient(reference_ops, scores, log_ratio, weights, "reward", 0.2)
    truth = with_gradient(reference_ops, scores.double(), log_ratio.double(), weights.double(), "reward", 0.2)
    for what, *values in zip(("loss", "advantages", "clip_fraction", "log_ratio.grad"), result, eager, truth):
        judge(what, *values)
    clipped = (truth[3] == 0) & (truth[1] != 0)
    assert torch.equal(result[2].double(), clipped.double().mean().float().double())


def test_advantages_are_bounded(triton_ops, device):
    scores = torch.zeros(1, 1, 1, 64, device=device)
    scores[..., 0] = 1.0
    _, advantages, _, _ = with_gradient(triton_ops, scores, torch.zeros_like(scores[0]), scores.new_ones(1), "reward")
    assert advantages.max() == BOUND


def test_the_reference_gradient_is_the_derivative():
    torch.manual_seed(0)
    scores = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    log_ratio = (0.3 * torch.randn(2, 3, 4, dtype=torch.float64)).requires_grad_()
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    for mix in MIXES:
        assert torch.autograd.gradcheck(
            lambda r, mix=mix: group_advantage_clip_loss_ref(scores, r, weights, mix, 0.2, BOUND)[0], log_ratio
        )
