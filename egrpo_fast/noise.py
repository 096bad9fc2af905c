"""The noise contract: every random normal of a run is a pure function of (seed, stream, position).

A stream is (iteration, prompt, step, sample). Its normals come from Philox4x32-10 with

    key     = (seed mod 2^32, seed div 2^32)
    counter = (position div 4, iteration, prompt, step * 2^16 + sample)      four 32-bit words, word 0 first

and position mod 4 selects the output (see `kernels/reference/philox.py` for the bits from words to normals).

- position:  index of the element in the packed latents [tokens, channels] of one image, row-major; < 2^34
- iteration: training iteration, from 0; 0 in evaluation
- prompt:    number of the prompt in the endless order of draws over all epochs and ranks (`prompts/order.py`), so that
             noise knows nothing of ranks, batches or micro-batches; in evaluation its index in the prompt file
- step:      grid index of the active step (< 0xFFFE), or one of the two names below
- sample:    member of the group, < 2^16; for the names below the trajectory's number, 0 where all share one noise

Every backend takes the same bits: equal integers, normals equal to rounding. Nothing else in a run draws normals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who only plans needs the words of streams, and does not wait for torch
    import torch
    from torch import Tensor

INITIAL = 0xFFFF
"""Step word of the noise that a training prompt's trajectories start from."""
EVALUATION = 0xFFFE
"""Step word of the noise that an evaluation image starts from, the same at every evaluation."""


def draw_word(step: int, sample: int) -> int:
    """Counter word 3 of a stream. ValueError: step or sample is larger than its 16 bits, or below 0."""
    if not (0 <= step <= INITIAL and 0 <= sample <= 0xFFFF):
        raise ValueError(f"noise: step {step} and sample {sample} are not both from 0 to 65,535")
    return step << 16 | sample


def streams(iteration: int, prompts: Tensor, draws: Tensor) -> Tensor:
    """Counter words 1 to 3 of every (prompt, draw): prompts int64 [P], draws int64 [G] of `draw_word`s -> [P, G, 3]."""
    import torch

    return streams_of(iteration, *torch.broadcast_tensors(prompts[:, None], draws[None, :]))


def streams_of(iteration: int, prompts: Tensor, draws: Tensor) -> Tensor:
    """The same of pairs of them: int64 [...] twice -> [..., 3]."""
    import torch

    return torch.stack((torch.full_like(prompts, iteration), prompts, draws), dim=-1)


def initial_noise(
    seed: int,
    iteration: int,
    prompts: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    step: int = INITIAL,
    sample: int = 0,
) -> Tensor:
    """`x_1 ~ N(0, I)` of every prompt. prompts int64 [P]; shape: (tokens, channels). dtype: else float32.

    Returns [P, *shape].
    """
    import torch

    from egrpo_fast.kernels.reference.philox import philox_normal

    draws = torch.full((1,), draw_word(step, sample), device=prompts.device)
    numel = torch.Size(shape).numel()
    normals = philox_normal(streams(iteration, prompts, draws)[:, 0], numel, seed, dtype or torch.float32)
    return normals.reshape(-1, *shape)
