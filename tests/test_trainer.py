"""How the loop begins and ends: from which checkpoint a run goes on, and when it is refused. No model."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from egrpo_fast.config import CHECKPOINTS, RUN_FILE, load_config
from egrpo_fast.distributed.checkpoint import Checkpoints, Piece
from egrpo_fast.folder_lock import Claim
from egrpo_fast.runs.guards import Guard
from egrpo_fast.runs.metrics import METRICS
from egrpo_fast.runs.progress import Progress
from egrpo_fast.trainer import TrainingLoop

ALONE = SimpleNamespace(
    is_main=True, rank=0, size=1, device=torch.device("cpu"), broadcast=lambda value: value,
    gather=lambda value: [value],
)  # fmt: skip


class Resumed(TrainingLoop):
    """What is left of a run, in a folder. `restored`: the checkpoint that it goes on from."""

    restored = None

    def __init__(self, folder, *overrides, run="this"):
        self.config = load_config("shapes", [f"output_dir={folder}", "checkpoint.every=2", *overrides])
        self.world, self.claim = ALONE, Claim(folder / "run.lock", "", run)
        self.progress = Progress(ALONE, SimpleNamespace(at=lambda *place: None), SimpleNamespace(signal=0))
        self.engine = SimpleNamespace(restore=self._restore)
        self.sampler, self.guard, self.history = SimpleNamespace(state=0), Guard(self.config.guards), []
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, keep=9, claim=self.claim)
        self._resume()

    def _restore(self, reader, steps):
        self.restored = reader.path.name


@pytest.fixture
def run(tmp_path):
    """The folder of a run with checkpoints of iterations 2 and 4, killed in its 6th."""
    folder = tmp_path / "run"
    written(folder, "this", 2, 4)
    (folder / METRICS).write_text("".join(json.dumps({"iteration": done}) + "\n" for done in range(1, 6)))
    return folder


def written(folder, run, *iterations):
    folder.mkdir(exist_ok=True)
    claim = Claim(folder / "run.lock", "mark", run)
    claim.lock_file.write_text("mark")
    checkpoints = Checkpoints(folder / CHECKPOINTS, asynchronous=False, claim=claim)
    state = {"optimizer_steps": 0, "held_out": [], "guard": {"bad_in_a_row": 0, "norms": []}}
    for iteration in iterations:
        pieces = [Piece("w", "weight", 0, (3,), torch.full((3,), float(iteration)))]
        checkpoints.save(iteration, pieces, {}, {**state, "iteration": iteration}, f"{run}-{iteration}")


def test_a_run_goes_on_from_its_newest_checkpoint(run):
    trainer = Resumed(run)
    assert trainer.restored == "iteration-000004" and trainer.iteration == 4


def test_a_file_that_cannot_be_read_sends_the_run_one_checkpoint_back(run, unprivileged):
    (file,) = (run / CHECKPOINTS / "iteration-000004").glob("rank-*")
    file.chmod(0)
    with unprivileged(), pytest.warns(UserWarning, match=f"iteration-000004 is damaged .*{file.name}"):
        assert Resumed(run).restored == "iteration-000002"


def test_a_whole_checkpoint_of_another_run_is_passed_over(run, tmp_path):
    written(tmp_path / "other", "other", 5)
    shutil.copytree(tmp_path / "other" / CHECKPOINTS / "iteration-000005", run / CHECKPOINTS / "iteration-000005")
    with pytest.warns(UserWarning, match=r"iteration-000005 .*checkpoint.json: of another run"):
        assert Resumed(run).restored == "iteration-000004"
    shutil.copytree(run / CHECKPOINTS / "iteration-000002", run / CHECKPOINTS / "iteration-000006")
    with pytest.warns(UserWarning, match=r"iteration-000006 .*checkpoint.json: of iteration 2"):
        assert Resumed(run).restored == "iteration-000004"


def test_a_run_copied_without_its_record_is_refused_with_the_way_out(run):
    with pytest.raises(ValueError, match=r"resume: .*run.json is missing, which says whose .*; put run.json back"):
        Resumed(run, run="")
    (run / RUN_FILE).write_text("{}")
    with pytest.warns(UserWarning, match="of another run"), pytest.raises(ValueError, match="every checkpoint in"):
        Resumed(run, run="")


def test_runs_from_before_checkpoints_bore_names_go_on(tmp_path):
    written(tmp_path / "run", "", 2)
    assert Resumed(tmp_path / "run", run="").restored == "iteration-000002"


@pytest.mark.parametrize("why", ["mode 000", "dangling link", "a file", "deleted", "finished and deleted", "emptied"])
def test_a_run_whose_checkpoints_are_out_of_reach_does_not_begin_again(why, run, unprivileged):
    folder, aside = run / CHECKPOINTS, run / "aside"
    if why == "mode 000":
        folder.chmod(0)
    else:
        folder.rename(aside)
    if why == "dangling link":
        folder.symlink_to(run / "not mounted")
    elif why == "a file":
        folder.touch()
    elif why == "emptied":
        folder.mkdir()
    elif why == "finished and deleted":
        (run / METRICS).unlink()
        (run / "summary.json").touch()
    expected = "there is no checkpoint in" if "ed" in why else "cannot be read"
    with unprivileged(), pytest.raises(ValueError, match=f"resume: .*{expected}"):
        Resumed(run)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(run):
    shutil.rmtree(run / CHECKPOINTS)
    (run / METRICS).write_text("".join(json.dumps({"iteration": done}) + "\n" for done in range(1, 5)))
    with pytest.warns(UserWarning, match="there is no checkpoint in .*; the run begins again"):
        trainer = Resumed(run)
    assert trainer.restored is None and trainer.iteration == 0


def test_fewer_iterations_than_are_done_are_told(run):
    with pytest.warns(UserWarning, match="iterations: 1 are asked for, 4 are done already; the run ends with these"):
        assert Resumed(run, "iterations=1").iteration == 4
