"""What a run tells: an image that cannot be drawn or written, or a log that is damaged, costs itself alone."""

import json
import resource
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from egrpo_fast.config import load_config
from egrpo_fast.folder_lock import Claim
from egrpo_fast.runs.metrics import METRICS, Work
from egrpo_fast.runs.report import BASE_IMAGES, HeldOut, Report, Sample

IMAGES = torch.zeros(2, 3, 8, 8)
HISTORY = [(0, {"clip": 0.25}), (1, {"clip": 0.5})]
PRODUCTS = {"curve.png", "before_after.png", "summary.json", "pipeline"}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The report of a run of one iteration, before its first evaluation. What it prints is kept in memory."""

    def exported(folder, out, **options):
        out.mkdir()

    monkeypatch.setattr("egrpo_fast.runs.report.export", exported)  # it has tests of its own
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.lock").write_text("mark")
    config = load_config("shapes", [f"output_dir={folder}", "iterations=1"])
    return folder, Report(config, ["a", "b"], 0, False, claim=Claim(folder / "run.lock", "mark", ""))


def evaluate(report, done):
    report.held_out(done, HeldOut(HISTORY[done][1], IMAGES), None, {})


def finish(report):
    """Returns what was warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        report.finish(1, HISTORY, HeldOut(HISTORY[1][1], IMAGES), False)
        report.close()
    return [str(each.message) for each in told if each.category is UserWarning]


def check(folder, *missing):
    assert {path.name for path in folder.iterdir()} & PRODUCTS == PRODUCTS - {*missing}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["held_out"] == {"clip": {"before": 0.25, "after": 0.5}}


def test_a_run_that_nothing_happens_to(run):
    folder, report = run
    for done in (0, 1):
        evaluate(report, done)
    assert finish(report) == []
    check(folder)
    assert len(list((folder / "images").iterdir())) == 2


def test_a_disk_that_is_full_over_an_evaluation(run):
    folder, report = run
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.warns(UserWarning, match="images, plots and summary: File too large; training goes on"):
            evaluate(report, 0)
        assert not (folder / BASE_IMAGES).exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    evaluate(report, 1)
    assert finish(report) == []
    check(folder)
    assert len(list((folder / "images").iterdir())) == 2, "also those of the evaluation that the disk did not take"


def test_a_disk_that_is_full_to_the_end_is_an_error(run):
    folder, report = run
    evaluate(report, 0)
    report._log.end_bar()  # pytest keeps what is printed in a file, which is full then, too
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            finish(report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (folder / "summary.json").exists() and (folder / "pipeline").exists(), "the rest is tried all the same"


@pytest.mark.parametrize("damage", ["cut", "gone", "first line gone", "a bad byte", "log gone"])
def test_what_was_told_before_is_damaged(damage, run):
    """Training is done: no damage to an image or the log may keep the run from its summary and its pipeline."""
    folder, report = run
    for done in (0, 1):
        evaluate(report, done)
    base, log = folder / BASE_IMAGES, folder / METRICS
    if damage == "cut":
        base.write_bytes(base.read_bytes()[:-9])
    elif damage == "gone":
        base.unlink()
    elif damage == "first line gone":
        log.write_bytes(log.read_bytes().split(b"\n", 1)[1])
    elif damage == "a bad byte":
        log.write_bytes(b"\xff" + log.read_bytes()[1:])
    else:
        log.unlink()
    told = finish(report)
    check(folder, *(["before_after.png"] if damage in ("cut", "gone") else []))
    expected = {"cut": "before_after.png: ", "gone": "before_after.png: ", "a bad byte": "1 damaged line"}
    assert len(told) == (damage in expected) and expected.get(damage, "") in "".join(told)


def test_a_image_that_cannot_be_drawn(run, monkeypatch):
    folder, report = run
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda *arguments, **style: 1 / 0)
    with pytest.warns(UserWarning, match="iteration-000000.png: ZeroDivisionError"):
        evaluate(report, 0)
    assert any("before_after.png: ZeroDivisionError" in told for told in finish(report))
    check(folder, "before_after.png")


def test_a_folder_that_was_moved_does_not_come_back_half(run):
    folder, report = run
    moved = folder.rename(folder.with_name("moved"))
    with pytest.warns(UserWarning, match="not the folder any more"):
        evaluate(report, 0)
    assert not folder.exists()
    moved.rename(folder)
    evaluate(report, 1)
    assert finish(report) == []
    check(folder)


def test_best_and_worst_samples_are_files_that_say_what_they_show(run):
    folder, report = run
    image = torch.linspace(0, 1, 192).view(3, 8, 8)
    samples = [Sample("a cat, é", place, {"clip": score}, image) for place, score in (("best", 0.5), ("worst", 0.25))]
    report.iteration(1, {"reward/clip": 0.3, "reward/shapes_soft": 0.1}, {}, ["too bright"], samples)
    report.close()
    (line,) = map(json.loads, (folder / METRICS).read_text().splitlines())
    assert line["alarms"] == ["too bright"]
    best, worst = line["samples"]
    assert best == {
        "file": "samples/iteration-000001-0-best.png", "prompt": "a cat, é", "place": "best", "rewards": {"clip": 0.5}
    }  # fmt: skip
    with Image.open(folder / worst["file"]) as read:
        assert read.text["prompt"] == "a cat, é" and json.loads(read.text["rewards"]) == {"clip": 0.25}
        assert np.array_equal(np.asarray(read), image.mul(255).round().byte().permute(1, 2, 0).numpy())
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["best/0", "worst/0"]


def test_an_image_that_cannot_be_drawn_costs_itself_alone(run):
    folder, report = run
    broken = [Sample("a cat", "best", {"clip": 0.5}, torch.zeros(3, 8))]
    with pytest.warns(UserWarning, match="samples/iteration-000001-0-best.png"):
        report.iteration(1, {"reward/clip": 0.3, "reward/shapes_soft": 0.1}, {}, [], broken)
    report.close()
    assert len((folder / METRICS).read_text().splitlines()) == 1


def test_speed_is_of_an_iterations_own_phases():
    seconds = {"seconds/rollout": 3.0, "seconds/rewards": 0.5, "seconds/update": 0.5, "seconds/evaluation": 100.0}
    told = Work(images=8, flops=2e12, peak=1e12).speed(seconds, torch.device("cpu"))
    assert told.pop("speed/peak_memory_gib") > 0.01
    assert told == {
        "speed/images_per_second": 2.0, "speed/model_tflops_per_second": 0.5, "speed/share_of_peak": 0.5
    }  # fmt: skip
    assert Work(images=8).speed({}, torch.device("cpu")).keys() == {"speed/peak_memory_gib"}
