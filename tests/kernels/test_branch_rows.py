"""`branch_rows`: a plan's own tables and random ones, in place, against the reference in float32 and float64."""

import pytest
import torch

from egrpo_fast.methods.e_grpo import e_grpo
from egrpo_fast.ops import Ops
from egrpo_fast.schedule import make_schedule

SEED = 2**50 + 3
ITERATION = 2**31 + 5


def run(ops: Ops, latents, copy, velocity, table, prompts):
    """The op on clones, so that one input serves several backends."""
    latents, copy = latents.clone(), None if copy is None else copy.clone()
    coefficients = table.coefficients.to(latents.dtype)
    ops.branch_rows(
        latents, copy, velocity, table.sources, table.offsets, table.destinations, coefficients, table.draws,
        table.slots, prompts, ITERATION, SEED,
    )  # fmt: skip
    return latents, copy


@pytest.fixture(scope="module")
def plan():
    return e_grpo(make_schedule(num_steps=6, active_steps=(0, 2)), group_sizes=(3, 2), tail_strides=(1, 2))


@pytest.mark.parametrize("wave", range(6), ids="wave{}".format)
@pytest.mark.parametrize("row", [(127,), (9, 64), (16_385,)], ids=str)
def test_a_plan_wave_by_wave(triton_ops, reference_ops, normal, judge, device, plan, wave, row):
    table = plan.tables(2, device, torch.float32)[wave]
    prompts = torch.tensor([7, 2**32 - 1], device=device)
    x, v = normal(2 * plan.num_rows, *row), normal(len(table.sources), *row, dtype=torch.bfloat16)
    copy = x.bfloat16()
    result, result_copy = run(triton_ops, x, copy, v, table, prompts)
    eager, eager_copy = run(reference_ops, x, copy, v, table, prompts)
    truth, _ = run(reference_ops, x.double(), None, v.double(), table, prompts)
    judge("latents", result, eager, truth)

    written = torch.zeros(len(x), dtype=torch.bool, device=device)
    written[table.destinations.long()] = True
    assert torch.equal(result[~written], x[~written]) and torch.equal(result_copy[~written], copy[~written])
    assert torch.equal(result_copy[written], result[written].bfloat16())
    without_noise = table.destinations[table.coefficients[:, 2] == 0].long()
    assert torch.equal(result[without_noise], eager[without_noise]), "bit for bit where no noise is drawn"
    assert torch.equal(result_copy[without_noise], eager_copy[without_noise])


def test_a_whole_plan(triton_ops, reference_ops, normal, device, plan):
    """Every wave after the other under an element-wise velocity: every row ends where the reference ends."""
    prompts = torch.tensor([3, 1], device=device)
    start = normal(2 * plan.num_rows, 9, 64)
    ends = []
    for ops in (triton_ops, reference_ops):
        x = start.clone()
        for table in plan.tables(2, device, torch.float32):
            x, _ = run(ops, x, None, x[table.sources.long()].tanh(), table, prompts)
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def test_branch_noise_is_that_of_its_stream(triton_ops, normal, device, plan):
    """Branches equal sde_step from the same state: where a row is written has no say in its noise."""
    wave = next(wave for wave in plan.waves if any(edge.step.s > 0 for edge in wave.edges))
    table = plan.tables(2, device, torch.float32)[plan.waves.index(wave)]
    prompts = torch.tensor([7, 8], device=device)
    x, v = normal(2 * plan.num_rows, 200), normal(len(table.sources), 200)
    result, _ = run(triton_ops, x, None, v, table, prompts)
    noisy = table.coefficients[:, 2] > 0
    source = torch.repeat_interleave(torch.arange(len(table.sources), device=device), table.offsets.diff().long())
    streams = torch.stack((torch.full_like(table.draws, ITERATION), prompts[table.slots.long()], table.draws), -1)
    expected, _ = triton_ops.sde_step(
        x[table.sources.long()[source]][noisy], v[source][noisy], table.coefficients[noisy], streams[noisy], SEED
    )
    assert torch.equal(result[table.destinations[noisy].long()], expected)


def test_views(triton_ops, normal, device, plan, layout):
    table = plan.tables(1, device, torch.float32)[0]
    prompts = torch.tensor([0], device=device)
    x, v = normal(plan.num_rows, 160), normal(len(table.sources), 160)
    expected, _ = run(triton_ops, x, None, v, table, prompts)
    view = layout(x)
    triton_ops.branch_rows(
        view, None, layout(v), table.sources, table.offsets, table.destinations, table.coefficients, table.draws,
        table.slots, prompts, ITERATION, SEED,
    )  # fmt: skip
    assert torch.equal(view, expected)


def test_nothing_to_do(triton_ops, normal, device):
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    x = normal(3, 8)
    before = x.clone()
    triton_ops.branch_rows(
        x, None, normal(0, 8), empty, torch.zeros(1, dtype=torch.int32, device=device), empty, normal(0, 3),
        empty.long(), empty, torch.tensor([0], device=device), 0, 0,
    )  # fmt: skip
    assert torch.equal(x, before)
