"""A reward that raises, hangs or returns NaN; a rank that dies. What is skipped is skipped on every rank alike."""

import re
import signal
import time

import pytest
import torch
from forked import BOUND, iterations, newest, unsound

from egrpo_fast.distributed.checkpoint import CheckpointReader

FEW = ["iterations=4", "checkpoint.save_total_limit=9", "checkpoint.best=null", "evaluation.every=0"]


def faulty(fault, **options):
    told = ", ".join(f"{name}: {value}" for name, value in {"fault": fault, **options}.items())
    return f"rewards=[{{name: 'fault_injection:FaultyReward', options: {{{told}}}}}]"


def trained_weights(folder, iteration):
    reader = CheckpointReader(folder / "checkpoints" / f"iteration-{iteration:06d}")
    return {(kind, name): reader.tensor(name, kind) for kind in reader.kinds() for name in reader.names(kind)}


def changed(folder, iteration):
    """Whether an iteration changed a weight, an average or a moment."""
    before, after = trained_weights(folder, iteration - 1), trained_weights(folder, iteration)
    return any(not torch.equal(before[key], after[key]) for key in after if key in before)


@pytest.mark.parametrize("fault", ["nan", pytest.param("raise", marks=pytest.mark.slow)])
def test_one_bad_reward_on_one_rank_skips_the_step_on_both(fault, server, tmp_path, figures):
    run = tmp_path / "run"
    told = server.run(run, *FEW, faulty(fault, first=2, last=2, rank=1), ranks=2)
    found = iterations(run)
    assert [line["skipped_steps"] for line in found] == [0, 1, 0, 0]
    assert ["skipped_prompts" in line for line in found] == [False, True, False, False]
    (concerned,) = found[1]["skipped_prompts"]
    assert f"latents or rewards of {concerned!r} at iteration 2 not finite" in told
    assert [changed(run, iteration) for iteration in (2, 3, 4)] == [False, True, True]
    assert "grad_norm" not in found[1] and all("grad_norm" in found[at] for at in (0, 2, 3))
    assert found[2]["lr"] == pytest.approx(found[1]["lr"]), "the schedule waits with the weights"
    figures[f"reward: {fault} once, on one of two ranks"] = "skipped on both, nothing changed, the prompt is named"


@pytest.mark.slow
def test_always_bad_rewards_end_the_run_with_a_report(server, tmp_path, figures):
    run = tmp_path / "run"
    told = server.run(run, *FEW, "guards.bad_steps=2", faulty("nan", first=3), codes=[1])
    assert re.search(
        r"BadSteps: 2 iterations in a row were not finite and changed nothing \(guards.bad_steps 2\); the last: latents"
        " or rewards of '.*', '.*' at iteration 3",
        told,
    )
    assert [line["skipped_steps"] for line in iterations(run)] == [0, 1, 1]
    assert unsound(run) == [] and newest(run) == 3
    figures["reward: NaN always"] = "ends after guards.bad_steps, names the prompts, status 1"


@pytest.mark.slow
def test_a_reward_that_raises_ends_the_run_where_it_shall(server, tmp_path, figures):
    run = tmp_path / "run"
    started = server.start(run, *FEW, "objective.on_error=stop", faulty("raise", first=2, rank=1), ranks=2)
    codes, told = started.wait(), started.told()
    assert not started.kill() and codes[0] in (1, 75) and codes[1] == 1, told[-4000:]
    ill = "RewardError: rewards.fault_injection:FaultyReward: RuntimeError: the judge is ill"
    assert re.search(f"rank 1 failed.*: {ill}", told)
    assert unsound(run) == [] and newest(run) == 1
    figures["reward: raises, objective.on_error=stop"] = f"ends both ranks by its name, status {codes}"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reward_that_hangs_is_told_by_name(ranks, server, tmp_path, figures):
    run, began = tmp_path / "run", time.monotonic()
    started = server.start(
        run, *FEW, f"prompts.per_iteration={ranks}", "guards.stall_seconds=8",
        faulty("hang", first=2, rank=ranks - 1), ranks=ranks,
    )  # fmt: skip
    codes = started.wait()
    told, seconds = started.told(), time.monotonic() - began
    assert not started.kill() and codes[-1] == 75 and all(codes), told[-4000:]
    assert re.search(rf"rank {ranks - 1} waited \d+ s in reward \S+ \(iteration 2\)", told)
    assert "fault_injection.py" in told, "the traceback of who hangs"
    assert unsound(run) == [] and newest(run) == 1
    figures[f"reward: hangs, {ranks} rank(s)"] = f"told by rank and phase with its traceback, status {codes}"
    assert seconds < BOUND


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_takes_the_other_with_it(victim, server, tmp_path, figures):
    run = tmp_path / "run"
    started = server.start(run, "iterations=1000", "evaluation.every=0", ranks=2)
    while newest(run) < 2:
        assert started.wait(0.1) == [None, None], started.told()
    began = time.monotonic()
    started.kill([victim])
    codes = started.wait()
    seconds, told = time.monotonic() - began, started.told()
    assert not started.kill() and codes[victim] == -signal.SIGKILL and codes[1 - victim] in (1, 75), told[-4000:]
    assert f"rank {victim} is gone" in told or re.search(rf"rank {victim}: .*\(not heard of for", told)
    assert unsound(run) == []
    figures[f"rank {victim} of two killed"] = (
        f"the other names it and ends, status {codes[1 - victim]}, {seconds:.1f} s"
    )
