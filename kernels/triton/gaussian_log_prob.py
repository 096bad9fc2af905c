"""`mean_p log N(x'_p; c_x x_p + c_v v_p, s^2)` of every stored sample, and its gradient for the velocity."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from egrpo_fast.kernels.triton.launch import BLOCK, OPTIONS, blocks_of, on_device
from egrpo_fast.kernels.triton.reduction import sum_partials
from egrpo_fast.kernels.triton.rounding import positive, round_to


@triton.jit
def _standard_residual(
    sample, latents, velocity, coefficients, sample_stride, latents_stride, velocity_stride, row, position, inside
):
    """`z = (x' - c_x x - c_v v) / s` of one row at the positions, 0 outside the row; also c_v and s."""
    y = tl.load(sample + row * sample_stride + position, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(latents + row * latents_stride + position, mask=inside, other=0.0)
    v = tl.load(velocity + row * velocity_stride + position, mask=inside, other=0.0).to(tl.float32)
    c_x = tl.load(coefficients + row * 3)
    c_v = tl.load(coefficients + row * 3 + 1)
    s = positive(tl.load(coefficients + row * 3 + 2))
    return tl.div_rn(y - (c_x * x + c_v * v), s), c_v, s


@triton.jit
def _gaussian_log_prob_kernel(
    sample,
    latents,
    velocity,
    coefficients,
    partials,
    sample_stride,
    latents_stride,
    velocity_stride,
    numel,
    blocks,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    z, _, _ = _standard_residual(
        sample, latents, velocity, coefficients, sample_stride, latents_stride, velocity_stride, row, position,
        position < numel,
    )  # fmt: skip
    tl.store(partials + tl.program_id(0), tl.sum(z * z, 0))


@triton.jit
def _gaussian_log_prob_rows_kernel(partials, coefficients, log_prob, numel, blocks, TILE: tl.constexpr):
    row = tl.program_id(0)
    s = positive(tl.load(coefficients + row * 3 + 2)).to(tl.float64)
    half_log_two_pi: tl.constexpr = 0.9189385332046727
    value = -0.5 * sum_partials(partials, row, blocks, TILE) / numel - tl.log(s) - half_log_two_pi
    tl.store(log_prob + row, value.to(tl.float32))


@triton.jit
def _gaussian_log_prob_backward_kernel(
    gradient,
    sample,
    latents,
    velocity,
    coefficients,
    velocity_gradient,
    sample_stride,
    latents_stride,
    velocity_stride,
    numel,
    blocks,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = position < numel
    z, c_v, s = _standard_residual(
        sample, latents, velocity, coefficients, sample_stride, latents_stride, velocity_stride, row, position, inside
    )
    scale = tl.load(gradient + row) * tl.div_rn(c_v, s * numel)
    value = round_to(scale * z, velocity_gradient.dtype.element_ty)
    tl.store(velocity_gradient + row * numel + position, value, mask=inside)


@torch.library.custom_op("egrpo_fast_triton::gaussian_log_prob", mutates_args=())
def gaussian_log_prob(sample: Tensor, latents: Tensor, velocity: Tensor, coefficients: Tensor) -> Tensor:
    """Two launches, the second of R programs. Bytes per element: 4 + v + sample read (bfloat16: 8), none written."""
    rows, numel = latents.shape[0], latents.shape[1:].numel()
    blocks = blocks_of(numel)
    log_prob = latents.new_empty(rows)
    if rows:
        partials = latents.new_empty(rows, blocks)
        with on_device(latents):
            _gaussian_log_prob_kernel[(rows * blocks,)](
                sample, latents, velocity, coefficients, partials, sample.stride(0), latents.stride(0),
                velocity.stride(0), numel, blocks, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
            _gaussian_log_prob_rows_kernel[(rows,)](
                partials, coefficients, log_prob, numel, blocks, TILE=512, **OPTIONS
            )
    return log_prob


@gaussian_log_prob.register_fake
def _(sample: Tensor, latents: Tensor, velocity: Tensor, coefficients: Tensor) -> Tensor:
    return latents.new_empty(latents.shape[0])


@torch.library.custom_op("egrpo_fast_triton::gaussian_log_prob_backward", mutates_args=())
def gaussian_log_prob_backward(
    gradient: Tensor, sample: Tensor, latents: Tensor, velocity: Tensor, coefficients: Tensor
) -> Tensor:
    """`dL/dv = dL/d(log_prob) c_v z / (s N)`. One launch. Bytes: 4 + v + sample read, v written (bfloat16: 10)."""
    velocity_gradient = velocity.new_empty(velocity.shape)
    rows, numel = latents.shape[0], latents.shape[1:].numel()
    if rows:
        with on_device(latents):
            _gaussian_log_prob_backward_kernel[(rows * blocks_of(numel),)](
                gradient.contiguous(), sample, latents, velocity, coefficients, velocity_gradient, sample.stride(0),
                latents.stride(0), velocity.stride(0), numel, blocks_of(numel), BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return velocity_gradient


@gaussian_log_prob_backward.register_fake
def _(gradient: Tensor, sample: Tensor, latents: Tensor, velocity: Tensor, coefficients: Tensor) -> Tensor:
    return velocity.new_empty(velocity.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient: Tensor) -> tuple[None, None, Tensor, None]:
    return None, None, gaussian_log_prob_backward(gradient, *ctx.saved_tensors), None


gaussian_log_prob.register_autograd(_backward, setup_context=_save)
