"""Sampling against flows whose velocity is known in closed form: data a Gaussian, and a mixture of Gaussians.

`x_t = (1 - t) x_0 + t x_1` with x_1 ~ N(0, 1); for x_0 ~ N(m, d^2) the velocity E[x_1 - x_0 | x_t] is linear in x_t,
and for a mixture it is the posterior-weighted sum of its components'. Every element is one sample; float64.
"""

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats

from egrpo_fast import ops
from egrpo_fast.plan import ANCHOR, Edge, Plan, Wave, ode_plan
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.schedule import AffineStep, Schedule, make_schedule

COMPONENTS = {
    "gaussian": [(1.0, 0.8, 0.5)],
    "mixture": [(0.35, -1.2, 0.3), (0.65, 1.0, 0.5)],
    "point": [(1.0, 0.8, 0.0)],
}
"""weight, mean, standard deviation"""
SPREAD = ("gaussian", "mixture")
SAMPLES, FEW = (64, 2048), (16, 128)


def velocity_of(name):
    def velocity(x, t, rows):
        log_weights, velocities = [], []
        for weight, mean, deviation in COMPONENTS[name]:
            variance = ((1 - t) * deviation) ** 2 + t**2
            residual = x - (1 - t) * mean
            log_weights.append(math.log(weight / math.sqrt(variance)) - residual.square() / (2 * variance))
            velocities.append((t - (1 - t) * deviation**2) / variance * residual - mean)
        return (torch.stack(log_weights).softmax(0) * torch.stack(velocities)).sum(0)

    return velocity


def distribution_function(name, t):
    def cdf(x):
        return sum(
            weight * stats.norm.cdf(x, (1 - t) * mean, math.sqrt(((1 - t) * deviation) ** 2 + t**2))
            for weight, mean, deviation in COMPONENTS[name]
        )

    return cdf


def run(plan, velocity, shape=SAMPLES, seed=0):
    reference = ops.choose("reference")
    wavefront = Wavefront(plan, 1, shape, reference, dtype=torch.float64, model_dtype=torch.float64)
    return wavefront.run(velocity, NoiseKey(seed, 0, torch.tensor([0]))).final_latents.flatten()


def sde_plan(schedule, change=lambda step: step):
    """All steps stochastic but the last few, where the score is stiff: sampled with the ODE."""
    waves = []
    for index in range(schedule.num_steps):
        stochastic = schedule.times[index] > 0.05
        step = change(schedule.sde(index, 1)) if stochastic else schedule.ode(index, index + 1)
        waves.append(Wave(index, schedule.times[index], (Edge(ANCHOR, ANCHOR, step, draw=index << 16),)))
    return Plan(schedule, 1, tuple(waves), ())


def distance(samples, name):
    """Kolmogorov-Smirnov distance between samples and the data distribution."""
    return stats.kstest(samples.numpy(), distribution_function(name, 0.0)).statistic


@pytest.mark.parametrize("name", SPREAD)
def test_ode_converges_at_first_order(name):
    exact, *coarser = (run(ode_plan(make_schedule(n)), velocity_of(name), FEW) for n in (2048, 32, 64, 128))
    errors = [(x - exact).abs().mean().item() for x in coarser]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(0.85 < order < 1.25 for order in orders), (errors, orders)


@pytest.mark.parametrize("form", [{}, {"sde_form": "dance_grpo", "eta": 0.3}], ids=["flow_grpo", "dance_grpo"])
@pytest.mark.parametrize("name", SPREAD)
def test_sde_sampling_keeps_the_marginals_as_steps_shrink(name, form):
    distances = [distance(run(sde_plan(make_schedule(n, **form)), velocity_of(name)), name) for n in (16, 64, 256)]
    assert distances[0] > distances[1] > distances[2], distances
    # At 131,072 samples the 0.1% point of the Kolmogorov-Smirnov distance is 0.0054; the rest is the steps' own bias.
    assert distances[2] < 0.01, distances


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda s: AffineStep(2.0 - s.c_x, s.c_v, s.s), id="score sign"),
        pytest.param(lambda s: AffineStep(1.0, s.c_v, s.s), id="no drift correction"),
        pytest.param(lambda s: AffineStep(s.c_x, s.c_v, 1.3 * s.s), id="noise scale"),
    ],
)
@pytest.mark.parametrize("name", SPREAD)
def test_broken_maths_does_not_keep_the_marginals(name, change):
    """Negative control: with the drift or the noise wrong, small steps do not help."""
    assert distance(run(sde_plan(make_schedule(128), change), velocity_of(name)), name) > 0.05


@pytest.mark.parametrize("length", [1, 3])
def test_coefficients_preserving_sampling_keeps_the_coefficients(length):
    """In x = (1 - t) x_0 + t x_1, v = x_1 - x_0: x_0 gets 1 - t', and x_1 and the new noise together t'."""
    schedule = make_schedule(sde_form="cps", eta=0.8, merge_lengths=1)
    for index in range(schedule.num_steps - length + 1):
        t, end, step = schedule.times[index], schedule.times[index + length], schedule.sde(index, length)
        assert step.c_x * (1 - t) - step.c_v == pytest.approx(1 - end, abs=1e-12)
        assert (step.c_x * t + step.c_v) ** 2 + step.s**2 == pytest.approx(end**2, abs=1e-12)
    last = schedule.sde(schedule.num_steps - 1, 1)
    assert (last.c_x, last.c_v, last.s) == pytest.approx((1.0, -schedule.times[-2], 0.0)), "the ODE's last step"


@pytest.mark.parametrize("num_steps", [8, 16])
@pytest.mark.parametrize(
    ("form", "kept"),
    [
        pytest.param({"sde_form": "cps", "eta": 0.8}, True, id="cps"),
        pytest.param({}, False, id="flow_grpo"),
        pytest.param({"sde_form": "dance_grpo", "eta": 0.7}, False, id="dance_grpo"),
    ],
)
def test_noise_level_at_the_size_of_the_steps(form, kept, num_steps):
    """All data in one point: predictions are exact, and what is left of the noise at time t must be t.

    Coefficients-preserving sampling keeps that at any step size; the other forms, the negative control, do not.
    """
    schedule, (_, mean, _) = make_schedule(num_steps, **form), COMPONENTS["point"][0]
    stop = num_steps - 1
    waves = [Wave(i, schedule.times[i], (Edge(ANCHOR, ANCHOR, schedule.sde(i, 1), draw=i << 16),)) for i in range(stop)]
    x = run(Plan(schedule, 1, tuple(waves), ()), velocity_of("point"))
    t = schedule.times[stop]
    level = ((x - (1 - t) * mean) / t).std().item()
    assert (abs(level - 1) < 4 / math.sqrt(2 * len(x))) == kept, level
    assert kept or level > 1.1, f"noise {level:.2f} times what belongs there"


def test_coefficients_preserving_sampling_does_not_keep_a_spread():
    """Predictions are means over what is uncertain: some of the data's spread, 0.5, goes; small steps do not help."""
    schedules = (make_schedule(n, sde_form="cps", eta=0.8) for n in (16, 256))
    assert all(run(sde_plan(schedule), velocity_of("gaussian")).std() < 0.45 for schedule in schedules)


def test_one_merged_step_has_the_stated_gaussian():
    """Mean and spread of one merged SDE step from a fixed state, against its coefficients."""
    schedule = make_schedule()
    step = schedule.sde(5, schedule.merges[5])
    wave = Wave(5, schedule.times[5], (Edge(ANCHOR, ANCHOR, step, draw=5 << 16),))
    fixed = Wave(0, 1.0, (Edge(ANCHOR, ANCHOR, AffineStep(0.0, 1.0, 0.0)),))  # replaces the noise by the velocity
    plan = Plan(Schedule(schedule.times, 0.7, schedule.merges, ()), 1, (fixed, wave), ())
    x = run(plan, lambda latents, t, rows: torch.full_like(latents, 0.3 if t == 1.0 else -0.9))
    mean, spread = step.c_x * 0.3 + step.c_v * -0.9, step.s
    assert abs(x.mean() - mean) < 4 * spread / math.sqrt(len(x))
    assert abs(x.std() / spread - 1) < 4 / math.sqrt(2 * len(x))
