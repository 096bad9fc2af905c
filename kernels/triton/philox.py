"""The noise contract on the device: Philox4x32-10, integer for integer as in `reference/philox.py`, and its normals."""

import triton
import triton.language as tl

SIGN = 0x80000000


def key_words(seed: int) -> tuple[int, int]:
    """The key's two 32-bit words, low first, as int32 bit patterns: one argument type whatever the seed."""
    words = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return tuple((word ^ SIGN) - SIGN for word in words)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on the counter (c0, c1, c2, c3) under the key (k0, k1), all uint32. Returns four uint32 words."""
    for _ in tl.static_range(10):
        # One widening multiply each: cheaper than separate high and low halves.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(a, b):
    """`sqrt(-2 ln u1) (cos, sin)(2 pi u2)` in float32, `u1 = ((a >> 8) + 1) / 2^24`, `u2 = (b >> 8) / 2^24`.

    The angle is reduced to a quarter turn and x in [-pi/4, pi/4] in integers, exactly, so that two short polynomials
    (minimax, 4e-9) do for sine and cosine: no slow path, no local memory. Against float64: the radius within 2^-22 of
    itself, cosine and sine within 2e-7, so a normal within 2e-6 at |eps| <= 5.77.
    """
    u = ((a >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt_rn(-2.0 * tl.log(u))
    turn = (b >> 8).to(tl.int32)
    quarter = (turn + 0x200000) >> 22
    x = (turn - (quarter << 22)).to(tl.float32) * 3.7450702829238413e-07
    square = x * x
    sine = tl.fma(tl.fma(square, -1.9517e-4, 8.33218e-3), square, -1.6666655e-1)
    sine = tl.fma(sine, square * x, x)
    cosine = tl.fma(tl.fma(square, 2.44384497e-5, -1.38873675e-3), square, 4.16666469e-2)
    cosine = tl.fma(tl.fma(cosine, square, -0.5), square, 1.0)
    odd = (quarter & 1) != 0
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = tl.where(((quarter + 1) & 2) != 0, -first, first)
    second = tl.where((quarter & 2) != 0, -second, second)
    return radius * first, radius * second


@triton.jit
def block_normals(block, iteration, prompt, draw, k0, k1, BLOCK: tl.constexpr):
    """eps of positions [block BLOCK, (block + 1) BLOCK) of stream (iteration, prompt, draw).

    Stream words are integers of any type below 2^32, key words int32 (`key_words`). Returns float32 [BLOCK].
    """
    counter = (block * (BLOCK // 4)).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    x0, x1, x2, x3 = philox4x32(
        counter,
        iteration.to(tl.uint32),
        prompt.to(tl.uint32),
        draw.to(tl.uint32),
        k0.to(tl.uint32, bitcast=True),
        k1.to(tl.uint32, bitcast=True),
    )
    n0, n1 = box_muller(x0, x1)
    n2, n3 = box_muller(x2, x3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
