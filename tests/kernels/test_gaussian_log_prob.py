"""`gaussian_log_prob`: value and velocity gradient against float64, determinism, gradcheck of the reference."""

import pytest
import torch

from egrpo_fast.kernels.reference import gaussian_log_prob_ref
from egrpo_fast.ops import Ops

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def with_gradient(ops: Ops, sample, latents, velocity, coefficients, weight):
    velocity = velocity.detach().requires_grad_()
    log_prob = ops.gaussian_log_prob(sample, latents, velocity, coefficients)
    (log_prob * weight).sum().backward()
    return log_prob.detach(), velocity.grad


def test_matches_float64(triton_ops, reference_ops, normal, coefficients, judge, dtype, shape):
    rows = 2
    x, v, weight = normal(rows, *shape), normal(rows, *shape, dtype=dtype), normal(rows)
    y, c = normal(rows, *shape, dtype=dtype), coefficients(rows, noisy=True)
    result, gradient = with_gradient(triton_ops, y, x, v, c, weight)
    eager, eager_gradient = with_gradient(reference_ops, y, x, v, c, weight)
    truth, true_gradient = with_gradient(reference_ops, y.double(), x.double(), v.double(), c.double(), weight.double())
    judge("log_prob", result, eager, truth)
    judge("velocity.grad", gradient, eager_gradient, true_gradient)


def test_views(triton_ops, normal, coefficients, aligned):
    x, v, y, c, weight = normal(4, 160), normal(4, 160), normal(4, 160), coefficients(4, noisy=True), normal(4)
    expected = with_gradient(triton_ops, y, x, v, c, weight)
    view = aligned(v).detach().requires_grad_()
    result = triton_ops.gaussian_log_prob(aligned(y), aligned(x), view, c)
    (gradient,) = torch.autograd.grad((result * weight).sum(), view)
    assert torch.equal(result, expected[0]) and torch.equal(gradient, expected[1])


def test_unaligned_views(triton_ops, normal, coefficients, unaligned):
    x, v, y, c, weight = normal(4, 160), normal(4, 160), normal(4, 160), coefficients(4, noisy=True), normal(4)
    expected = with_gradient(triton_ops, y, x, v, c, weight)
    one, other = (with_gradient(triton_ops, cut(y), cut(x), cut(v), c, weight) for cut in unaligned)
    torch.testing.assert_close(one[0], expected[0])
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], expected[1]) and torch.equal(other[1], expected[1])


def test_the_sum_has_one_order(triton_ops, normal, coefficients):
    x, v, y, c = normal(3, 40_000), normal(3, 40_000), normal(3, 40_000), coefficients(3, noisy=True)
    first, again = (triton_ops.gaussian_log_prob(y, x, v, c) for _ in range(2))
    assert torch.equal(first, again)
    alone = triton_ops.gaussian_log_prob(y[1:2], x[1:2], v[1:2], c[1:2])
    assert torch.equal(alone, first[1:2])


def test_no_rows(triton_ops, normal, coefficients):
    assert triton_ops.gaussian_log_prob(normal(0, 8), normal(0, 8), normal(0, 8), coefficients(0)).shape == (0,)


@pytest.mark.filterwarnings("ignore:(overflow|invalid):RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("scale", [1e15, 1e20, 1e-30, 1e-42], ids=str)
def test_huge_and_denormal(triton_ops, reference_ops, normal, coefficients, judge, scale):
    x, v, y, c = normal(2, 500) * scale, normal(2, 500) * scale, normal(2, 500) * scale, coefficients(2, noisy=True)
    result, gradient = with_gradient(triton_ops, y, x, v, c, torch.ones_like(c[:, 0]))
    eager, eager_gradient = with_gradient(reference_ops, y, x, v, c, torch.ones_like(c[:, 0]))
    truth, true_gradient = with_gradient(
        reference_ops, y.double(), x.double(), v.double(), c.double(), torch.ones_like(c[:, 0]).double()
    )
    judge("log_prob", result, eager, truth)
    judge("velocity.grad", gradient, eager_gradient, true_gradient)


def test_the_reference_gradient_is_the_derivative():
    torch.manual_seed(0)
    x, y, v = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(3))
    c = torch.tensor([[0.9, -0.2, 0.7], [0.8, -0.3, 0.4]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: gaussian_log_prob_ref(y, x, v, c), v.requires_grad_())
