"""Bad input is a ValueError that names it, and writes nothing: fuzzed against a checker written in Python."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from egrpo_fast.kernels.reference.branch_rows import branch_rows_ref

INT32 = 2**31 - 1
TABLES = ("sources", "offsets", "destinations", "draws", "slots", "prompts")


def is_valid(wave):
    """What the tables must be, in as few words as possible."""
    rows, prompts = len(wave.latents), len(wave.prompts)
    sources, offsets, destinations = wave.sources.tolist(), wave.offsets.tolist(), wave.destinations.tolist()
    edges = len(destinations)
    if not sources or len(offsets) != len(sources) + 1 or [len(wave.draws), len(wave.slots)] != [edges, edges]:
        return False
    if offsets[0] != 0 or offsets[-1] != edges or offsets != sorted(offsets):
        return False
    if len(set(sources)) < len(sources) or len(set(destinations)) < edges:
        return False
    if not all(0 <= row < rows for row in sources + destinations):
        return False
    owner = {e: source for source, a, b in zip(sources, offsets, offsets[1:]) for e in range(a, b)}
    if any(row in sources and owner[e] != row for e, row in enumerate(destinations)):
        return False
    words = wave.draws.tolist() + wave.prompts.tolist()
    return all(0 <= slot < prompts for slot in wave.slots.tolist()) and all(0 <= word < 2**32 for word in words)


def refused(extension, wave):
    """The error's message, or None; either way nothing but what the tables name has changed."""
    before = wave.latents.clone(), wave.model_latents.clone()
    try:
        extension.branch_rows(*wave.arguments())
    except ValueError as error:
        assert torch.equal(wave.latents.nan_to_num(7.0), before[0].nan_to_num(7.0))
        assert torch.equal(wave.model_latents.nan_to_num(7.0), before[1].nan_to_num(7.0))
        assert str(error).startswith("branch_rows: ") and "\n" not in str(error)
        return str(error)
    return None


ENTRIES = st.one_of(st.integers(-3, 20), st.sampled_from([-(2**31), INT32, INT32 - 1]))
WORDS = st.one_of(ENTRIES, st.sampled_from([-(2**63), 2**63 - 1, 2**32, 2**32 - 1]))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_checker_agrees_with_python_on_broken_tables(extension, make_wave, data):
    degrees = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    wave = make_wave(degrees, (3,), in_place=data.draw(st.booleans()), generator_seed=data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(0, 3))):
        name = data.draw(st.sampled_from(TABLES))
        table = getattr(wave, name).clone()
        if len(table) and data.draw(st.booleans()):
            values = ENTRIES if table.dtype == torch.int32 else WORDS
            table[data.draw(st.integers(0, len(table) - 1))] = data.draw(values)
        else:
            table = table[: data.draw(st.integers(0, len(table)))].contiguous()
        wave = replace(wave, **{name: table})
    edges = len(wave.destinations)
    wave.coefficients = wave.coefficients[:edges].contiguous()
    wave.velocity = wave.velocity[: len(wave.sources)].contiguous()
    # A shorter table of destinations changes what the others must be: only the values are at issue then.
    wave.draws, wave.slots = wave.draws[:edges], wave.slots[:edges]
    valid = is_valid(wave)
    if valid:
        expected, _ = wave.apply(branch_rows_ref)
    message = refused(extension, wave)
    assert (message is None) == valid, message
    if valid:
        torch.testing.assert_close(wave.latents, expected, rtol=0.0, atol=1e-5, equal_nan=True)
    tables = [wave.sources, wave.offsets, wave.destinations, wave.draws, wave.slots]
    if len(wave.prompts) and (valid or not message.startswith("branch_rows: prompts")):
        try:
            extension.check_tables(*tables, len(wave.latents), len(wave.prompts))
        except ValueError as error:
            assert str(error) == message
        else:
            assert valid


BAD = {
    "empty wavefront": (lambda w: {n: getattr(w, n)[:0] for n in ("sources", "velocity")}, "an empty wavefront"),
    "state of float64": (lambda w: {"latents": w.latents.double()}, "latents: dtype Double, expected Float"),
    "coefficients of float64": (lambda w: {"coefficients": w.coefficients.double()}, "coefficients: dtype Double"),
    "velocity of integers": (lambda w: {"velocity": w.velocity.int()}, "velocity: dtype Int"),
    "velocity of float64": (lambda w: {"velocity": w.velocity.double()}, "velocity: dtype Double"),
    "copy of integers": (lambda w: {"model_latents": w.latents.int()}, "model_latents: dtype Int"),
    "int64 sources": (lambda w: {"sources": w.sources.long()}, "sources: dtype Long, expected Int"),
    "int32 draws": (lambda w: {"draws": w.draws.int()}, "draws: dtype Int, expected Long"),
    "int32 prompts": (lambda w: {"prompts": w.prompts.int()}, "prompts: dtype Int, expected Long"),
    "a state that is no row": (lambda w: {"latents": w.latents.flatten()}, "latents: 1 dimensions"),
    "rows of nothing": (lambda w: {"latents": w.latents[:, :0]}, "latents: rows of 0 elements"),
    "too few velocities": (lambda w: {"velocity": w.velocity[:1]}, "velocity: 1 rows of 6 elements, expected 2 of 6"),
    "short velocities": (lambda w: {"velocity": w.velocity[..., :1].contiguous()}, "velocity: 2 rows of 2"),
    "too few copies": (lambda w: {"model_latents": w.model_latents[1:]}, "model_latents: 6 rows of 6"),
    "transposed state": (
        lambda w: {"latents": w.latents.transpose(1, 2).contiguous().transpose(1, 2)},
        "latents: rows not contiguous",
    ),
    "one row for all": (lambda w: {"latents": w.latents[:1].expand(7, 2, 3)}, "latents: rows overlap"),
    "strided table": (
        lambda w: {"destinations": torch.stack((w.destinations, w.destinations), 1)[:, 0]},
        "destinations: not contiguous",
    ),
    "velocity in the state": (lambda w: {"velocity": w.latents[:2]}, "velocity: overlaps the memory of latents"),
    "copy in the state": (lambda w: {"model_latents": w.latents}, "model_latents: overlaps the memory of latents"),
    "too few coefficients": (lambda w: {"coefficients": w.coefficients[:2]}, "coefficients: 6 elements, expected 9"),
    "negative iteration": (lambda w: {"iteration": -1}, "iteration: -1"),
    "wide iteration": (lambda w: {"iteration": 2**32}, "iteration: 4294967296"),
}


@pytest.mark.parametrize(("breakage", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(extension, make_wave, breakage, message):
    wave = make_wave([2, 1], (2, 3))
    wave = replace(wave, **breakage(wave))
    with pytest.raises(ValueError, match=message):
        extension.branch_rows(*wave.arguments())


def test_more_rows_than_int32_can_name(extension, make_wave):
    wave = make_wave([2, 1], (2, 3))
    wave.latents = wave.latents[:1].expand(2**31, 2, 3)
    with pytest.raises(ValueError, match="2147483648 rows, more than int32"):
        extension.branch_rows(*wave.arguments())
    tables = [wave.sources, wave.offsets, wave.destinations, wave.draws, wave.slots]
    with pytest.raises(ValueError, match="2147483648 rows, more than int32"):
        extension.check_tables(*tables, 2**31, 2)


def test_mixed_devices(extension, make_wave):
    wave = make_wave([2, 1])
    for name in ("velocity", "sources", "prompts", "model_latents"):
        with pytest.raises(ValueError, match="device"):
            extension.branch_rows(*replace(wave, **{name: getattr(wave, name).to("meta")}).arguments())


@pytest.mark.gpu
def test_mixed_devices_on_cuda(extension, make_wave):
    wave = make_wave([2, 1])
    for name in ("velocity", "sources", "prompts", "latents"):
        with pytest.raises(ValueError, match="device"):
            extension.branch_rows(*replace(wave, **{name: getattr(wave, name).to("cuda")}).arguments())
