"""The noise contract, bit by bit, and the normals' distribution."""

import math

import pytest
import torch
from scipy import stats

from egrpo_fast import noise
from egrpo_fast.kernels.reference.philox import philox4x32, philox_normal

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # counter, key, output: the Random123 library's kat_vectors for philox4x32, 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(*values):
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter, key, output):
    produced = philox4x32(words(*counter), key[0] | key[1] << 32)
    assert tuple(word.item() for word in produced) == output


def test_the_contract_written_out():
    """One normal, from the documented layout of key, counter and fractions alone."""
    seed, iteration, prompt, step, sample, position = (7 << 32) | 5, 11, 13, 3, 2, 4 * 17 + 3
    stream = noise.streams(iteration, torch.tensor([prompt]), torch.tensor([noise.draw_word(step, sample)]))
    eps = philox_normal(stream[0], 100, seed, torch.float64)[0, position].item()
    _, _, a, b = philox4x32(words(17, 11, 13, 3 * 2**16 + 2), seed)
    u1, u2 = ((a.item() >> 8) + 1) / 2**24, (b.item() >> 8) / 2**24
    assert eps == pytest.approx(math.sqrt(-2 * math.log(u1)) * math.sin(2 * math.pi * u2), rel=1e-14)


def test_noise_is_bitwise_the_same_alone_and_in_a_batch():
    stream = torch.randint(0, 2**32, (9, 3), generator=torch.Generator().manual_seed(0))
    together = philox_normal(stream, 1023, 42)
    for row, alone in enumerate(stream):
        assert torch.equal(philox_normal(alone[None], 1023, 42)[0], together[row])
        assert torch.equal(philox_normal(alone[None], 77, 42)[0], together[row, :77])


def test_streams_differ_in_every_word():
    base = noise.initial_noise(0, 0, torch.tensor([0]), (8, 16))
    others = [
        noise.initial_noise(1, 0, torch.tensor([0]), (8, 16)),
        noise.initial_noise(1 << 32, 0, torch.tensor([0]), (8, 16)),
        noise.initial_noise(0, 1, torch.tensor([0]), (8, 16)),
        noise.initial_noise(0, 0, torch.tensor([1]), (8, 16)),
        noise.initial_noise(0, 0, torch.tensor([0]), (8, 16), step=noise.EVALUATION),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack((base.flatten(), other.flatten())))[0, 1]
        assert not torch.equal(base, other) and correlation.abs() < 0.4


def test_normals_are_normal():
    """Moments and Kolmogorov-Smirnov over all streams, correlation between neighbouring positions and streams."""
    stream = noise.streams(3, torch.arange(4), torch.tensor([noise.draw_word(5, i) for i in range(16)])).flatten(0, 1)
    eps = philox_normal(stream, 4096, 123, torch.float64)
    assert stats.kstest(eps.flatten().numpy(), "norm").pvalue > 1e-3
    for power, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        sample = eps.pow(power).flatten()
        assert abs(sample.mean() - expected) < 4 * sample.std() / math.sqrt(len(sample))
    bound = 4 / math.sqrt(eps.numel())
    assert all((eps[:, lag:] * eps[:, :-lag]).mean().abs() < bound for lag in (1, 2, 3, 4))
    assert (eps[1:] * eps[:-1]).mean().abs() < bound


def test_the_distribution_test_can_fail():
    """Negative control: uniform numbers of the same mean and variance are told apart."""
    generator = torch.Generator().manual_seed(0)
    uniform = (torch.rand(4 * 16 * 4096, generator=generator, dtype=torch.float64) - 0.5) * math.sqrt(12)
    assert stats.kstest(uniform.numpy(), "norm").pvalue < 1e-3
