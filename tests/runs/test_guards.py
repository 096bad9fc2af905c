"""What a run watches in its own numbers."""

import json

import pytest

from egrpo_fast.config import GuardsConfig
from egrpo_fast.runs.guards import SPIKE_LEAST, SPIKE_WINDOW, BadSteps, Guard

QUIET = {"policy_mismatch": 0.0, "clip_fraction": 0.0, "zero_advantage_share": 0.0, "max_log_ratio": 0.0}


def test_only_bad_iterations_in_a_row_end_the_run():
    guard = Guard(GuardsConfig(bad_steps=3))
    for steps in (1, 2, 0, 1, 1, 0, 1, 1):
        guard.skipped(steps, "a reason")
    with pytest.raises(BadSteps, match=r"3 iterations in a row .*guards.bad_steps 3\); the last: a reward of 'a cat'"):
        guard.skipped(1, "a reward of 'a cat'")


@pytest.mark.parametrize("name", QUIET)
def test_an_alarm_for_each_number_that_has_a_bound(name):
    settings = GuardsConfig(**{name: 0.25})
    assert Guard(settings).alarms({**QUIET, name: 0.25}) == []
    assert Guard(settings).alarms({**QUIET, name: 0.26}) == [f"{name} 0.26 is above guards.{name} 0.25"]
    assert Guard(GuardsConfig(**{name: None})).alarms({**QUIET, name: 1.0}) == []


def test_a_number_that_is_none_raises_no_alarm():
    guard = Guard(GuardsConfig())
    assert guard.alarms(dict.fromkeys(QUIET, float("nan"))) == []
    assert guard.state["norms"] == [], "a skipped step has no norm"


def test_a_spike_of_the_gradient_norm():
    guard = Guard(GuardsConfig(grad_norm_spike=10.0))
    for _ in range(SPIKE_LEAST - 1):
        assert guard.alarms({**QUIET, "grad_norm": 0.1}) == []
    assert guard.alarms({**QUIET, "grad_norm": 5.0}) == [], "too few to compare with"
    assert guard.alarms({**QUIET, "grad_norm": 0.9}) == []
    assert guard.alarms({**QUIET, "grad_norm": 1.1}) == ["grad_norm 1.1 is 11 times its running median 0.1"]


def test_the_median_runs_along():
    guard = Guard(GuardsConfig(grad_norm_spike=2.0))
    for norm in [1.0] * SPIKE_WINDOW + [1.9**0.5] * SPIKE_WINDOW:
        guard.alarms({**QUIET, "grad_norm": norm})
    assert len(guard.state["norms"]) == SPIKE_WINDOW
    assert guard.alarms({**QUIET, "grad_norm": 2.1}) == [], "twice the old median, not the new one"


def test_a_resumed_run_warns_alike():
    guard = Guard(GuardsConfig(bad_steps=2))
    for norm in (0.1, 0.2, 0.1, 0.3, 0.1):
        guard.alarms({**QUIET, "grad_norm": norm})
    guard.skipped(1, "")
    again = Guard(GuardsConfig(bad_steps=2))
    again.state = json.loads(json.dumps(guard.state))  # as a checkpoint keeps it
    spike = {**QUIET, "grad_norm": 3.0}
    assert again.alarms(spike) == guard.alarms(spike) != []
    with pytest.raises(BadSteps):
        again.skipped(1, "")
