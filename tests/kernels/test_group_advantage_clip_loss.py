"""`group_advantage_clip_loss`: advantages, loss, gradient and clip fraction against float64, and the odd groups."""

import pytest
import torch

from egrpo_fast.kernels import reference, triton
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
        # Advantages of a group cancel in the loss.
        judge(what, *values, terms=truth[1].abs().mean().item() if what == "loss" else 0.0)


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


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("backend", ["triton_ops", "reference_ops"])
@pytest.mark.parametrize("log_ratio", [89.0, 1e4, torch.inf])
def test_a_ratio_that_overflows(request, backend, device, log_ratio):
    """Where the clip binds, the gradient is 0, and not 0 times infinity; where it does not, the loss is infinite."""
    scores = torch.tensor([1.0, -1.0], device=device).reshape(1, 1, 1, 2)
    ops = request.getfixturevalue(backend)
    for sample in (0, 1):
        ratios = torch.zeros_like(scores[0])
        ratios[..., sample] = log_ratio
        loss, advantages, clip_fraction, gradient = with_gradient(ops, scores, ratios, scores.new_ones(1), "reward")
        assert clip_fraction == (0.5 if sample == 0 else 0.0)
        good, bad = advantages.flatten().tolist()
        # 3 times -A / 2, as `with_gradient` weighs the loss.
        expected = [0.0, -1.5 * bad] if sample == 0 else [-1.5 * good, torch.inf]
        assert gradient.flatten().tolist() == pytest.approx(expected, rel=1e-6)
        assert loss.isfinite() if sample == 0 else loss == torch.inf


NOT_NUMBERS = {
    "NaN": ([0.0, torch.nan, 1.0, 2.0], 1.0),
    "all NaN": ([torch.nan] * 4, 1.0),
    "infinity": ([0.0, torch.inf, 1.0, 2.0], 1.0),
    "minus infinity": ([0.0, -torch.inf, 1.0, 2.0], 1.0),
    "equal infinities": ([torch.inf] * 4, 1.0),
    "an infinite range": ([-3e38, 3e38, 0.0, 0.0], 1.0),
    "infinite once weighted": ([0.0, 1e38, 2e38, 0.0], 10.0),
    "weight NaN": ([0.0, 1.0, 2.0, 3.0], torch.nan),
}


@pytest.mark.filterwarnings("ignore:(overflow|invalid|All-NaN):RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("backend", [triton, reference], ids=["triton", "reference"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("group", "weight"), NOT_NUMBERS.values(), ids=NOT_NUMBERS.keys())
def test_what_is_not_a_number_does_not_become_one(device, backend, mix, group, weight):
    """Also where nobody looks at values before: the loss is NaN, and so are the advantages of that group alone."""
    scores = torch.tensor([group, [0.0, 1.0, 2.0, 3.0]], device=device).reshape(1, 1, 2, 4)
    weights = scores.new_tensor([weight])
    loss, advantages, _ = backend.OPS["group_advantage_clip_loss"](
        scores, torch.zeros_like(scores[0]), weights, mix, CLIP, BOUND
    )
    if mix == "advantage" and weight == 10.0:
        assert loss.isfinite() and advantages.isfinite().all(), "each reward is standardised before it is weighted"
    else:
        assert loss.isnan() and advantages[0, 0].isnan().all()
        assert advantages[0, 1].isnan().all() if weight != weight else advantages[0, 1].isfinite().all()


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
