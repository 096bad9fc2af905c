"""Second stage of a mean over a row: its blocks' partial sums, added in one fixed order. No atomics, equal bits."""

import triton
import triton.language as tl


@triton.jit
def sum_partials(partials, row, blocks, TILE: tl.constexpr):
    """`sum_b partials[row, b]`, float64; one program per row."""
    lanes = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float64)
    for first in range(0, blocks, TILE):
        block = first + lanes
        total += tl.load(partials + row.to(tl.int64) * blocks + block, mask=block < blocks, other=0.0)
    return tl.sum(total, 0)
