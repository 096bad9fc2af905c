"""branch_rows of the library against the reference: ODE rows bit for bit, SDE rows to the noise's last places."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from egrpo_fast.kernels.reference.branch_rows import branch_rows_ref
from egrpo_fast.methods.e_grpo import e_grpo
from egrpo_fast.ops import choose
from egrpo_fast.schedule import make_schedule

DEGREES = {"one-row": [1], "branches": [13, 1, 0, 4], "many-rows": [1] * 40, "wide": [64]}
SHAPES = {"odd": (5, 7), "one": (1,), "below-block": (3,), "tile": (256,), "past-tile": (257,), "image": (65, 64)}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
COPIES = {"no-copy": None, **DTYPES}


def same_bits(a, b):
    """Equal, and NaN where NaN (the poison of rows that nothing wrote)."""
    return a is b if a is None or b is None else torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(7.0), b.nan_to_num(7.0)
    )  # fmt: skip


def assert_near(value, truth):
    """Within 4 float32 units of the noise term, s |eps| <= 0.5 * 5.77, and one rounding of the sum each."""
    assert torch.equal(value.isnan(), truth.isnan())
    scale = truth.abs().nan_to_num(0.0).clamp_min(4.0)
    assert ((value - truth).abs().nan_to_num(0.0) <= 4.0 * 2.0**-23 * scale).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("degrees", DEGREES.values(), ids=DEGREES)
def test_ode_rows_equal_the_reference_bit_for_bit(extension, make_wave, degrees, shape):
    wave = make_wave(degrees, shape, noise=None)
    for value, truth in zip(wave.apply(extension.branch_rows), wave.apply(branch_rows_ref)):
        assert same_bits(value, truth)


@pytest.mark.parametrize("velocity", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_dtypes_and_the_copy_the_model_reads(extension, make_wave, velocity, copy):
    wave = make_wave([13, 1, 4], (33, 9), velocity_dtype=velocity, model_dtype=copy)
    latents, model_latents = wave.apply(extension.branch_rows)
    truth, _ = wave.apply(branch_rows_ref)
    assert_near(latents, truth)
    ode = wave.destinations[wave.coefficients[:, 2] == 0].long()
    assert torch.equal(latents[ode], truth[ode])
    # One more rounding, of the very state that was written: the copy is the state's own.
    written = torch.zeros(len(latents), dtype=torch.bool).index_fill_(0, wave.destinations.long(), True)
    if copy is None:
        assert model_latents is None
    else:
        assert torch.equal(model_latents[written], latents[written].to(copy))
        assert model_latents[~written].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_every_16_bit_float_survives_and_rounding_is_pytorchs(extension, make_wave, dtype):
    # Velocity: all 2^16 values, c_v = 1. State: every float between two neighbours' midpoints, subnormals, overflow.
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = bits.view(dtype)
    finite = values.float()
    spread = torch.cat([finite, finite * (1 + 2.0**-9), finite * (1 + 2.0**-12), finite * 1.5, finite * 2.0**-10])
    wave = make_wave([1], (len(spread),), noise=None, velocity_dtype=dtype, model_dtype=dtype)
    wave.coefficients[:] = torch.tensor([1.0, 0.0, 0.0])
    wave.latents[wave.sources.long()] = spread
    wave.velocity.zero_()
    _, copy = wave.apply(extension.branch_rows)
    assert same_bits(copy[wave.sources.long()][0], (spread + 0.0).to(dtype))
    wave.coefficients[:] = torch.tensor([0.0, 1.0, 0.0])
    wave.latents.zero_()
    wave.velocity[0, : len(values)] = values
    latents, _ = wave.apply(extension.branch_rows)
    assert same_bits(latents[wave.sources.long()][0, : len(values)], finite)


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "elsewhere"])
def test_a_source_may_be_its_own_destination(extension, make_wave, in_place):
    wave = make_wave([6, 3], (40, 11), in_place=in_place)
    # The edge home written first or last: every branch must have read the state before it.
    for order in (torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8]), torch.tensor([5, 4, 3, 2, 1, 0, 8, 7, 6])):
        shuffled = replace(
            wave,
            destinations=wave.destinations[order],
            coefficients=wave.coefficients[order].contiguous(),
            draws=wave.draws[order],
            slots=wave.slots[order],
        )
        assert_near(shuffled.apply(extension.branch_rows)[0], wave.apply(branch_rows_ref)[0])
        assert same_bits(shuffled.apply(extension.branch_rows)[0], wave.apply(extension.branch_rows)[0])


def test_any_order_of_sources_and_any_threads_are_bitwise_equal(extension, make_wave):
    wave = make_wave([13, 1, 1, 5], (70, 64))
    expected = wave.apply(extension.branch_rows)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert all(map(same_bits, wave.apply(extension.branch_rows), expected))
    finally:
        torch.set_num_threads(threads)
    # One source at a time, in reverse, is the same wavefront.
    latents, model_latents = wave.latents.clone(), wave.model_latents.clone()
    for i in reversed(range(len(wave.sources))):
        edges = slice(int(wave.offsets[i]), int(wave.offsets[i + 1]))
        extension.branch_rows(
            latents, model_latents, wave.velocity[i : i + 1], wave.sources[i : i + 1],
            wave.offsets[i : i + 2] - wave.offsets[i], wave.destinations[edges], wave.coefficients[edges],
            wave.draws[edges], wave.slots[edges], wave.prompts, wave.iteration, wave.seed,
        )  # fmt: skip
    assert same_bits(latents, expected[0]) and same_bits(model_latents, expected[1])


WIDTH = """
import sys, torch
from egrpo_fast.kernels import extension
waves = torch.load(sys.argv[1])
for arguments in waves:
    extension.branch_rows(*arguments)
torch.save([arguments[:2] for arguments in waves], sys.argv[2])
"""


def test_any_vector_width_is_bitwise_equal(extension, make_wave, tmp_path):
    # Made here: PyTorch's own normals are not the same at every vector width.
    waves = [
        make_wave([13, 1, 4], (71, 33), velocity_dtype=velocity, model_dtype=model)
        for velocity in DTYPES.values()
        for model in DTYPES.values()
    ]
    torch.save([wave.arguments() for wave in waves], tmp_path / "waves.pt")
    expected = [wave.apply(extension.branch_rows) for wave in waves]
    for capability in ("default", "avx2", "avx512"):
        out = tmp_path / f"{capability}.pt"
        command = [sys.executable, "-c", WIDTH, str(tmp_path / "waves.pt"), str(out)]
        subprocess.run(command, env=os.environ | {"ATEN_CPU_CAPABILITY": capability}, check=True)
        for rows, want in zip(torch.load(out), expected, strict=True):
            assert same_bits(rows[0], want[0]) and same_bits(rows[1], want[1])


def test_rows_may_lie_apart(extension, make_wave):
    wave = make_wave([5, 1, 2], (9, 8), model_dtype=torch.float16)
    expected = wave.apply(extension.branch_rows)

    def apart(rows):  # every other row, begun at an odd element
        wide = torch.full((len(rows), 2, rows[0].numel() + 5), torch.nan, dtype=rows.dtype)
        view = wide[:, 1, 3 : 3 + rows[0].numel()].view(rows.shape)
        view.copy_(rows)
        return wide, view

    (wide, latents), (_, model_latents), (_, velocity) = map(apart, (wave.latents, wave.model_latents, wave.velocity))
    untouched = wide.clone()
    extension.branch_rows(latents, model_latents, velocity, *wave.arguments()[3:])
    assert same_bits(latents, expected[0]) and same_bits(model_latents, expected[1])
    untouched[:, 1, 3 : 3 + latents[0].numel()].view(latents.shape).copy_(latents)
    assert same_bits(wide, untouched)
    one = replace(make_wave([2], (9, 8)), velocity=torch.zeros(1, 9, 8))
    many = replace(one, velocity=torch.zeros(1, 1, 1).expand(1, 9, 8).contiguous())
    assert all(map(same_bits, one.apply(extension.branch_rows), many.apply(extension.branch_rows)))


PLANS = {
    "paper": ({"num_steps": 16, "entropy_threshold": 2.2}, 3, 1),
    "strided-tails": ({"num_steps": 12, "entropy_threshold": 0.0}, 4, 3),
    "merged-strided": ({"num_steps": 10, "merge_lengths": 4}, 2, 2),
    "one-step": ({"num_steps": 6, "active_steps": [0]}, 5, 1),
}


def roll(op, plan, num_prompts, prompts, dtype=None, iteration=2, seed=11, shape=(17, 6)):
    """Every wave of the plan under an element-wise velocity, `v = 0.7 tanh(x) - 0.1 t`."""
    tables = plan.tables(num_prompts, "cpu", torch.float32)
    latents = torch.full((num_prompts * plan.num_rows, *shape), torch.nan)
    for slot, prompt in enumerate(prompts.tolist()):
        latents[slot * plan.num_rows] = torch.randn(shape, generator=torch.Generator().manual_seed(prompt))
    copy = None if dtype is None else torch.full_like(latents, torch.nan, dtype=dtype)
    for table in tables:
        velocity = 0.7 * torch.tanh(latents[table.sources.long()]) - 0.1 * table.time
        op(
            latents, copy, velocity, table.sources, table.offsets, table.destinations, table.coefficients, table.draws,
            table.slots, prompts, iteration, seed,
        )  # fmt: skip
    return latents, tables


@pytest.mark.parametrize(("schedule", "size", "stride"), PLANS.values(), ids=PLANS)
def test_a_whole_plan_equals_the_reference(extension, schedule, size, stride):
    schedule = make_schedule(**schedule)
    plan = e_grpo(schedule, [size] * len(schedule.active), [stride] * len(schedule.active))
    prompts = torch.tensor([4, 9])
    latents, tables = roll(extension.branch_rows, plan, 2, prompts, torch.bfloat16)
    truth, before = roll(branch_rows_ref, plan, 2, prompts)
    torch.testing.assert_close(latents, truth, rtol=0.0, atol=2e-5, equal_nan=True)
    assert not latents[list(plan.image_rows)].isnan().any()
    anchors = [slot * plan.num_rows for slot in range(2)]
    assert torch.equal(latents[anchors], truth[anchors])  # never saw noise: bit for bit
    # The tables are static: made before the first step, read and never written.
    for table, fresh in zip(tables, before):
        for name in ("sources", "offsets", "destinations", "coefficients", "draws", "slots"):
            assert torch.equal(getattr(table, name), getattr(fresh, name)) and getattr(table, name)._version == 0


def test_prompts_of_a_call_do_not_change_their_rows(extension):
    schedule = make_schedule(num_steps=8, merge_lengths=2)
    plan = e_grpo(schedule, [3] * 4, [1] * 4)
    prompts = torch.tensor([5, 6, 7])
    together, _ = roll(extension.branch_rows, plan, 3, prompts)
    for slot in range(3):
        alone, _ = roll(extension.branch_rows, plan, 1, prompts[slot : slot + 1])
        rows = list(plan.image_rows)
        assert torch.equal(together[slot * plan.num_rows :][rows], alone[rows])


def test_public_op_chooses_the_library(extension, make_wave):
    assert choose("auto", "cpu").chosen["branch_rows"] == "extension"
    wave = make_wave([4, 1])
    expected = wave.apply(extension.branch_rows)
    assert all(map(same_bits, wave.apply(choose("extension", "cpu").branch_rows), expected))


def test_written_tensors_know_it(extension, make_wave):
    wave = make_wave([2, 1])
    extension.branch_rows(*wave.arguments())
    assert wave.latents._version > 0 and wave.model_latents._version > 0
    assert wave.velocity._version == 0 and wave.sources._version == 0
    with torch.inference_mode():
        inference = make_wave([2, 1])
        extension.branch_rows(*inference.arguments())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("velocity", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_cuda_equals_cpu_bit_for_bit(extension, make_wave, velocity, copy, shape):
    wave = make_wave([13, 1, 0, 4], shape, velocity_dtype=velocity, model_dtype=copy)
    for value, expected in zip(wave.to("cuda").apply(extension.branch_rows), wave.apply(extension.branch_rows)):
        assert same_bits(value if value is None else value.cpu(), expected)


@pytest.mark.gpu
def test_cuda_runs_on_the_current_stream_without_synchronising(extension, make_wave):
    wave = make_wave([13, 1, 4], (2025, 64)).to("cuda")
    expected = wave.apply(extension.branch_rows)
    stream = torch.cuda.Stream()
    latents, copy = wave.latents.clone(), wave.model_latents.clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # whatever ran on another stream would not wait for this
            velocity = wave.velocity + 0.0
            extension.branch_rows(latents, copy, velocity, *wave.arguments()[3:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert same_bits(latents, expected[0]) and same_bits(copy, expected[1])


@pytest.mark.gpu
def test_cuda_passes_over_hostile_tables(extension, make_wave):
    wave = make_wave([3, 1], (33,)).to("cuda")
    for name, value in (("sources", -1), ("destinations", 10**9), ("slots", -(2**31)), ("offsets", 2**31 - 1)):
        hostile = replace(wave, **{name: torch.full_like(getattr(wave, name), value)})
        latents, copy = hostile.apply(extension.branch_rows)
        torch.cuda.synchronize()
        assert same_bits(latents, wave.latents) and same_bits(copy, wave.model_latents)


@pytest.mark.gpu
def test_cuda_rows_beyond_two_to_the_31_elements(extension):
    length, words = 2**22 + 8, {"device": "cuda", "dtype": torch.int32}
    latents = torch.zeros(520, length, device="cuda")  # 2.2e9 elements, 9 GB
    velocity = torch.full((1, length), 2.0, device="cuda")
    extension.branch_rows(
        latents, None, velocity, torch.tensor([519], **words), torch.tensor([0, 1], **words),
        torch.tensor([518], **words), torch.tensor([[1.0, 0.5, 0.0]], device="cuda"),
        torch.zeros(1, dtype=torch.int64, device="cuda"), torch.zeros(1, **words),
        torch.zeros(1, dtype=torch.int64, device="cuda"), 0, 0,
    )  # fmt: skip
    assert bool((latents[518] == 1.0).all()) and bool((latents[:518] == 0.0).all())
