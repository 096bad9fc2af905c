"""Philox4x32-10 and the normal numbers made from it, in plain PyTorch: the generator under the noise contract.

Unsigned 32-bit words are carried in int64 tensors, values in [0, 2^32). Source: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011); constants and known answers as in the authors' Random123 library.
"""

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def _multiply_high_low(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    # The 64-bit product wraps into int64's sign bit; masking after the arithmetic shift recovers its unsigned halves.
    product = word * multiplier
    return (product >> 32) & MASK, product & MASK


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten Philox rounds on a 128-bit counter under a 64-bit key.

    counter: four broadcastable int64 tensors of 32-bit words (word 0 first). seed: the key, word 0 its low half.
    Returns four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        high0, low0 = _multiply_high_low(MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(((a >> 8) + 1).double() * 2.0**-24))
    angle = (b >> 8).double() * (2.0 * math.pi * 2.0**-24)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def philox_normal(streams: Tensor, numel: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`eps[r, p] ~ N(0, 1)`, a pure function of (seed, streams[r], p).

    streams: int64 [..., 3], counter words 1 to 3 of each row. numel: elements of a row. Returns [..., numel].
    Element p = 4 b + j is output j of counter (b, *stream): words (0, 1) and (2, 3) are two Box-Muller pairs with
    `u1 = ((word_a >> 8) + 1) / 2^24` in (0, 1], `u2 = (word_b >> 8) / 2^24` in [0, 1),
    `(sqrt(-2 ln u1) cos 2 pi u2, sqrt(-2 ln u1) sin 2 pi u2)`. Both fractions are exact in float32, |eps| <= 5.77.
    Evaluated in float64 and rounded once, so a row's bits depend on neither its neighbours nor vector width.
    """
    blocks = torch.arange((numel + 3) // 4, device=streams.device)
    words = (word.unsqueeze(-1) for word in streams.unbind(-1))
    x0, x1, x2, x3 = philox4x32((blocks, *words), seed)
    normals = torch.stack((*_box_muller(x0, x1), *_box_muller(x2, x3)), dim=-1)
    return normals.flatten(-2)[..., :numel].to(dtype)
