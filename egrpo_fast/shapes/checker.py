"""Judges of an image against its caption, batched and device-agnostic: no learnt part, so nothing to fool but vision.

A pixel p is unmixed into background b and the colour c of a thing, `p = b + a (c - b) + residual`; its membership in
the thing is `m = a exp(-|residual|^2 / T)`, right on antialiased edges too. Memberships meet a bank of rendered masks
t, one for every hypothesis (shape, size, place) and every jitter of place and size, in the Tanimoto overlap

    J(m, t) = m.t / (|m|^2 + |t|^2 - m.t)                1 where m = t; paint of that colour elsewhere lowers it

and J of a hypothesis is the best over its jitters. Then

    soft score = exp(-dirt / 100) * mean over things of J(right) * softmax(30 J over all hypotheses)[right]

with dirt the number of pixels outside the things that are not background: another thing, noise and texture all cost.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from egrpo_fast.shapes.world import (
    BACKGROUND,
    CENTRES,
    PALETTE,
    PLACES,
    RADII,
    SCALE,
    SHAPES,
    SHIFT,
    SIDE,
    SIZES,
    coverage,
    layout,
    parse,
)

TEMPERATURE = 0.06
"""Squared RGB distance at which a pixel stops being of a colour."""
SHARPNESS = 30.0
DIRT_SCALE = 100.0
MIN_OVERLAP, MAX_DIRT = 0.8, 15.0
"""What `strict` asks of every thing and of the background (pixels)."""


def check(prompts: Sequence[str], height: int, width: int) -> None:
    """ValueError where a run's prompts or images are not of the Shapes world."""
    if (height, width) != (SIDE, SIDE):
        raise ValueError(f"judges images of {SIDE}x{SIDE} pixels, not {height}x{width}")
    for prompt in prompts:
        parse(prompt)


@lru_cache(maxsize=4)
def bank(device: torch.device) -> tuple[Tensor, Tensor]:
    """Masks of all hypotheses, (shape, size, place) row-major, with all jitters, and the same one pixel wider:
    float32 [40, J, 1024] each."""
    shifts = torch.linspace(-SHIFT, SHIFT, 5).tolist()
    scales = torch.linspace(1 - SCALE, 1 + SCALE, 3).tolist()
    jitters = torch.tensor(list(product(shifts, shifts, scales)), device=device)
    hypotheses = product(range(len(SHAPES)), range(len(SIZES)), range(len(PLACES)))
    shape, size, place = torch.tensor(list(hypotheses), device=device).T[:, :, None]
    centre = torch.tensor(CENTRES, device=device)[place] + jitters[:, :2]
    radius = torch.tensor(RADII, device=device)[size] * jitters[:, 2]
    shape = shape.expand_as(radius)
    masks = [coverage(shape, centre, radius, margin).flatten(-2) for margin in (0.0, 1.0)]
    return masks[0], masks[1]


def evidence(images: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the images show of what the captions say.

    images float [B, 3, 32, 32] in [0, 1]; captions of `world`'s grammar. Returns overlap float32 [B, 2, 40] of every
    hypothesis in the colour of each thing, right int64 [B, 2] the hypothesis of the caption, present bool [B, 2] and
    dirt float32 [B] in pixels.
    """
    if images.shape != (len(captions), 3, SIDE, SIDE):
        raise ValueError(f"images has shape {tuple(images.shape)}, expected ({len(captions)}, 3, {SIDE}, {SIDE})")
    device = images.device
    index = layout([parse(caption) for caption in captions]).to(device)
    present = index[..., 0] >= 0
    shape, colour, size, place = index.clamp(min=0).unbind(-1)
    right = (shape * len(SIZES) + size) * len(PLACES) + place
    masks, wide_masks = bank(device)

    background = torch.tensor(BACKGROUND, device=device)
    pixels = images.float().nan_to_num().clamp(0, 1).flatten(2).mT - background
    direction = (torch.tensor(list(PALETTE.values()), device=device) - background)[colour]
    amount = (direction @ pixels.mT / direction.square().sum(-1, keepdim=True)).clamp(0, 1)
    residual = (pixels[:, None] - amount[..., None] * direction[:, :, None]).square().sum(-1)
    membership = amount * torch.exp(-residual / TEMPERATURE)

    cross = (membership @ masks.flatten(0, 1).T).unflatten(-1, masks.shape[:2])
    squares = membership.square().sum(-1)[..., None, None] + masks.square().sum(-1)
    overlap, jitter = (cross / (squares - cross)).max(-1)

    best = jitter.gather(-1, right[..., None]).squeeze(-1)
    outside = (1 - wide_masks[right, best] * present[..., None]).prod(1)
    foreground = 1 - torch.exp(-(pixels.square().sum(-1) / TEMPERATURE).square())
    return overlap, right, present, (outside * foreground).sum(-1)


def soft_score(images: Tensor, captions: Sequence[str]) -> Tensor:
    """Graded agreement of images with captions: images float [B, 3, 32, 32] in [0, 1] -> float32 [B] in [0, 1]."""
    overlap, right, present, dirt = evidence(images, captions)
    graded = (overlap * torch.softmax(SHARPNESS * overlap, dim=-1)).gather(-1, right[..., None]).squeeze(-1)
    return (graded * present).sum(-1) / present.sum(-1) * torch.exp(-dirt / DIRT_SCALE)


def strict(images: Tensor, captions: Sequence[str]) -> Tensor:
    """Everything right: the best hypothesis of every thing is the caption's, overlaps it well, and the rest is clean.
    images float [B, 3, 32, 32] in [0, 1] -> bool [B]."""
    overlap, right, present, dirt = evidence(images, captions)
    best, hypothesis = overlap.max(-1)
    return ((hypothesis == right) & (best >= MIN_OVERLAP) | ~present).all(-1) & (dirt <= MAX_DIRT)
