"""The noise contract's bits and the normals made from them, in the reference and on the device."""

import math

import pytest
import scipy.stats
import torch
import triton
import triton.language as tl

from egrpo_fast.kernels.reference import philox as reference
from egrpo_fast.kernels.triton.launch import BLOCK, INTERPRETED, OPTIONS, blocks_of
from egrpo_fast.kernels.triton.philox import block_normals, box_muller, key_words, philox4x32

KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
"""Counter, key (word 0 low) and output, from the kat_vectors of the Random123 library."""


@triton.jit(do_not_specialize=["k0", "k1"])
def _words_kernel(counter, words, k0, k1, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    x0, x1, x2, x3 = philox4x32(
        tl.load(counter + lanes * 4 + 0).to(tl.uint32),
        tl.load(counter + lanes * 4 + 1).to(tl.uint32),
        tl.load(counter + lanes * 4 + 2).to(tl.uint32),
        tl.load(counter + lanes * 4 + 3).to(tl.uint32),
        k0.to(tl.uint32, bitcast=True),
        k1.to(tl.uint32, bitcast=True),
    )
    tl.store(words + lanes * 4 + 0, x0.to(tl.int64))
    tl.store(words + lanes * 4 + 1, x1.to(tl.int64))
    tl.store(words + lanes * 4 + 2, x2.to(tl.int64))
    tl.store(words + lanes * 4 + 3, x3.to(tl.int64))


@triton.jit(do_not_specialize=["k0", "k1"])
def _normals_kernel(streams, normals, numel, k0, k1, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    words = streams + tl.program_id(1) * 3
    eps = block_normals(block, tl.load(words), tl.load(words + 1), tl.load(words + 2), k0, k1, BLOCK)
    position = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(normals + tl.program_id(1) * numel + position, eps, mask=position < numel)


@triton.jit
def _box_muller_kernel(a, b, first, second, BLOCK: tl.constexpr):
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = box_muller(tl.load(a + position).to(tl.uint32), tl.load(b + position).to(tl.uint32))
    tl.store(first + position, x)
    tl.store(second + position, y)


def device_box_muller(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = torch.empty(2, len(a), device=a.device)
    block = 2**20 if INTERPRETED else BLOCK
    _box_muller_kernel[(len(a) // block,)](a, b, first, second, BLOCK=block, **OPTIONS)
    return first, second


def device_words(counters: torch.Tensor, seed: int) -> torch.Tensor:
    words = torch.empty_like(counters)
    _words_kernel[(1,)](counters, words, *key_words(seed), SIZE=len(counters))
    return words


def device_normals(streams: torch.Tensor, numel: int, seed: int) -> torch.Tensor:
    normals = torch.full((len(streams), numel), math.nan, device=streams.device)
    grid = (blocks_of(numel), len(streams))
    _normals_kernel[grid](streams, normals, numel, *key_words(seed), BLOCK=BLOCK, **OPTIONS)
    return normals


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS.keys())
def test_known_answers(device, counter, key, answer):
    counters = torch.tensor([counter] * 4, device=device)
    expected = torch.tensor([answer] * 4, device=device)
    assert torch.equal(torch.stack(reference.philox4x32(counters.unbind(-1), key), -1), expected)
    assert torch.equal(device_words(counters, key), expected)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63 - 1])
def test_words_equal_the_reference(device, seed):
    generator = torch.Generator().manual_seed(seed)
    counters = torch.randint(0, 2**32, (512, 4), generator=generator).to(device)
    expected = torch.stack(reference.philox4x32(counters.unbind(-1), seed), -1)
    assert torch.equal(device_words(counters, seed), expected)


def test_radii_and_angles(device):
    """One fraction in eight of either word, both ends among them: the bounds that `box_muller` states."""
    fractions = torch.arange(2**21, device=device)
    fractions = 8 * fractions + fractions % 8
    radius, nothing = device_box_muller(fractions << 8, torch.zeros_like(fractions))
    truth = (-2.0 * ((fractions + 1).double() * 2.0**-24).log()).sqrt()
    assert ((radius.double() - truth).abs() <= 2.0**-22 * truth).all() and (nothing == 0).all()

    smallest = torch.zeros_like(fractions)  # the longest radius, 5.77
    angle = fractions.double() * (2.0 * math.pi * 2.0**-24)
    for component, truth in zip(device_box_muller(smallest, fractions << 8), (angle.cos(), angle.sin())):
        error = component.double() - math.sqrt(48.0 * math.log(2.0)) * truth
        assert error.abs().max() < 1e-6


def test_normals_equal_the_reference_to_rounding(device):
    streams = torch.tensor([[0, 1, 2], [2**32 - 1, 7, 3 << 16], [5, 2**31, 2**32 - 1]], device=device)
    numel, seed = 50_003, 2**63 - 5
    difference = device_normals(streams, numel, seed).double() - reference.philox_normal(
        streams, numel, seed, torch.float64
    )
    assert difference.abs().max() < 2e-6 and difference.square().mean().sqrt() < 1e-7


def defects(normals: torch.Tensor) -> list[str]:
    """What tells normals [streams, positions] from independent N(0, 1), each check at five standard errors."""
    x = normals.double()
    count = x.numel()
    found = []
    for order, expected, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        error = (x**order).mean().item() - expected
        if abs(error) > 5.0 * math.sqrt(variance / count):
            found.append(f"moment {order}: off by {error:.2e}")
    if scipy.stats.kstest(x.flatten().numpy(), "norm").pvalue < 1e-6:
        found.append("Kolmogorov-Smirnov")

    def correlated(what: str, a: torch.Tensor, b: torch.Tensor) -> None:
        if abs((a * b).mean().item()) > 5.0 / math.sqrt(a.numel()):
            found.append(what)

    for lag in (1, 2, 3, 4, 5, 64):
        correlated(f"positions {lag} apart", x[:, lag:], x[:, :-lag])
        squares = x.square() - 1.0
        correlated(f"squares {lag} apart", squares[:, lag:] / 2.0, squares[:, :-lag])
    for lag in (1, 2, 16):
        correlated(f"streams {lag} apart", x[lag:], x[:-lag])
        correlated(f"streams {lag} apart, next position", x[lag:, 1:], x[:-lag, :-1])
    return found


def neighbouring_streams() -> torch.Tensor:
    """Streams that differ in one word by one: iterations, prompts, steps, samples."""
    base = torch.tensor([3, 40, 5 << 16 | 2])
    steps = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1 << 16], [0, 0, 1]])
    return (base + steps[:, None] * torch.arange(8)[None, :, None]).flatten(0, 1).unique(dim=0)


@pytest.mark.parametrize("seed", [0, 1, 20260104])
def test_the_noise_is_independent_and_normal(seed):
    assert defects(reference.philox_normal(neighbouring_streams(), 4_000, seed)) == []


def test_so_is_the_device_noise(device):
    assert defects(device_normals(neighbouring_streams().to(device), 4_000, 4).cpu()) == []


@pytest.mark.parametrize(
    ("spoil", "symptom"),
    [
        (lambda x: x * 1.02, "moment 2"),
        (lambda x: x + 0.02, "moment 1"),
        (lambda x: x.sign() * x.abs() ** 1.03, "moment 4"),
        (lambda x: (x * 4).round() / 4, "Kolmogorov"),
        (lambda x: torch.cat((x[:1], x[:-1] * 0.1 + x[1:] * 0.995), 0), "streams 1 apart"),
        (lambda x: x[:, torch.arange(x.shape[1]) // 2 * 2], "positions 1 apart"),
        (lambda x: x * torch.where(torch.arange(x.shape[1]) // 64 % 2 > 0, 1.1, 0.9), "squares 1 apart"),
    ],
    ids=["scaled", "shifted", "heavy tails", "coarse", "leaking streams", "repeated", "changing scale"],
)
def test_the_tests_would_notice(spoil, symptom):
    """Negative controls: noise spoilt a little is caught, and for the right reason."""
    found = defects(spoil(reference.philox_normal(neighbouring_streams(), 4_000, 0)))
    assert any(what.startswith(symptom) for what in found), found
