"""`x' = c_x x + c_v v + s eps`, row by row, with the model's copy in the same pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from egrpo_fast.kernels.triton.launch import BLOCK, OPTIONS, blocks_of, on_device
from egrpo_fast.kernels.triton.philox import block_normals, key_words
from egrpo_fast.kernels.triton.rounding import positive, round_to


@triton.jit(do_not_specialize=["k0", "k1"])
def _sde_step_kernel(
    latents,
    velocity,
    coefficients,
    streams,
    following,
    copy,
    latents_stride,
    velocity_stride,
    numel,
    blocks,
    k0,
    k1,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = position < numel
    x = tl.load(latents + row * latents_stride + position, mask=inside)
    v = tl.load(velocity + row * velocity_stride + position, mask=inside).to(tl.float32)
    c_x = tl.load(coefficients + row * 3)
    c_v = tl.load(coefficients + row * 3 + 1)
    s = tl.load(coefficients + row * 3 + 2)
    x = c_x * x + c_v * v
    if s != 0:
        words = streams + row * 3
        eps = block_normals(block, tl.load(words), tl.load(words + 1), tl.load(words + 2), k0, k1, BLOCK)
        x += positive(s) * eps
    tl.store(following + row * numel + position, x, mask=inside)
    if HAS_COPY:
        tl.store(copy + row * numel + position, round_to(x, copy.dtype.element_ty), mask=inside)


@torch.library.custom_op("egrpo_fast_triton::sde_step", mutates_args=())
def _sde_step(
    latents: Tensor,
    velocity: Tensor,
    coefficients: Tensor,
    streams: Tensor,
    seed: int,
    model_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    following, copy = _outputs(latents, velocity, coefficients, streams, seed, model_dtype)
    rows, numel = latents.shape[0], latents.shape[1:].numel()
    if rows:
        with on_device(latents):
            _sde_step_kernel[(rows * blocks_of(numel),)](
                latents, velocity, coefficients, streams, following, copy, latents.stride(0), velocity.stride(0),
                numel, blocks_of(numel), *key_words(seed), HAS_COPY=copy.numel() > 0, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return following, copy


@_sde_step.register_fake
def _outputs(
    latents: Tensor, velocity: Tensor, coefficients: Tensor, streams: Tensor, seed: int, model_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # An operator's outputs may not alias: where the model reads the state itself, the copy is an empty tensor.
    copied = latents.shape if model_dtype != latents.dtype else (0,)
    return latents.new_empty(latents.shape), latents.new_empty(copied, dtype=model_dtype)


def sde_step(
    latents: Tensor, velocity: Tensor, coefficients: Tensor, streams: Tensor, seed: int, model_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One launch. Bytes per element: 4 + v read, 4 + copy written (bfloat16: 12; the float32 state alone: 10)."""
    following, copy = _sde_step(latents, velocity, coefficients, streams, seed, model_dtype)
    return following, following if model_dtype == latents.dtype else copy
