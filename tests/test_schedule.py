"""The closed forms against the paper's tables, to three decimals."""

import json
import math
import subprocess
import sys
from itertools import pairwise

import pytest

from egrpo_fast.schedule import make_schedule, time_grid

PAPER_ENTROPY = [2.893, 2.989, 2.137, 1.763, 1.542, 1.392, 1.281, 1.193]
PAPER_MERGES = {
    0.0: [1, 1, 1, 1, 1, 1, 1, 1],
    1.8: [1, 1, 1, 2, 2, 2, 2, 3],
    2.0: [1, 1, 1, 2, 2, 2, 3, 3],
    2.2: [1, 1, 2, 2, 2, 3, 3, 3],
    2.6: [1, 1, 2, 3, 3, 4, 4, 4],
}


def test_entropy_table():
    schedule = make_schedule()
    assert [round(schedule.entropy(i, 1), 3) for i in range(8)] == PAPER_ENTROPY
    # Written out for one step: sigma at the starting time, D to the next.
    t, following = schedule.times[3], schedule.times[4]
    sigma = 0.7 * math.sqrt(t / (1 - t))
    by_hand = math.sqrt(2 * math.pi * math.e * sigma**2 * (t - following))
    assert schedule.entropy(3, 1) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("threshold", PAPER_MERGES)
def test_merge_table(threshold):
    schedule = make_schedule(entropy_threshold=threshold)
    assert list(schedule.merges[:8]) == PAPER_MERGES[threshold]
    assert schedule.active == tuple(range(8))


@pytest.mark.parametrize("num_steps", [2, 7, 16, 25, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("eta", [0.1, 0.7, 1.5])
def test_every_schedule_is_sound(num_steps, shift, eta):
    schedule = make_schedule(num_steps, shift, eta)
    assert schedule.times[0] == 1.0 and schedule.times[-1] == 0.0
    assert all(a > b for a, b in pairwise(schedule.times))
    for index, length in enumerate(schedule.merges):
        assert 1 <= length <= num_steps - index
        reached = schedule.entropy(index, length) >= 2.2
        assert reached or index + length == num_steps, "not merged far enough"
        assert length == 1 or schedule.entropy(index, length - 1) < 2.2, "merged too far"


def test_merge_choices():
    assert make_schedule(merge_lengths=4).merges == (4,) * 13 + (3, 2, 1)
    assert make_schedule(entropy_threshold=2.6, max_merge=2).merges[:8] == (1, 1, 2, 2, 2, 2, 2, 2)
    assert make_schedule(4, merge_lengths=[1, 2, 2, 1]).merges == (1, 2, 2, 1)
    assert make_schedule(active_steps=[3, 11]).active == (3, 11)


def test_affine_steps():
    schedule = make_schedule()
    t, duration = schedule.times[5], schedule.times[5] - schedule.times[8]
    sigma = 0.7 * math.sqrt(t / (1 - t))
    step = schedule.sde(5, 3)
    x, v = 0.3, -1.1
    mean = x - duration * (v + sigma**2 / (2 * t) * (x + (1 - t) * v))
    assert step.c_x * x + step.c_v * v == pytest.approx(mean, rel=1e-12)
    assert step.s == pytest.approx(sigma * math.sqrt(duration), rel=1e-12)
    assert (schedule.ode(5, 6).c_x, schedule.ode(5, 6).s) == (1.0, 0.0)
    # At t = 1 the noise scale would be infinite; 1 - t_1 stands in for 1 - t.
    assert schedule.sigma(0) == pytest.approx(0.7 * math.sqrt(1 / (1 - schedule.times[1])), rel=1e-12)


def test_grid():
    assert time_grid(4, 3.0) == pytest.approx([1.0, 2.25 / 2.5, 1.5 / 2.0, 0.75 / 1.5, 0.0])


@pytest.mark.parametrize("threshold", PAPER_MERGES)
def test_plan_command(threshold):
    """`egrpo plan --json` reproduces the paper's numbers, from a shell."""
    command = [sys.executable, "-m", "egrpo_fast.cli", "plan", "shapes", f"schedule.entropy_threshold={threshold}"]
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert [round(step["entropy_unmerged"], 3) for step in told["steps"][:8]] == PAPER_ENTROPY
    assert [step["merge"] for step in told["steps"][:8]] == PAPER_MERGES[threshold]
    assert [step["trained"] for step in told["steps"]] == [True] * 8 + [False] * 8
    if threshold == 2.2:
        assert told["work"]["model_calls"] == 16
        assert told["work"]["evaluations_without_gradient"] == 1004
        assert told["work"]["evaluations_with_gradient"] == 8
        assert told["work"]["evaluations_one_image_at_a_time"] == 1428


def ode_error(num_steps, solver):
    """Of x(0) for dx/dt = x + cos 3t from x(1) = 1, whose solution is known."""
    schedule, x, before = make_schedule(num_steps, shift=1.0), 1.0, None
    for i, t in enumerate(schedule.times[:-1]):
        v = x + math.cos(3 * t)
        h = schedule.extrapolation(solver, i - 1, i, i + 1) if i else 0.0
        x, before = x + schedule.ode(i, i + 1).c_v * (v + h * (v - (before if i else v))), v

    def particular(t):
        return (3 * math.sin(3 * t) - math.cos(3 * t)) / 10

    return abs(x - (particular(0) + (1 - particular(1)) * math.exp(-1)))


@pytest.mark.parametrize(("solver", "least"), [("euler", 1.9), ("ab2", 3.5), ("dpm2m", 3.5)])
def test_the_order_of_a_solver(solver, least):
    """Half the step, a quarter of the error; half of it for Euler."""
    errors = [ode_error(steps, solver) for steps in (16, 32, 64)]
    assert all(coarse / fine > least for coarse, fine in pairwise(errors))
    assert solver != "euler" or all(coarse / fine < 2.2 for coarse, fine in pairwise(errors))


def test_dpm2m_is_of_second_order_but_for_a_logarithm():
    """N^2 times the error of N steps: a constant for `ab2`; for `dpm2m` it grows by the same with every doubling."""
    constant, growing = (
        [ode_error(steps, solver) * steps**2 for steps in (512, 1024, 2048)] for solver in ("ab2", "dpm2m")
    )
    assert max(constant) < 1.01 * min(constant)
    first, second = (later - earlier for earlier, later in pairwise(growing))
    assert first == pytest.approx(second, rel=0.02) and first > 0.2 * growing[0]


def test_dpm2m_is_dpm_solver_plus_plus_over_its_first_two_steps():
    """Written out: `x' = (t'/t) x + (1 - t' - (1 - t) t'/t) [x_0 + r (x_0 - x_0_before)]`, r of the log-SNRs."""
    schedule = make_schedule(8)
    (s, t, end), v = schedule.times[2:5], [0.7, -0.4]
    snr = [math.log((1 - u) / u) for u in (s, t, end)]
    first = 1.3 - (s - t) * v[0]
    before, now = 1.3 - s * v[0], first - t * v[1]
    prediction = now + (snr[2] - snr[1]) / (2 * (snr[1] - snr[0])) * (now - before)
    expected = end / t * first + (1 - end - end / t * (1 - t)) * prediction
    h = schedule.extrapolation("dpm2m", 2, 3, 4)
    assert first - (t - end) * (v[1] + h * (v[1] - v[0])) == pytest.approx(expected, rel=1e-12)


def test_no_history_where_the_log_snr_is_infinite():
    schedule = make_schedule(4)
    assert schedule.extrapolation("dpm2m", 0, 1, 2) == schedule.extrapolation("dpm2m", 2, 3, 4) == 0.0
    assert schedule.extrapolation("dpm2m", 1, 2, 3) > 0.0 < schedule.extrapolation("ab2", 0, 1, 2)
