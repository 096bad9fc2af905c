"""SIGTERM and Ctrl-C in every phase: a checkpoint, exit status 0 or 130, and a resume that equals the whole run."""

import random
import re
import signal
import time

import pytest
from forked import differences, newest, unsound

TERM, INT = signal.SIGTERM, signal.SIGINT
PHASES = {  # phase and for the how manieth time it is entered -> iterations that are done when the run has ended
    ("loading", 3): 0,
    ("evaluation", 1): 0,
    ("evaluation", 2): 3,
    ("rollout", 2): 1,
    ("model call", 18): 1,
    ("rewards", 5): 1,
    ("update", 2): 1,
    ("checkpoint", 2): 2,
    ("export", 1): 8,
}


def end(server, folder, number, phase, ranks=1, asked=0):
    """Run until the signal ends it; then check what it said and left."""
    code = {TERM: 0, INT: 130}[number]
    told = server.run(folder, ranks=ranks, codes=[code] * ranks, signal_at={asked: (number, *phase)})
    assert f"{number.name}: ending with a checkpoint" in told and "Traceback" not in told
    assert unsound(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: f"{phase[0]}-{phase[1]}")
def test_asked_to_end_in_a_phase(phase, server, one_rank, tmp_path, figures):
    run = tmp_path / "run"
    end(server, run, TERM, phase)
    assert newest(run) == PHASES[phase]
    if phase[0] != "export":  # which is the run's last act, and is finished
        server.resume(run)
    assert differences(run, one_rank) == []
    figures[f"SIGTERM in {phase[0]} {phase[1]}"] = f"status 0, checkpoint {PHASES[phase]}, resumed bit for bit"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "asked"), [(TERM, 1), (INT, 0)], ids=["SIGTERM to rank 1", "Ctrl-C"])
def test_one_of_two_ranks_is_asked_and_both_end(number, asked, server, two_ranks, tmp_path, figures):
    run = tmp_path / "run"
    end(server, run, number, ("model call", 15), ranks=2, asked=asked)
    server.resume(run, ranks=2)
    assert differences(run, two_ranks) == []
    figures[f"{number.name} to one of two ranks"] = "both end alike, resumed bit for bit"


@pytest.mark.slow
def test_asked_at_random_moments(server, two_ranks, tmp_path, figures):
    run, rng, longest = tmp_path / "run", random.Random(4), 0.0
    for attempt in range(6):
        ranks = server.start(run, *["resume=true"] * bool(attempt), ranks=2)
        while "loading: 100%" not in ranks.told():  # before, a signal is the process's plain end
            assert ranks.wait(0.05) == [None, None], ranks.told()
        time.sleep(rng.uniform(0.0, 2.0))
        began = time.monotonic()
        assert ranks.kill([rng.randrange(2)], TERM) == 1
        assert ranks.wait() == [0, 0], ranks.told()[-4000:]
        longest = max(longest, time.monotonic() - began)
        assert unsound(run) == []
    server.resume(run, ranks=2)
    assert differences(run, two_ranks) == []
    figures["SIGTERM at random moments"] = f"6, status 0 each, at most {longest:.1f} s; resumed bit for bit"


@pytest.mark.slow
def test_who_cannot_end_in_time_is_ended(server, tmp_path, figures):
    """A reward hangs: no checkpoint of the step, status 143; the one before stands."""
    run = tmp_path / "run"
    told = server.run(
        run, "rewards=[{name: 'fault_injection:FaultyReward', options: {fault: hang, first: 3}}]",
        "checkpoint.best=null", "guards.stop_seconds=2", codes=[143], signal_at={0: (TERM, "rewards", 5)},
    )  # fmt: skip
    assert re.search("not done 2 s after being asked: ended at once", told)
    assert newest(run) == 1 and unsound(run) == []
    figures["SIGTERM while a reward hangs"] = "status 143 after guards.stop_seconds, checkpoint 1 stands"
