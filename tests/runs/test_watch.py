"""The reward-hacking watch: its rule on histories made by hand, and a run that it stops, interrupted or not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from egrpo_fast.config import ConfigError, load_config
from egrpo_fast.distributed.world import free_port
from egrpo_fast.plan import ode_plan
from egrpo_fast.prompts.order import PromptOrder
from egrpo_fast.runs.guards import Guard, verdict
from egrpo_fast.runs.metrics import Work
from egrpo_fast.runs.plots import curves
from egrpo_fast.runs.progress import Progress, ShutdownRequested
from egrpo_fast.runs.report import HeldOut
from egrpo_fast.sampler import TailCheck
from egrpo_fast.schedule import make_schedule
from egrpo_fast.trainer import Callbacks, TrainingLoop

ROOT = Path(__file__).parents[2]
RULE = "evaluation.stop_when={reward: clip, drop: 0.02, patience: 2}"


def found(clip, soft, *overrides):
    config = load_config("shapes", [RULE, *overrides])
    means = [{"clip": c, "shapes_soft": s, "shapes_strict": 0.0} for c, s in zip(clip, soft)]
    return verdict(config, [(25 * place, mean) for place, mean in enumerate(means)])


RISING = [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize(
    ("clip", "soft", "alarms", "stop"),
    [
        pytest.param([0.9, 0.87, 0.86], RISING, 2, True, id="fell twice in a row"),
        pytest.param([0.9, 0.87], RISING, 1, False, id="fell once"),
        pytest.param([0.9, 0.87, 0.89, 0.87], RISING, 1, False, id="recovered between"),
        pytest.param([0.9, 0.885, 0.885, 0.885], RISING, 0, False, id="within drop"),
        pytest.param([0.9, 0.95, 0.92, 0.92], RISING, 2, True, id="below the best, not the first"),
        pytest.param([0.9, 0.8, 0.7], [0.3, 0.2, 0.1], 0, False, id="both fell: no hacking"),
        pytest.param([0.9, 0.8, 0.7], [0.3, 0.3, 0.3], 0, False, id="the trained one stayed"),
        pytest.param([0.9, 0.8, 0.7], [0.3, 0.2, 0.4], 1, False, id="rose only at the end"),
        pytest.param([0.9], RISING, 0, False, id="base alone"),
    ],
)
def test_the_rule(clip, soft, alarms, stop):
    told = found(clip, soft)
    assert (told.alarms, told.stop) == (alarms, stop)
    assert told.best == max(clip) and told.best_at == 25 * clip.index(max(clip))


def test_the_trained_rewards_count_as_their_weighted_sum_without_the_watched():
    both = "rewards=[{name: shapes_soft, weight: 1}, {name: clip, weight: 5, options: {model: shapes}}, " \
           "{name: shapes_strict, weight: 0}]"  # fmt: skip
    assert found([0.9, 0.8, 0.7], RISING, both).stop, "clip's own fall must not hide that the rest rose"
    less = "rewards=[{name: shapes_soft, weight: -1}, {name: clip, weight: 0, options: {model: shapes}}, " \
           "{name: shapes_strict, weight: 0}]"  # fmt: skip
    assert not found([0.9, 0.8, 0.7], RISING, less).alarms, "of a negative weight, less is more"


def test_no_rule_no_verdict():
    assert verdict(load_config("shapes"), [(0, {"clip": 1.0})]) is None
    assert verdict(load_config("shapes", [RULE]), []) is None


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["evaluation.stop_when={reward: beauty}"], "evaluation.stop_when.reward: 'beauty' is none of rewards"),
        (["evaluation.stop_when={reward: shapes_soft}"], "nothing but 'shapes_soft' is trained on"),
        (["evaluation.stop_when={reward: clip, drop: -1}"], "evaluation.stop_when.drop: -1"),
        (["evaluation.stop_when={reward: clip, patience: 0}"], "evaluation.stop_when.patience: 0"),
        (["evaluation.stop_when={drop: 1}"], "evaluation.stop_when.reward: missing"),
        (["evaluation.stop_when={reward: clip, dorp: 1}"], "evaluation.stop_when.dorp: unknown key"),
        ([RULE, "evaluation.every=0"], "evaluation.stop_when: nothing to watch with evaluation.every 0"),
    ],
)
def test_a_rule_that_cannot_be(overrides, told):
    with pytest.raises(ConfigError, match=told):
        load_config("shapes", overrides)


class ScriptedReport:
    """Tells nothing, and remembers how the run was finished."""

    finished = None

    def __init__(self, *arguments):
        pass

    def finish(self, done, history, after, stopped):
        self.finished = done, after.rewards["clip"]

    def __getattr__(self, name):
        return lambda *told: None


class ScriptedSampler:
    wavefront = SimpleNamespace(plan=ode_plan(make_schedule(2)))

    def sample(self, prompts):
        return [SimpleNamespace(finite=True)]

    def __init__(self):
        self.state = 0  # judged checks

    def check_tail(self, experience):
        return TailCheck([0.5], {})

    def judge_tail(self, check):
        self.state += 1
        return {}, None

    def statistics(self, batch):
        return {}, {}

    def samples(self, batch):
        return []


class Scripted(TrainingLoop):
    """The loop itself, around held-out means from a list and no model."""

    claim, callbacks = None, Callbacks()

    def __init__(self, output, clip, iteration=0, history=()):
        self.config = load_config("shapes", [RULE, f"output_dir={output}", "evaluation.every=1", "iterations=6"])
        self.world = SimpleNamespace(
            is_main=False, rank=0, size=1, max_on_host=int, device=torch.device("cpu"), hardware="1 rank"
        )
        self.progress = Progress(self.world, SimpleNamespace(at=lambda *place: None), SimpleNamespace(signal=0))
        self.progress.iteration, self.order, self.held_out = iteration, PromptOrder(["a"], 0), ["a"]
        self.checkpoints, self.guard = SimpleNamespace(wait=lambda: None), Guard(self.config.guards)
        self.sampler, self.objective = ScriptedSampler(), SimpleNamespace(ops=SimpleNamespace(chosen={}))
        self.clip, self.history = clip, list(history)
        self.saved, self.work = {}, Work(1)
        self._saved = (iteration, len(self.history))

    def evaluate(self):
        means = {"shapes_soft": self.iteration / 10, "clip": self.clip[self.iteration], "shapes_strict": 0.0}
        return HeldOut(means, None)

    def update(self, batch):
        return {"skipped_steps": 0}

    def save(self, needed=False):
        if self._saved != (self.iteration, len(self.history)):
            self.saved[self.iteration] = list(self.history)


def test_the_loop_stops_saves_and_finishes(tmp_path, monkeypatch):
    """Alarms at iterations 3 and 4: a checkpoint there, then the end; without alarms the run is as long as asked."""
    monkeypatch.setattr("egrpo_fast.trainer.Report", ScriptedReport)
    falling = [0.9, 0.9, 0.95, 0.9, 0.9, 0.9, 0.9]
    trainer = Scripted(tmp_path, falling)
    trainer.train()
    assert trainer.report.finished == (4, 0.9) and list(trainer.saved) == [4]
    whole = Scripted(tmp_path, [0.9] * 7)
    whole.train()
    assert whole.report.finished == (6, 0.9)
    # Interrupted after its first alarm, with what its checkpoint held: the next alarm is the second.
    resumed = Scripted(tmp_path, falling, 3, trainer.saved[4][:4])
    resumed.train()
    assert resumed.report.finished == (4, 0.9) and resumed.history == trainer.history
    # Resumed after the stop: evaluates and finishes, trains no more.
    again = Scripted(tmp_path, falling, 4, trainer.saved[4])
    again.train()
    assert again.report.finished == (4, 0.9) and again.history == trainer.history and not again.saved


def test_a_run_that_did_more_than_is_asked_for_ends(tmp_path, monkeypatch):
    """A resumed run may ask for fewer iterations than are done: what there is is evaluated and written."""
    monkeypatch.setattr("egrpo_fast.trainer.Report", ScriptedReport)
    trainer = Scripted(tmp_path, [0.9] * 9, iteration=8)
    assert trainer.config.iterations == 6 and trainer.train() == 0
    assert trainer.report.finished == (8, 0.9) and list(trainer.saved) == [8]


def test_a_tail_is_judged_with_the_iteration_that_it_was_checked_in(tmp_path):
    """A run asked to end within an update leaves the iteration, and the verdict, to the one that continues it."""
    trainer = Scripted(tmp_path, [0.9] * 7)
    update, states = trainer.update, []

    def asked_in_the_third(batch):
        if trainer.iteration == 2:
            raise ShutdownRequested(15)
        return update(batch)

    trainer.update, trainer.save = asked_in_the_third, lambda needed=False: states.append(trainer.sampler.state)
    assert trainer.train() == 15 and trainer.iteration == states[-1] == 2


def test_the_stop_is_marked_in_the_curves(monkeypatch):
    marked = []
    monkeypatch.setattr("matplotlib.axes.Axes.axvline", lambda axis, x, **style: marked.append((x, style["label"])))
    lines = [{"iteration": n, "held_out/clip": 1 - n / 10, "watch/stop": float(n == 3)} for n in range(4)]
    curves(lines)
    assert marked == [(3, "watch: stop")]


# One reward rises and one falls with every evaluation, in this process and the next: they count in a file.
REWARDS = """
from pathlib import Path

calls = Path(__file__).with_name("calls")

def falls(images, prompts):
    with calls.open("a") as file:
        file.write("x")
    return images.mean((1, 2, 3)) * 0 + 1 - calls.stat().st_size / 10

def rises(images, prompts):
    return images.mean((1, 2, 3)) + (calls.stat().st_size if calls.exists() else 0)
"""


def train(folder, *overrides, ranks=1):
    arguments = [
        "iterations=9", "schedule.num_steps=4", "rollout.group_size=2", "prompts.per_iteration=2",
        "evaluation.num_prompts=2", "evaluation.num_inference_steps=2", "evaluation.every=1", "checkpoint.every=0",
        "rewards=[{name: 'made_rewards:rises'}, {name: 'made_rewards:falls', weight: 0}]",
        "evaluation.stop_when={reward: 'made_rewards:falls', drop: 0.0, patience: 2}",
        f"output_dir={folder / 'run'}",
    ]  # fmt: skip
    (folder / "made_rewards.py").write_text(REWARDS)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port()),
         "egrpo_fast/train.py", "shapes", *arguments, *overrides],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return result.stdout, [line for line in lines if "watch/best" in line]


def check_stopped_at_2(folder, told, lines):
    run = folder / "run"
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert [(line["watch/alarms"], line["watch/stop"]) for line in lines] == [(0, 0), (1, 0), (2, 1)]
    assert "WARNING: made_rewards:falls fell to" in told and "alarm 2 of 2; the run stops here" in told
    assert json.loads((run / "summary.json").read_text())["stopped_by"] == "made_rewards:falls"
    assert [path.name for path in (run / "checkpoints").glob("iteration-*")][-1:] == ["iteration-000002"]
    for name in ("curve.png", "before_after.png", "pipeline/model_index.json"):
        assert (run / name).stat().st_size


@pytest.mark.slow
def test_an_interrupted_run_remembers_its_alarms_and_stays_stopped(tmp_path):
    """One alarm, then a resumed run: the second alarm stops it. Resumed again, it trains no further."""
    assert train(tmp_path, "iterations=1")[1][-1]["watch/alarms"] == 1
    check_stopped_at_2(tmp_path, *train(tmp_path, "resume=true", "checkpoint.save_total_limit=1"))


@pytest.mark.slow
def test_ranks_agree_to_stop_and_a_stopped_run_stays_stopped(tmp_path):
    check_stopped_at_2(tmp_path, *train(tmp_path, ranks=2))
    assert len(train(tmp_path, "resume=true", ranks=2)[1]) == 3
