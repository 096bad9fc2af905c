"""The wavefront equals sampling every branch alone, and its noise is the same bits however rows are batched."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from egrpo_fast import noise, ops
from egrpo_fast.kernels.reference.philox import philox_normal
from egrpo_fast.methods.e_grpo import e_grpo
from egrpo_fast.methods.granular_grpo import granular_grpo
from egrpo_fast.methods.mix_grpo import mix_grpo
from egrpo_fast.methods.tempflow_grpo import tempflow_grpo
from egrpo_fast.objective import Objective
from egrpo_fast.plan import ode_plan, tail_grid
from egrpo_fast.rollout import NoiseKey, TailVelocity, Wavefront
from egrpo_fast.schedule import make_schedule

SHAPE = (6, 8)
SCHEDULE = make_schedule(8, active_steps=[0, 1, 3])
SIZES, STRIDES = [3, 2, 4], [1, 2, 3]
PLAN = e_grpo(SCHEDULE, SIZES, STRIDES)
MIX = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 8
PROMPTS = [5, 2, 11]
OPS = ops.choose("reference")


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


def alone(prompt, n, sample, dtype=torch.float64, solver="euler", tail=matrix):
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
    velocity, before = tail([prompt]), None
    for place, (here, there) in enumerate(pairwise(grid)):
        v = velocity(x, times[here], rows)
        h = SCHEDULE.extrapolation(solver, grid[place - 1], here, there) if place else 0.0
        x = x - (times[here] - times[there]) * (v + h * (v - before) if place else v)
        before = v
    return x[0]


def assert_alone(rollout, **options):
    for p, prompt in enumerate(PROMPTS):
        images = iter(rollout.final_latents[p])
        for n, size in enumerate(SIZES):
            for sample in range(size):
                assert torch.allclose(next(images), alone(prompt, n, sample, **options), rtol=0, atol=1e-10)


def test_the_wavefront_equals_every_branch_alone():
    assert_alone(wavefront(PROMPTS))


def another(prompts):
    """A tail's own model."""
    base = matrix(prompts)
    return lambda x, t, rows: 0.9 * base(x, t, rows) - 0.2


@pytest.mark.parametrize("micro_batch", [2, 4, None])
@pytest.mark.parametrize("cached", [False, True], ids=["together", "by family"])
@pytest.mark.parametrize("tail", [matrix, another])
@pytest.mark.parametrize("solver", ["euler", "ab2", "dpm2m"])
def test_approximated_tails_equal_every_branch_alone(solver, tail, cached, micro_batch):
    plan = e_grpo(SCHEDULE, SIZES, STRIDES, solver=solver)
    tails = None if tail is matrix and not cached else tail(PROMPTS)
    cache = Sequences() if cached else None
    rollout = wavefront(PROMPTS, plan=plan, micro_batch=micro_batch, tail=tails and TailVelocity(tails, cache))
    assert_alone(rollout, solver=solver, tail=tail)


def test_forked_tails_have_a_history_each():
    """Granular-GRPO: a second tail leaves from its sample's row; both are as if they were the only one."""
    plans = [granular_grpo(SCHEDULE, SIZES, strides, solver="ab2") for strides in ([1, 3], [1], [3])]
    both, *each = (plan.compared(wavefront(PROMPTS, plan=plan).final_latents.movedim(1, -1)) for plan in plans)
    expected = [images for group in zip(*each) for images in group]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(both, expected, strict=True))


class Sequences:
    """A tail's cache that keeps nothing, and notes which calls are of which sequence."""

    def __init__(self):
        self.calls, self.forgotten = {}, 0

    @contextmanager
    def sequence(self, family, chunk):
        self.now = self.calls.setdefault((family, chunk), [])
        yield
        self.now = None

    def forget(self):
        self.forgotten += 1

    def velocity(self, x, t, rows):
        """Leaves the rows as they are, so that they can be told."""
        self.now.append((t, x.clone(), rows))
        return torch.zeros_like(x)


class Watched:
    """Ops that note the rows of every stochastic step as it leaves them."""

    chosen = {"sde_step": None, "branch_rows": "reference"}  # noqa: RUF012

    def __init__(self):
        self.samples = []

    def branch_rows(self, latents, copy, v, sources, offsets, destinations, coefficients, *rest):
        ops.choose("reference").branch_rows(latents, copy, v, sources, offsets, destinations, coefficients, *rest)
        self.samples.append(latents[destinations[coefficients[:, 2] > 0].long()].clone())


@st.composite
def plans(draw):
    """The same random plan with exact and with approximated tails."""
    steps = draw(st.integers(3, 9))
    active = sorted(draw(st.sets(st.integers(0, steps - 2), min_size=1, max_size=3)))
    schedule = make_schedule(steps, entropy_threshold=draw(st.sampled_from([0, 2.2])), active_steps=active)
    sizes = [draw(st.integers(2, 3)) for _ in active]
    strides = [draw(st.integers(1, steps)) for _ in active]
    solver, pairs = draw(st.sampled_from(["euler", "ab2", "dpm2m"])), draw(st.booleans())
    window = range(active[0], active[0] + draw(st.integers(1, steps - 1 - active[0])))
    image = draw(st.booleans())
    drawn = draw(
        st.sampled_from(
            [
                lambda strides, solver: e_grpo(schedule, sizes, strides, pairs, solver),
                lambda strides, solver: mix_grpo(schedule, 3, window, image, strides[0], pairs, solver),
                lambda _, solver: granular_grpo(schedule, sizes, [1, 2], pairs, solver),
                lambda strides, solver: tempflow_grpo(schedule, 2, active, strides[0], pairs, solver),
            ]
        )
    )
    return drawn([1] * len(active), "euler"), drawn(strides, solver)


@settings(max_examples=60, deadline=None)
@given(plans(), st.booleans())
def test_no_approximation_of_a_tail_reaches_what_is_trained(both, cached):
    """Bitwise, under an element-wise velocity: anchor, group states and velocities, samples as their step left them."""
    seen = []
    for plan, tail in zip(both, (None, lambda x, t, rows: torch.full_like(x, torch.nan))):
        watched = Watched()
        made = Wavefront(plan, 3, SHAPE, watched)
        key, cache = NoiseKey(7, 3, torch.tensor(PROMPTS)), Sequences() if tail and cached else None
        rollout = made.run(element_wise(PROMPTS), key, tail=tail and TailVelocity(tail, cache))
        seen.append((rollout, watched.samples))
    (exact, samples), (fast, fast_samples) = seen
    for ours, theirs in zip((fast.states, fast.velocities), (exact.states, exact.velocities)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(filter(len, fast_samples), filter(len, samples), strict=True))
    finished = any(both[1].tails)
    assert not finished or fast.final_latents.isnan().any(), "the tail's model was not asked"


@pytest.mark.gpu
def test_no_rollout_and_no_loss_waits_for_the_gpu():
    """Where the host has to wait, CUDA's own watch raises."""
    keys = [NoiseKey(7, n, torch.tensor(PROMPTS, device="cuda")) for n in range(2)]
    shift = torch.tensor(PROMPTS, dtype=torch.float32, device="cuda")
    made = Wavefront(PLAN, 3, SHAPE, ops.choose("auto", "cuda"), "cuda")
    objective = Objective(made.ops, (1.0, 0.5))

    def velocity(x, t, rows):
        return torch.tanh(x * (1.5 - t)) + 0.1 * shift[rows][:, None, None]

    def losses(key):
        rollout = made.run(velocity, key)
        rewards = PLAN.by_group(rollout.final_latents.mean((2, 3)).expand(2, -1, -1))
        return [
            objective(group, key, 1.01 * v, v, some).loss
            for group, v, some in zip(PLAN.groups, rollout.velocities, rewards)
        ]

    first = losses(keys[0])  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.use(e_grpo(SCHEDULE, [2, 3, 4], STRIDES))
        made.use(PLAN)
        second = losses(keys[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in first + second)


@settings(max_examples=30, deadline=None)
@given(plans(), st.integers(1, 2), st.sampled_from([None, 1, 2, 3]))
def test_a_sequence_has_the_same_rows_at_every_step(both, num_prompts, micro_batch):
    """Rows of one prompt, in the same order, at times that fall to the end; all sequences together are the tails."""
    policy, most = element_wise(PROMPTS), 0

    def counted(x, t, rows):
        nonlocal most
        most = max(most, len(x))
        return policy(x, t, rows)

    for plan in both:
        made, cache = Wavefront(plan, num_prompts, SHAPE, OPS, micro_batch=micro_batch), Sequences()
        key = NoiseKey(7, 3, torch.tensor(PROMPTS[:num_prompts]))
        most, asked = 0, 0
        made.run(counted, key, tail=TailVelocity(cache.velocity, cache))
        for calls in cache.calls.values():
            times, latents, rows = zip(*calls)
            assert all(torch.equal(x, latents[0]) for x in latents) and sorted(set(times), reverse=True) == list(times)
            assert len({int(row) for some in rows for row in some}) == 1
            most = max(most, len(latents[0]))
            asked += sum(map(len, latents))
        assert asked == num_prompts * plan.tail_evaluations
        assert cache.forgotten == 1 and most == made.rows_per_call(TailVelocity(cache.velocity, cache))


def test_families_are_the_tails_that_take_the_same_steps():
    """E-GRPO: one per active step. Granular-GRPO: one per stride, its coarser tails from where they leave the first."""
    plans = PLAN, mix_grpo(SCHEDULE, 4, range(2, 4)), granular_grpo(SCHEDULE, SIZES, [1, 3])
    assert [list(map(len, plan.families)) for plan in plans] == [SIZES, [4], [3, 3, 2, 2, 4, 4]]


def test_a_cache_forgets_where_a_run_fails():
    cache = Sequences()

    def fails(x, t, rows):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        wavefront(PROMPTS, tail=TailVelocity(fails, cache))
    assert cache.forgotten == 1


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


def test_without_groups_the_image_is_the_ode_sample():
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
    images = made.run(velocity, NoiseKey(7, 3, torch.tensor([5]))).final_latents
    assert seen == {torch.bfloat16} and images.dtype == torch.float32


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


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_waves_of_plain_stochastic_steps_take_the_step_kernel(model_dtype, backend):
    """The same bits as from `branch_rows`; and which op took which wave."""
    plan = mix_grpo(SCHEDULE, 5, range(1, 4))
    plain = [table.plain for table in plan.tables(3, "cpu", torch.float32)]
    assert plain == [index in (2, 3) for index in range(8)], "at step 1 the rows part"
    chosen, calls = ops.choose(backend), []

    def noting(op):
        return lambda *inputs: (calls.append(op), chosen._implementation[op](*inputs))[1]

    noted = replace(chosen, _implementation={op: noting(op) for op in chosen.chosen})
    apart = replace(noted, chosen={**chosen.chosen, "sde_step": "another"})
    runs = [
        Wavefront(plan, 3, SHAPE, some, model_dtype=model_dtype, keep_samples=True).run(
            element_wise(PROMPTS), NoiseKey(7, 3, torch.tensor(PROMPTS))
        )
        for some in (noted, apart)
    ]
    assert calls == [*("sde_step" if one else "branch_rows" for one in plain), *8 * ["branch_rows"]]
    assert torch.equal(runs[0].final_latents, runs[1].final_latents)
    for name in ("states", "velocities", "samples"):
        assert all(torch.equal(one, other) for one, other in zip(*(getattr(run, name) for run in runs)))


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
