"""Ranks are real processes: one that stalls, dies or is killed is named by the others, and nobody hangs."""

import os
import re
import subprocess
import sys
import time
import timeit
from pathlib import Path

import pytest

from egrpo_fast.distributed.heartbeat import EXIT_CODE, Entry, Heartbeat, culprits, describe, name_ranks
from egrpo_fast.distributed.world import free_port

SCRIPT = Path(__file__).with_name("heartbeat_scenarios.py")
BOUND = 600
"""Seconds until a scenario counts as hung, on however busy a machine. The scenarios themselves wait for ever."""


def run(scenario, ranks, culprit, stall_seconds=BOUND, gone_seconds=30.0, beat=0.1):
    """Exit code and stderr of every rank. gone_seconds: a busy machine may keep a rank silent for long."""
    port = str(free_port())
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, scenario, *map(str, (culprit, stall_seconds, gone_seconds, beat))],
            stderr=subprocess.PIPE, text=True, env={**environment, "RANK": str(rank), "WORLD_SIZE": str(ranks)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=BOUND)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    print(f"{scenario}: {time.monotonic() - start:.1f} s", *told, sep="\n")
    return [process.returncode for process in processes], told


def test_a_stalled_rank_is_named_by_the_others():
    codes, told = run("stalled", 3, culprit=1, stall_seconds=2)
    assert codes[1] == EXIT_CODE and all(codes)  # gloo may tell the others first, that rank 1 has left
    for rank in (0, 2):
        assert re.search(r"rank 1: reward hps, \d+ s", told[rank]) and re.search(r"gather, \d+ s", told[rank])
        stalled = rf"rank {rank} waited \d+ s in gather\nlikely for rank 1, which came less far"
        assert re.search(stalled, told[rank]) or f"rank {rank} failed in gather" in told[rank]
    assert re.search(r"rank 1 waited \d+ s in reward hps\nthe others likely wait for it", told[1])
    assert "in stuck_in_a_reward" in told[1]


@pytest.mark.slow
def test_the_stores_rank_ends_only_when_the_others_know_why():
    codes, told = run("stalled_alone", 2, culprit=0, stall_seconds=1)
    assert codes == [EXIT_CODE] * 2
    assert re.search(r"rank 0 failed: rank 0 waited \d+ s in decoding", told[1])
    assert "store" not in told[1].split("[heartbeat]")[1]


@pytest.mark.parametrize(
    ("ranks", "culprit"), [pytest.param(2, 0, marks=pytest.mark.slow), (3, 1)], ids=["the store's rank", "another"]
)
def test_a_killed_rank_is_named(ranks, culprit):
    codes, told = run("killed", ranks, culprit, gone_seconds=10)
    assert codes == [EXIT_CODE if rank != culprit else -9 for rank in range(ranks)]
    for rank in set(range(ranks)) - {culprit}:
        assert re.search(f"rank {culprit} is gone: .*, last in rollout step 3", told[rank])


@pytest.mark.parametrize(
    ("ranks", "culprit"), [pytest.param(2, 0, marks=pytest.mark.slow), (3, 1)], ids=["the store's rank", "another"]
)
def test_a_failed_rank_is_named_with_its_error(ranks, culprit):
    codes, told = run("failed", ranks, culprit)
    assert codes == [EXIT_CODE if rank != culprit else 1 for rank in range(ranks)]
    assert "Traceback" in told[culprit] and f"rank {culprit} failed in saving shard 2: OSError" in told[culprit]
    for rank in set(range(ranks)) - {culprit}:
        assert f"rank {culprit} failed: OSError: No space left on device" in told[rank]


@pytest.mark.slow
def test_python_ends_in_peace_after_a_failure():
    """Beats so fast that the thread is almost surely inside a store call: frozen there, it would abort the process."""
    codes, _ = run("failed", 2, culprit=1, beat=1e-4)
    assert codes[1] == 1


def test_whoever_loses_its_peer_in_a_collective_tells_who_fell_silent():
    """The collective's own error comes first, long before `gone_seconds`, and knows no ranks."""
    codes, told = run("killed_in_a_collective", 2, culprit=1)
    assert codes == [1, -9]
    assert "rank 0 failed in gather rewards: " in told[0]
    assert re.search(r"rank 1: gather rewards, .* \(not heard of for", told[0])


@pytest.mark.slow
def test_slow_ranks_that_progress_end_well():
    """Rank 0, which serves the store, is done long before the other."""
    codes, told = run("fine", 2, culprit=1, stall_seconds=5)
    assert codes == [0, 0] and "[heartbeat]" not in "".join(told)


def test_one_rank_needs_no_store():
    codes, told = run("stalled", 1, culprit=0, stall_seconds=1)
    assert codes == [EXIT_CODE]
    assert re.search(r"rank 0 waited \d+ s in reward hps", told[0]) and "stuck_in_a_reward" in told[0]
    assert "likely" not in told[0] and "all ranks" not in told[0]


@pytest.mark.slow
def test_a_call_that_holds_pythons_lock_ends_too():
    codes, told = run("lock_held", 1, culprit=0, stall_seconds=1, gone_seconds=2)
    assert codes == [1] and "lock_held" in told[0]


def test_at_is_cheap():
    heartbeat = Heartbeat(0, 1, None, 60)
    said, clock = (
        min(timeit.repeat(call, number=2_000, repeat=25))
        for call in (lambda: heartbeat.at("loading", "weight"), time.monotonic)
    )
    heartbeat.close()
    print(f"{said / clock:.1f} times as long as reading the clock")
    assert said < 30 * clock  # a lock, a file or a store would take hundreds


def test_whom_a_rank_waits_for():
    at = {"gather": Entry(4, "gather"), "reward": Entry(3, "reward"), "closed": Entry(2, "end", closed=True)}
    assert culprits({0: at["gather"], 1: at["reward"], 2: at["gather"]}, 0) == [1]
    assert culprits({0: at["gather"], 1: at["reward"]}, 1) == [1]
    assert culprits({0: at["gather"], 1: at["gather"], 2: at["closed"]}, 0) == []
    assert culprits({0: Entry(4, "a"), 1: Entry(4, "b"), 2: Entry(4, "a")}, 2) == [1]


def test_ranks_of_one_place_share_a_line():
    assert name_ranks([1]) == "rank 1" and name_ranks([5, 0, 2, 3, 4]) == "ranks 0, 2-5"
    table = {r: Entry(1, "loading", "q.weight", r, silent=9.0 * (r == 2)) for r in range(4)}
    assert describe(table, hush=3).splitlines() == [
        "  ranks 0-1, 3: loading q.weight, 3 s",
        "  rank 2: loading q.weight, 2 s (not heard of for 9 s)",
    ]
    assert describe({0: Entry(1, "saving", failure="OSError: full")}) == "  rank 0: saving, 0 s (failed: OSError: full)"


@pytest.mark.parametrize("name", ["stall_seconds", "gone_seconds", "beat"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_times_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: "):
        Heartbeat(0, 1, None, **{"stall_seconds": 1.0, name: value})


def test_several_ranks_need_a_store():
    with pytest.raises(ValueError, match="store: None for 2 ranks"):
        Heartbeat(0, 2, None, 1.0)


def test_a_program_of_one_rank_goes_on_after_a_failure():
    with pytest.raises(KeyError), Heartbeat(0, 1, None, 300.0, beat=0.01) as heart:
        raise KeyError("no such image")
    assert not heart._thread.is_alive()
