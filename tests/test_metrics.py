"""The run's log: no line is lost to a disk that takes no more for a while, nor told twice."""

import json
import os
import resource
import sys
import types
from contextlib import contextmanager

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from egrpo_fast.metrics import METRICS, RunLog

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
        for count, line in enumerate(LINES[1:4], 1):
            with pytest.warns(UserWarning, match=rf"{METRICS} and tensorboard: File too large; {count} line\(s\) wait"):
                write(line)
        assert (tmp_path / METRICS).stat().st_size == whole + 10, "half a line must be left over, or this shows less"
        assert RunLog.read(tmp_path) == LINES[:1]
        with pytest.warns(UserWarning, match="File too large"):
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
    with files_of_at_most(events.stat().st_size), pytest.warns(UserWarning, match=r"File too large; 1 line\(s\) wait"):
        log.write(2, {"loss": 1.0})
    assert RunLog.read(tmp_path) == LINES[:2]
    log.write(3, {"loss": 1.5})
    log.close()
    assert told_by_tensorboard(tmp_path) == {"loss": [(1, 0.5), (2, 1.0), (3, 1.5)]}
    assert RunLog.read(tmp_path) == LINES[:3]


def test_lines_that_are_lost_at_the_end_are_an_error(log, tmp_path):
    with files_of_at_most(0):
        with pytest.warns(UserWarning, match="File too large"):
            log.write(1, {"loss": 0.5})
        with (
            pytest.warns(UserWarning, match="File too large"),
            pytest.raises(OSError, match=rf"{METRICS}: 1 line\(s\) could not be written: File too large"),
        ):
            log.close()
    assert (tmp_path / METRICS).read_bytes() == b""


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
