"""`sde_step`: Triton against the reference in float32, both judged by the reference in float64."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SEED = 2**62 + 987654321


def test_matches_float64(triton_ops, reference_ops, normal, coefficients, streams, judge, dtype, shape):
    rows = 2
    x, v, c, s = normal(rows, *shape), normal(rows, *shape, dtype=dtype), coefficients(rows), streams(rows)
    result, copy = triton_ops.sde_step(x, v, c, s, SEED, dtype)
    eager, eager_copy = reference_ops.sde_step(x, v, c, s, SEED, dtype)
    truth, _ = reference_ops.sde_step(x.double(), v.double(), c.double(), s, SEED)
    judge("latents", result, eager, truth)
    judge("copy", copy, eager_copy, truth)
    assert torch.equal(copy, result.to(dtype)), "the copy is not the rounded state"
    assert torch.equal(result[1], eager[1]), "a row without noise must equal the reference bit for bit"


def test_views(triton_ops, normal, coefficients, streams, layout):
    x, v = normal(4, 160), normal(4, 160, dtype=torch.bfloat16)
    expected = triton_ops.sde_step(x, v, coefficients(4), streams(4), SEED, torch.bfloat16)
    result = triton_ops.sde_step(layout(x), layout(v), coefficients(4), streams(4), SEED, torch.bfloat16)
    assert all(map(torch.equal, result, expected))


def test_rows_farther_apart_than_int32(triton_ops, normal, coefficients, streams, device):
    """Addresses are 64-bit: the third row starts 2^31 elements behind the first. Only touched pages take memory."""
    x, v = normal(3, 160), normal(3, 160, dtype=torch.bfloat16)
    far = torch.empty(2**31 + 160, dtype=torch.bfloat16, device=device).as_strided((3, 160), (2**30, 1))
    far.copy_(v)
    expected, _ = triton_ops.sde_step(x, v, coefficients(3), streams(3), SEED)
    assert torch.equal(triton_ops.sde_step(x, far, coefficients(3), streams(3), SEED)[0], expected)


def test_a_row_knows_nothing_of_its_neighbours(triton_ops, normal, coefficients, streams):
    x, v, c, s = normal(5, 300), normal(5, 300), coefficients(5, noisy=True), streams(5)
    together, _ = triton_ops.sde_step(x, v, c, s, SEED)
    alone = [triton_ops.sde_step(x[i : i + 1], v[i : i + 1], c[i : i + 1], s[i : i + 1], SEED)[0] for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_no_rows(triton_ops, normal, coefficients, streams):
    result, copy = triton_ops.sde_step(normal(0, 8), normal(0, 8), coefficients(0), streams(0), SEED, torch.bfloat16)
    assert result.shape == copy.shape == (0, 8) and copy.dtype == torch.bfloat16


def test_the_state_is_its_own_copy(triton_ops, normal, coefficients, streams):
    result, copy = triton_ops.sde_step(normal(1, 8), normal(1, 8), coefficients(1), streams(1), SEED)
    assert copy is result


@pytest.mark.filterwarnings("ignore:(overflow|invalid):RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("scale", [1e37, 3e38, 1e-38, 1e-43], ids=str)
def test_huge_and_denormal(triton_ops, reference_ops, normal, coefficients, streams, judge, scale):
    x, v, c, s = normal(2, 500) * scale, normal(2, 500) * scale, coefficients(2), streams(2)
    c[:, 2] *= scale
    result, copy = triton_ops.sde_step(x, v, c, s, SEED, torch.bfloat16)
    eager, _ = reference_ops.sde_step(x, v, c, s, SEED)
    truth, _ = reference_ops.sde_step(x.double(), v.double(), c.double(), s, SEED)
    judge("latents", result, eager, truth)
    exactly = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(copy, result.to(torch.bfloat16), **exactly)
    torch.testing.assert_close(result[1], eager[1], **exactly)
