"""The wavefront equals sampling every branch alone, and its noise is the same bits however rows are batched."""

from itertools import pairwise

import pytest
import torch

from egrpo_fast import noise, ops
from egrpo_fast.kernels.reference.philox import philox_normal
from egrpo_fast.methods import e_grpo
from egrpo_fast.plan import ode_plan, tail_grid
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.schedule import make_schedule

SHAPE = (6, 8)
SCHEDULE = make_schedule(8, active_steps=[0, 1, 3])
SIZES, STRIDES = [3, 2, 4], [1, 2, 3]
PLAN = e_grpo(SCHEDULE, SIZES, STRIDES)
MIX = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 8
PROMPTS = [5, 2, 11]


def element_wise(prompts):
    """A velocity of elements alone: no reduction whose order could change with the batch."""
    shift = torch.tensor(prompts, dtype=torch.float64)
    return lambda x, t, rows: torch.tanh(x * (1.5 - t)) + 0.1 * shift.to(x.dtype)[rows][:, None, None]


def matrix(prompts):
    scalar = element_wise(prompts)
    return lambda x, t, rows: scalar(x, t, rows) + x @ MIX.to(x.dtype)


def wavefront(prompts, dtype=torch.float64, model=matrix, plan=PLAN, micro_batch=None, **options):
    made = Wavefront(
        plan, len(prompts), SHAPE, ops.choose("reference"), dtype=dtype, model_dtype=dtype, micro_batch=micro_batch
    )
    return made.run(model(prompts), NoiseKey(7, 3, torch.tensor(prompts)), **options)


def alone(prompt, n, sample, dtype=torch.float64):
    """One sample by itself, as the paper writes it: ODE from the noise, one merged SDE step, ODE to the end."""
    velocity, rows = matrix([prompt]), torch.tensor([0])
    times, start = SCHEDULE.times, SCHEDULE.active[n]
    x = noise.initial_noise(7, 3, torch.tensor([prompt]), SHAPE, dtype)
    for i in range(start):
        x = x - (times[i] - times[i + 1]) * velocity(x, times[i], rows)
    step, v = SCHEDULE.sde(start, SCHEDULE.merges[start]), velocity(x, times[start], rows)
    stream = torch.tensor([[3, prompt, start << 16 | sample]])
    x = step.c_x * x + step.c_v * v + step.s * philox_normal(stream, 48, 7, dtype).reshape(1, *SHAPE)
    grid = tail_grid(start + SCHEDULE.merges[start], SCHEDULE.num_steps, STRIDES[n])
    for here, there in pairwise(grid):
        x = x - (times[here] - times[there]) * velocity(x, times[here], rows)
    return x[0]


def test_the_wavefront_equals_every_branch_alone():
    rollout = wavefront(PROMPTS)
    for p, prompt in enumerate(PROMPTS):
        pictures = iter(rollout.final_latents[p])
        for n, size in enumerate(SIZES):
            for sample in range(size):
                assert torch.allclose(next(pictures), alone(prompt, n, sample), rtol=0, atol=1e-10)


@pytest.mark.parametrize("micro_batch", [1, 4, 7, None])
def test_any_micro_batch(micro_batch):
    together, split = wavefront(PROMPTS), wavefront(PROMPTS, micro_batch=micro_batch)
    assert torch.allclose(split.final_latents, together.final_latents, rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1]], ids=str)
@pytest.mark.parametrize("micro_batch", [5, None])
def test_any_prompt_order_and_count_is_bitwise_the_same(order, micro_batch):
    """Under an element-wise velocity, in float32, nothing at all may change."""
    together = wavefront(PROMPTS, torch.float32, element_wise)
    some = wavefront([PROMPTS[i] for i in order], torch.float32, element_wise, micro_batch=micro_batch)
    assert torch.equal(some.final_latents, together.final_latents[order])
    assert all(torch.equal(a, b[order]) for a, b in zip(some.states, together.states))
    assert all(torch.equal(a, b[order]) for a, b in zip(some.velocities, together.velocities))


def test_other_prompts_iterations_and_seeds_draw_other_noise():
    base = wavefront([5], model=element_wise).final_latents
    assert not torch.allclose(base, wavefront([6], model=element_wise).final_latents, atol=1e-2)
    first, second = base[0, 0], base[0, 1]
    assert not torch.allclose(first, second, atol=1e-2), "samples of a group must differ"


def test_the_anchors_velocity_is_not_computed_again():
    calls = []

    def counting(x, t, rows):
        calls.append((t, len(x)))
        return matrix([5])(x, t, rows)

    Wavefront(PLAN, 1, SHAPE, ops.choose("reference")).run(counting, NoiseKey(0, 0, torch.tensor([5])))
    assert len(calls) == len(PLAN.waves), "one call per live grid step"
    assert sum(rows for _, rows in calls) == PLAN.evaluations
    assert [t for t, _ in calls] == [wave.time for wave in PLAN.waves]


def test_states_and_velocities_are_those_of_the_active_steps():
    rollout = wavefront([5])
    for n, group in enumerate(PLAN.groups):
        state = rollout.states[n]
        v = matrix([5])(state, SCHEDULE.times[group.index], torch.tensor([0]))
        assert torch.allclose(rollout.velocities[n], v, rtol=0, atol=1e-12)


def test_without_groups_the_picture_is_the_ode_sample():
    rollout = wavefront(PROMPTS, plan=ode_plan(SCHEDULE))
    x = noise.initial_noise(7, 3, torch.tensor(PROMPTS), SHAPE, torch.float64)
    for i, t in enumerate(SCHEDULE.times[:-1]):
        x = x - (t - SCHEDULE.times[i + 1]) * matrix(PROMPTS)(x, t, torch.arange(3))
    assert torch.allclose(rollout.final_latents[:, 0], x, rtol=0, atol=1e-10)


def test_buffers_are_reused_without_a_trace():
    """A wavefront run a second time, for other prompts between, gives the first result again."""
    made = Wavefront(PLAN, 1, SHAPE, ops.choose("reference"))
    first = made.run(element_wise([5]), NoiseKey(7, 3, torch.tensor([5])))
    made.run(element_wise([6]), NoiseKey(7, 4, torch.tensor([6])))
    again = made.run(element_wise([5]), NoiseKey(7, 3, torch.tensor([5])))
    assert torch.equal(again.final_latents, first.final_latents)


def test_the_model_reads_its_own_dtype():
    seen = set()

    def velocity(x, t, rows):
        seen.add(x.dtype)
        return element_wise([5])(x, t, rows)

    made = Wavefront(PLAN, 1, SHAPE, ops.choose("reference"), model_dtype=torch.bfloat16)
    pictures = made.run(velocity, NoiseKey(7, 3, torch.tensor([5]))).final_latents
    assert seen == {torch.bfloat16} and pictures.dtype == torch.float32


def test_the_rollouts_noise_is_what_the_update_replays():
    """eps recovered from the rollout's samples equals eps of `NoiseKey.streams`, which the log-ratio is made from."""
    schedule = make_schedule(1, merge_lengths=1, active_steps=[0])
    plan = e_grpo(schedule, [4], [1])
    made = Wavefront(plan, 2, SHAPE, ops.choose("reference"), dtype=torch.float64, model_dtype=torch.float64)
    key = NoiseKey(7, 3, torch.tensor([5, 2]))
    rollout = made.run(element_wise([5, 2]), key)
    (group,) = plan.groups
    mean = group.step.c_x * rollout.states[0] + group.step.c_v * rollout.velocities[0]
    eps = (rollout.final_latents - mean[:, None]) / group.step.s
    replayed = philox_normal(key.streams(group), 48, key.seed, torch.float64)
    assert torch.allclose(eps.flatten(2), replayed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["triton", "extension"])
def test_every_backend_gives_the_same_rollout(backend, model_dtype):
    """`rollout.backend` changes who computes, not what: Triton in its interpreter, the extension on the CPU."""
    runs = []
    for name in ("reference", backend):
        chosen = ops.choose(name)
        assert chosen.chosen["branch_rows"] == name
        made = Wavefront(PLAN, 3, SHAPE, chosen, model_dtype=model_dtype)
        runs.append(made.run(element_wise(PROMPTS), NoiseKey(7, 3, torch.tensor(PROMPTS))))
    theirs, ours = runs
    # The anchor has only ODE steps: the same bits. Samples hold normals, equal to rounding, and what the model makes
    # of them at its own precision.
    assert all(torch.equal(a, b) for a, b in zip(ours.states, theirs.states))
    bound = 1e-5 if model_dtype == torch.float32 else 2e-2
    assert torch.allclose(ours.final_latents, theirs.final_latents, rtol=0, atol=bound)
