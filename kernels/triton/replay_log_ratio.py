"""`log r_i = mean_p [eps_ip z_p - z_p^2 / 2]`, `z = c_v (v_new - v_old) / s`: noise drawn again, never stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from egrpo_fast.kernels.triton.launch import BLOCK, OPTIONS, blocks_of, on_device
from egrpo_fast.kernels.triton.philox import block_normals, key_words
from egrpo_fast.kernels.triton.reduction import sum_partials
from egrpo_fast.kernels.triton.rounding import positive, round_to


@triton.jit
def _standard_shift(velocity, old_velocity, coefficients, velocity_stride, old_stride, group, position, inside):
    """`z = (c_v / s) (v_new - v_old)` of one group at the positions, 0 outside the row; also c_v / s."""
    new = tl.load(velocity + group * velocity_stride + position, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(old_velocity + group * old_stride + position, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.load(coefficients + group * 3 + 1), positive(tl.load(coefficients + group * 3 + 2)))
    return (new - old) * scale, scale


@triton.jit
def _stream_normals(streams, row, block, k0, k1, BLOCK: tl.constexpr):
    words = streams + row * 3
    return block_normals(block, tl.load(words), tl.load(words + 1), tl.load(words + 2), k0, k1, BLOCK)


@triton.jit(do_not_specialize=["k0", "k1"])
def _replay_log_ratio_kernel(
    velocity,
    old_velocity,
    coefficients,
    streams,
    partials,
    velocity_stride,
    old_stride,
    numel,
    blocks,
    samples,
    k0,
    k1,
    BLOCK: tl.constexpr,
):
    group = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    position = block * BLOCK + tl.arange(0, BLOCK)
    z, _ = _standard_shift(
        velocity, old_velocity, coefficients, velocity_stride, old_stride, group, position, position < numel
    )
    for sample in range(samples):
        row = group * samples + sample
        eps = _stream_normals(streams, row, block, k0, k1, BLOCK)
        tl.store(partials + row * blocks + block, tl.sum(z * (eps - 0.5 * z), 0))


@triton.jit
def _replay_log_ratio_rows_kernel(partials, log_ratio, numel, blocks, TILE: tl.constexpr):
    row = tl.program_id(0)
    tl.store(log_ratio + row, (sum_partials(partials, row, blocks, TILE) / numel).to(tl.float32))


@triton.jit(do_not_specialize=["k0", "k1"])
def _replay_log_ratio_backward_kernel(
    gradient,
    velocity,
    old_velocity,
    coefficients,
    streams,
    velocity_gradient,
    velocity_stride,
    old_stride,
    numel,
    blocks,
    samples,
    k0,
    k1,
    BLOCK: tl.constexpr,
):
    group = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = position < numel
    z, scale = _standard_shift(
        velocity, old_velocity, coefficients, velocity_stride, old_stride, group, position, inside
    )
    total = tl.zeros([BLOCK], tl.float32)
    for sample in range(samples):
        row = group * samples + sample
        eps = _stream_normals(streams, row, block, k0, k1, BLOCK)
        total += tl.load(gradient + row) * (eps - z)
    value = round_to(tl.div_rn(scale, tl.cast(numel, tl.float32)) * total, velocity_gradient.dtype.element_ty)
    tl.store(velocity_gradient + group * numel + position, value, mask=inside)


@torch.library.custom_op("egrpo_fast_triton::replay_log_ratio", mutates_args=())
def replay_log_ratio(
    velocity: Tensor, old_velocity: Tensor, coefficients: Tensor, streams: Tensor, seed: int
) -> Tensor:
    """Two launches, the second of S G programs. Bytes per element and group: two velocities read, whatever G."""
    (groups, samples), numel = streams.shape[:2], velocity.shape[1:].numel()
    blocks = blocks_of(numel)
    log_ratio = coefficients.new_empty(groups, samples)
    if groups * samples:
        partials = coefficients.new_empty(groups, samples, blocks)
        with on_device(velocity):
            _replay_log_ratio_kernel[(groups * blocks,)](
                velocity, old_velocity, coefficients, streams, partials, velocity.stride(0), old_velocity.stride(0),
                numel, blocks, samples, *key_words(seed), BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
            _replay_log_ratio_rows_kernel[(groups * samples,)](partials, log_ratio, numel, blocks, TILE=512, **OPTIONS)
    return log_ratio


@replay_log_ratio.register_fake
def _(velocity: Tensor, old_velocity: Tensor, coefficients: Tensor, streams: Tensor, seed: int) -> Tensor:
    return coefficients.new_empty(streams.shape[:2])


@torch.library.custom_op("egrpo_fast_triton::replay_log_ratio_backward", mutates_args=())
def replay_log_ratio_backward(
    gradient: Tensor, velocity: Tensor, old_velocity: Tensor, coefficients: Tensor, streams: Tensor, seed: int
) -> Tensor:
    """`dL/dv = c_v / (s N) sum_i dL/d(log r_i) (eps_i - z)`. One launch; two velocities read, one gradient written."""
    velocity_gradient = velocity.new_empty(velocity.shape)
    (groups, samples), numel = streams.shape[:2], velocity.shape[1:].numel()
    if groups:
        with on_device(velocity):
            _replay_log_ratio_backward_kernel[(groups * blocks_of(numel),)](
                gradient.contiguous(), velocity, old_velocity, coefficients, streams, velocity_gradient,
                velocity.stride(0), old_velocity.stride(0), numel, blocks_of(numel), samples, *key_words(seed),
                BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return velocity_gradient


@replay_log_ratio_backward.register_fake
def _(gradient, velocity: Tensor, old_velocity, coefficients, streams, seed) -> Tensor:
    return velocity.new_empty(velocity.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.seed = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    return replay_log_ratio_backward(gradient, *ctx.saved_tensors, ctx.seed), None, None, None, None


replay_log_ratio.register_autograd(_backward, setup_context=_save)
