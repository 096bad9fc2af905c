"""Rounding of float32 results to what the model reads, and what a wrong standard deviation reads as."""

import triton
import triton.language as tl

from egrpo_fast.kernels.triton.launch import INTERPRETED

IN_SOFTWARE = tl.constexpr(INTERPRETED)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 -> dtype, to nearest even: the device's own conversion.

    Triton's interpreter truncates on the way to bfloat16, so there the rounding is spelt out on the bits.
    """
    if IN_SOFTWARE and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A NaN could round to infinity; its payload does not matter.
        nearest = tl.where(x == x, nearest, 0x7FC0)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def positive(s):
    """s where it is above 0, else NaN: a density that is none must not look like one."""
    return tl.where(s > 0, s, float("nan"))
