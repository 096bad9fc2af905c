"""The noise contract in the library: words bit for bit, normals within 4 units in the last place, everywhere."""

import math

import pytest
import torch

from egrpo_fast.kernels.reference.philox import philox4x32, philox_normal

MASK = 0xFFFFFFFF
ALL_FRACTIONS = torch.arange(2**24) << 8
"""Every word that matters to one factor of a normal: the low eight bits are not read."""


def ulps(value, truth):
    """|value - truth| in float32 units in the last place of truth (float64)."""
    rounded = truth.float().abs().clamp_min(torch.finfo(torch.float32).tiny)
    return (value.double() - truth).abs() / (torch.nextafter(rounded, torch.tensor(math.inf)) - rounded).double()


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(extension, counter, seed, expected):
    streams = torch.tensor([counter[1:]])
    if counter[0] > 1000:  # block numbers run from 0: a far one is out of the test op's reach, not of the reference's
        words = philox4x32(tuple(torch.tensor(word) for word in counter), seed)
        assert tuple(int(word) for word in words) == expected
    else:
        words = torch.ops.egrpo_fast.philox_words(streams, counter[0] + 1, seed)
        assert tuple(words[0, counter[0]].tolist()) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63 - 1])
def test_words_equal_the_reference(extension, seed):
    streams = torch.randint(0, 2**32, (50, 3), generator=torch.Generator().manual_seed(0))
    streams[0], streams[1] = 0, MASK
    words = torch.ops.egrpo_fast.philox_words(streams, 300, seed)
    blocks = torch.arange(300)
    expected = torch.stack(philox4x32((blocks, *(word[:, None] for word in streams.unbind(-1))), seed), dim=-1)
    assert torch.equal(words, expected)


def test_every_radius_is_within_one_ulp(extension):
    radius, zero = torch.ops.egrpo_fast.box_muller(ALL_FRACTIONS, torch.zeros_like(ALL_FRACTIONS))
    truth = torch.sqrt(-2.0 * torch.log(((ALL_FRACTIONS >> 8) + 1).double() * 2.0**-24))
    assert ulps(radius, truth).max() <= 1.0
    assert zero.abs().max() == 0.0


def test_every_angle_is_within_one_and_a_half_ulp(extension):
    # A word whose radius is exactly 1 in float32 leaves the two factors alone.
    word = torch.full_like(ALL_FRACTIONS, (round(math.exp(-0.5) * 2**24) - 1) << 8)
    assert torch.ops.egrpo_fast.box_muller(word[:1], word[:1] * 0)[0] == 1.0
    turn = (ALL_FRACTIONS >> 8).double() * (2.0 * math.pi * 2.0**-24)
    zeros = 0
    for value, truth in zip(torch.ops.egrpo_fast.box_muller(word, ALL_FRACTIONS), (torch.cos(turn), torch.sin(turn))):
        crossing = truth.abs() < 1e-12  # float64's pi is not pi: its cosine of a quarter turn is 6e-17, ours is 0
        assert torch.equal(value[crossing], torch.zeros_like(value[crossing]))
        assert ulps(value[~crossing], truth[~crossing]).max() <= 1.5
        zeros += int(crossing.sum())
    assert zeros == 4


@pytest.mark.parametrize("numel", [1, 3, 4, 255, 256, 257, 4095, 4097, 10_000])
def test_normals_are_within_four_ulps(extension, make_wave, numel):
    # x = v = 0 and s = 1 leave the noise itself.
    wave = make_wave([3, 2], shape=(numel,), model_dtype=None)
    wave.coefficients[:] = torch.tensor([0.0, 0.0, 1.0])
    latents, _ = wave.apply(extension.branch_rows)
    eps = latents[wave.destinations.long()]
    iterations = torch.full_like(wave.draws, wave.iteration)
    streams = torch.stack((iterations, wave.prompts[wave.slots.long()], wave.draws), dim=-1)
    truth = philox_normal(streams, numel, wave.seed, torch.float64)
    assert ulps(eps, truth)[truth.abs() > 1e-12].max() <= 4.0


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63, 2**64 - 1, 2**64 + 5])
def test_any_python_seed_is_taken_modulo_two_to_the_64(extension, make_wave, seed):
    wave = make_wave([2])
    wave.seed = seed
    latents, _ = wave.apply(extension.branch_rows)
    wave.seed = seed % 2**64
    again, _ = wave.apply(extension.branch_rows)
    assert torch.equal(latents.nan_to_num(7.0), again.nan_to_num(7.0))
