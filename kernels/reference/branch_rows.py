"""Every source row's next state and that of all its branches, in place: the truth of `branch_rows`."""

import torch
from torch import Tensor

from egrpo_fast.kernels.reference.sde_step import sde_step_ref


def branch_rows_ref(
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
    """`latents[destinations[e]] = c_x latents[sources[i]] + c_v velocity[i] + s eps_e`, e in offsets[i]:offsets[i + 1].

    All sources are read before any destination is written. `model_latents`, where given, receives the same rows in
    its own dtype. Shapes and dtypes: see `egrpo_fast.ops.branch_rows`.
    """
    source_of_edge = torch.repeat_interleave(torch.arange(len(sources), device=sources.device), offsets.diff().long())
    streams = torch.stack((torch.full_like(draws, iteration), prompts[slots.long()], draws), dim=-1)
    rows = latents[sources.long()[source_of_edge]]
    model_dtype = latents.dtype if model_latents is None else model_latents.dtype
    following, copy = sde_step_ref(rows, velocity[source_of_edge], coefficients, streams, seed, model_dtype)
    latents.index_copy_(0, destinations.long(), following)
    if model_latents is not None:
        model_latents.index_copy_(0, destinations.long(), copy)
