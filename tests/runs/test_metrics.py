"""The run's log: no line is lost to a disk that takes no more for a while, nor told twice."""

import json
import os
import resource
import sys
import types
from contextlib import contextmanager

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from egrpo_fast.folder_lock import Claim
from egrpo_fast.runs.metrics import METRICS, RunLog

# TensorBoard's thread dies of what it cannot write; a new one takes over.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def log(tmp_path, capsys):  # the progress bar must not be a file
    return RunLog(tmp_path, 10)


@contextmanager
def files_of_at_most(size):
    """Writing past `size` fails, as on a disk that is full, after what still has room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def told_by_tensorboard(folder):
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(event.step, event.value) for event in board.Scalars(name)] for name in board.Tags()["scalars"]}


LINES = [{"iteration": iteration, "loss": iteration / 2} for iteration in range(1, 7)]


def test_a_disk_that_is_full_for_a_while_loses_no_line(log, tmp_path):
    def write(line):
        log.write(line["iteration"], {"loss": line["loss"]})

    write(LINES[0])
    whole = (tmp_path / METRICS).stat().st_size
    with files_of_at_most(whole + 10):
        with pytest.warns(UserWarning) as told:
            for line in LINES[1:4]:
                write(line)
        once = [str(each.message).partition(";")[0] for each in told]
        assert once == [f"{METRICS}: File too large", "tensorboard: File too large"]
        assert (tmp_path / METRICS).stat().st_size == whole + 10, "half a line must be left over, or this shows less"
        assert RunLog.read(tmp_path) == LINES[:1]
        log.sync()
    write(LINES[4])
    assert RunLog.read(tmp_path) == LINES[:5]
    write(LINES[5])
    log.close()
    assert (tmp_path / METRICS).read_text() == "".join(json.dumps(line) + "\n" for line in LINES)
    assert told_by_tensorboard(tmp_path) == {"loss": [(line["iteration"], line["loss"]) for line in LINES]}


def test_tensorboard_alone_may_fail(log, tmp_path):
    log.write(1, {"loss": 0.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    with files_of_at_most(events.stat().st_size), pytest.warns(UserWarning, match="tensorboard: File too large"):
        log.write(2, {"loss": 1.0})
    assert RunLog.read(tmp_path) == LINES[:2]
    log.write(3, {"loss": 1.5})
    log.close()
    assert told_by_tensorboard(tmp_path) == {"loss": [(1, 0.5), (2, 1.0), (3, 1.5)]}
    assert RunLog.read(tmp_path) == LINES[:3]


def test_lines_that_are_lost_at_the_end_are_named_and_end_no_run(log, tmp_path):
    with files_of_at_most(0):
        with pytest.warns(UserWarning, match="File too large"):
            log.write(1, {"loss": 0.5})
            log.write(2, {"loss": 1.0})
        with pytest.warns(
            UserWarning, match=f"{METRICS}: File too large; lost are the lines of these iterations: 1, 2$"
        ):
            log.close()
    assert (tmp_path / METRICS).read_bytes() == b""


def raw(*lines):
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


DONE = [{"iteration": 0, "held_out/clip": 0.5}, *({**line, "skipped_steps": 0} for line in LINES[:4])]


def test_a_resumed_run_goes_on_after_what_its_checkpoint_knows(tmp_path, capsys):
    (tmp_path / METRICS).write_bytes(raw(*DONE, {"iteration": 4, "held_out/clip": 0.6}, b'{"iteration": 5, "lo'))
    RunLog(tmp_path, 10, 4, evaluated=False).close()
    assert (tmp_path / METRICS).read_bytes() == raw(*DONE)
    RunLog(tmp_path, 10, 2).close()
    assert (tmp_path / METRICS).read_bytes() == raw(*DONE[:3])


@pytest.mark.parametrize("damage", [b'{"iteration": 0, "held\xffout/clip": 0.5}\n', b"\n", b"7\n", b'{"loss": 1}\n'])
@pytest.mark.parametrize("place", [0, 2])
def test_a_damaged_line_is_told_and_costs_no_other(damage, place, tmp_path, capsys):
    lines = [*DONE[:place], damage, *DONE[place + 1 :]]
    (tmp_path / METRICS).write_bytes(raw(*lines))
    log = RunLog(tmp_path, 10, 4)
    log.write(5, {"loss": 2.5})
    log.close()
    assert (tmp_path / METRICS).read_bytes() == raw(*lines, LINES[4]), "what was there stays as it was"
    with pytest.warns(UserWarning, match=f"{METRICS}: 1 damaged line"):
        assert RunLog.read(tmp_path) == [line for line in lines if line != damage] + [LINES[4]]


def test_a_log_that_cannot_be_read_is_no_empty_one(tmp_path):
    (tmp_path / METRICS).mkdir()
    with pytest.raises(ValueError, match=f"{METRICS} cannot be read: it is a folder"):
        RunLog(tmp_path, 10, 4)


def test_a_folder_that_was_moved_is_written_to_again_once_it_is_back(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.lock").write_text("mark")
    log = RunLog(run, 10, claim=Claim(run / "run.lock", "mark", ""))
    log.write(1, {"loss": 0.5})
    moved = run.rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match="run is not the folder any more .*move it back") as told:
        log.write(2, {"loss": 1.0})
    assert len(told) == 2 and list(tmp_path.iterdir()) == [moved]
    run.mkdir()
    (run / METRICS).write_text("another run's\n")
    log.write(3, {"loss": 1.5})
    assert (run / METRICS).read_text() == "another run's\n"
    run.rename(tmp_path / "other")
    moved.rename(run)
    log.close()
    assert RunLog.read(run) == LINES[:3]


def test_sync_puts_the_lines_on_the_disk(log, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def watched(descriptor):
        fsync(descriptor)
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", watched)
    log.write(1, {"loss": 0.5})
    log.sync()
    size = (tmp_path / METRICS).stat().st_size
    assert synced[0] == (str(tmp_path / METRICS), size) and synced[1][0] == str(tmp_path) and size > 0
    log.close()


def test_wandb_may_be_asked_for_by_a_resumed_run(tmp_path, monkeypatch):
    started = []
    quiet = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    wandb = types.SimpleNamespace(init=lambda **options: started.append(options["id"]) or quiet)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start, config in ((0, None), (3, {}), (5, {}), (0, {})):
        RunLog(tmp_path, 10, start, wandb_config=config).close()
    first, resumed, fresh = started
    assert first == resumed != fresh and all(len(name) == 32 for name in started)


def test_wandb_may_fail(tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no network")

    silent = types.SimpleNamespace(log=fails, finish=fails)
    for init in (fails, lambda **options: silent):
        monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
        with pytest.warns(UserWarning, match="wandb: RuntimeError: no network; training goes on"):
            log = RunLog(tmp_path, 10, wandb_config={})
            log.write(1, {"loss": 0.5})
            log.close()
        assert RunLog.read(tmp_path) == LINES[:1]


def test_a_log_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / METRICS)
    with pytest.raises(ValueError, match="metrics.jsonl cannot be read: it is a pipe"):
        RunLog.read(tmp_path)
