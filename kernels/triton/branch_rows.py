"""Every source row's next state and that of all its branches, in place: one launch per grid step."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from egrpo_fast.kernels.triton.launch import BLOCK, OPTIONS, blocks_of, on_device
from egrpo_fast.kernels.triton.philox import block_normals, key_words
from egrpo_fast.kernels.triton.rounding import round_to


@triton.jit(do_not_specialize=["iteration", "k0", "k1"])
def _branch_rows_kernel(
    latents,
    model_latents,
    velocity,
    sources,
    offsets,
    destinations,
    coefficients,
    draws,
    slots,
    prompts,
    latents_stride,
    model_stride,
    velocity_stride,
    numel,
    blocks,
    iteration,
    k0,
    k1,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = position < numel
    # This program alone touches these elements of its source: read once, then any edge may overwrite them.
    source = tl.load(sources + index).to(tl.int64)
    x = tl.load(latents + source * latents_stride + position, mask=inside)
    v = tl.load(velocity + index.to(tl.int64) * velocity_stride + position, mask=inside).to(tl.float32)
    for edge in range(tl.load(offsets + index), tl.load(offsets + index + 1)):
        entry = tl.cast(edge, tl.int64)
        destination = tl.load(destinations + entry).to(tl.int64)
        c_x = tl.load(coefficients + entry * 3)
        c_v = tl.load(coefficients + entry * 3 + 1)
        s = tl.load(coefficients + entry * 3 + 2)
        following = c_x * x + c_v * v
        if s > 0:
            prompt = tl.load(prompts + tl.load(slots + entry))
            following += s * block_normals(block, iteration, prompt, tl.load(draws + entry), k0, k1, BLOCK)
        tl.store(latents + destination * latents_stride + position, following, mask=inside)
        if HAS_COPY:
            copy = model_latents + destination * model_stride + position
            tl.store(copy, round_to(following, model_latents.dtype.element_ty), mask=inside)


@torch.library.custom_op("egrpo_fast_triton::branch_rows", mutates_args=("latents", "model_latents"))
def branch_rows(
    latents: Tensor,
    model_latents: Tensor | None,
    velocity: Tensor,
    sources: Tensor,
    offsets: Tensor,
    destinations: Tensor,
    coefficients: Tensor,
    draws: Tensor,
    slots: Tensor,
    prompts: Tensor,
    iteration: int,
    seed: int,
) -> None:
    """One launch. Bytes per element: 4 + v read per source, 4 + copy written per edge (bfloat16: 6 S + 6 E)."""
    count, numel = sources.shape[0], latents.shape[1:].numel()
    if count:
        copy = latents if model_latents is None else model_latents
        with on_device(latents):
            _branch_rows_kernel[(count * blocks_of(numel),)](
                latents, copy, velocity, sources, offsets, destinations, coefficients, draws, slots, prompts,
                latents.stride(0), copy.stride(0), velocity.stride(0), numel, blocks_of(numel),
                key_words(iteration)[0], *key_words(seed), HAS_COPY=model_latents is not None, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip


@branch_rows.register_fake
def _(
    latents, model_latents, velocity, sources, offsets, destinations, coefficients, draws, slots, prompts,
    iteration, seed,
) -> None:  # fmt: skip
    return None
