"""Runs from Python: functions as rewards, prompts as lists, callbacks, results, several runs in one process."""

import json
import os
import subprocess
import sys

import pytest

from egrpo_fast import Result, Trainer, load_config
from egrpo_fast.config import ConfigError

PROGRAM = '''
import json, sys
from pathlib import Path
import torch
from egrpo_fast import Trainer
from egrpo_fast.models import transformer as made

folder, calls, built = Path(sys.argv[1]), [], []
meta_transformer = made.meta_transformer
def counted(*arguments, **named):
    built.append(len(calls))
    return meta_transformer(*arguments, **named)
made.meta_transformer = counted  # before others import it by name
def dark(images, prompts):
    assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1 and len(prompts) == len(images)
    return -images.mean((1, 2, 3))
def broken(images, prompts):
    raise KeyError("no such image")
SMALL = {
    "schedule": {"num_steps": 4}, "rollout.group_size": 3, "evaluation": {"num_prompts": 2, "every": 1},
    "checkpoint": {"every": 1}, "prompts": ["a red circle", "a blue square"],
    "held_out_prompts": ["a green circle", "a red square"],
}
def train(name, iterations, dark=dark, **more):
    made = Trainer(
        "shapes", rewards={"dark": dark, "jpeg": 0.0}, output_dir=folder / name, iterations=iterations,
        on_iteration=lambda done, metrics: calls.append(["iteration", done, metrics["reward/dark"]]),
        on_evaluation=lambda done, rewards: calls.append(["evaluation", done, rewards["dark"]]),
        on_checkpoint=lambda done: calls.append(["checkpoint", done]), **SMALL, **more)
    return made.train()
try:
    train("broken", 2, broken)
except ValueError as error:
    failed = [type(error).__name__, str(error)]
built.clear()
one = train("one", 2)
begun = built.count(0)
first, calls = calls, []
two = train("two", 2)
second, calls = calls, []
three = train("two", 3, resume=True)
resumed, calls = calls, []
stored = train("stored", 2, **{"objective.log_prob": "stored"})
print("TOLD", json.dumps({
    "failed": failed, "built": begun, "first": first, "second": second, "resumed": resumed,
    "iterations": three.iterations,
    "stored": stored.history[-1][1]["dark"],
    "histories": [one.history, two.history, three.history], "before": one.before, "after": one.after,
    "files": [(one.pipeline / "model_index.json").is_file(), (one.folder / "before_after.png").is_file()],
}))
'''


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, program, folder], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("TOLD "))
    return folder, json.loads(line.removeprefix("TOLD "))


def test_callbacks_are_called_in_the_order_of_the_run(told):
    events = [call[:2] for call in told[1]["first"]]
    assert events == [
        ["evaluation", 0], ["iteration", 1], ["evaluation", 1], ["checkpoint", 1], ["iteration", 2], ["evaluation", 2],
        ["checkpoint", 2],
    ]  # fmt: skip


def test_a_run_builds_its_transformer_once(told):
    assert told[1]["built"] == 1


def test_a_second_run_in_a_process_is_the_first_to_the_last_bit_and_can_be_resumed(told):
    _, found = told
    assert found["first"] == found["second"] and found["histories"][0] == found["histories"][1]
    assert [call[:2] for call in found["resumed"]] == [["iteration", 3], ["evaluation", 3], ["checkpoint", 3]]
    assert found["iterations"] == 3 and [done for done, _ in found["histories"][2]] == [0, 1, 2, 3]


def test_a_run_that_stores_its_samples_learns_the_same(told):
    (_, before), *_, (_, after) = told[1]["histories"][0]
    step = after["dark"] - before["dark"]
    assert told[1]["stored"] - before["dark"] == pytest.approx(step, rel=1e-2) and step != 0


def test_a_result_says_what_the_run_came_to(told):
    _, found = told
    assert found["before"] == found["histories"][0][0][1] and found["after"] == found["histories"][0][-1][1]
    assert set(found["before"]) == {"dark", "jpeg"} and found["before"] != found["after"] and all(found["files"])


def test_a_reward_that_fails_is_an_exception_and_ends_no_process(told):
    kind, message = told[1]["failed"]
    assert kind == "ConfigError" and "rewards.broken" not in message
    assert "rewards.dark: KeyError" in message and "no such image" in message


def test_the_prompts_are_recorded_and_the_command_line_does_not_guess_the_reward(told):
    folder, _ = told
    config = load_config(str(folder / "one" / "config.yaml"))
    assert config.prompts.train == ["a red circle", "a blue square"]
    command = [sys.executable, "-m", "egrpo_fast.train", str(folder / "one" / "config.yaml"), "resume=true"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 1 and "error: rewards: no reward 'dark'; there are: clip, " in run.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"iteratons": 3}, "iteratons: unknown key; did you mean iterations?"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr: 'fast': Input should be a valid number"),
        ({"prompts": []}, "prompts.train: a list of prompts holds one prompt or more, each a string"),
        ({"rewards": {}}, "rewards"),
    ],
)
def test_a_wrong_setting_is_refused_when_the_trainer_is_made(given, message):
    with pytest.raises(ConfigError, match=f"^{message.replace('?', '.')}"):
        Trainer("shapes", **given)


def test_settings_may_be_loaded_before():
    before = load_config("shapes", ["seed=3", "output_dir=runs/$$x", "prompts.train=[a, b]"])
    config = Trainer(before, iterations=7).config
    assert config.iterations == 7 and config == before.model_copy(update={"iterations": 7})


def test_a_function_may_not_take_the_name_of_a_reward_of_the_package(tmp_path):
    with pytest.raises(ValueError, match="^rewards.clip: a reward of the package has this name; give yours another"):
        Trainer("shapes", rewards={"clip": lambda images, prompts: images}, output_dir=tmp_path / "run").train()


def test_weights_of_rewards():
    def mine(images, prompts):
        return images

    rewards = Trainer("shapes", rewards={"mine": (mine, 0.25), "jpeg": 2, "clip": 0.0, "other": mine}).config.rewards
    assert [(one.name, one.weight) for one in rewards] == [("mine", 0.25), ("jpeg", 2.0), ("clip", 0.0), ("other", 1.0)]


def test_sections_are_dictionaries_and_keep_what_they_do_not_name():
    plain, changed = load_config("shapes"), Trainer("shapes", optimizer={"lr": 5e-4}, seed=3).config
    assert changed.optimizer.lr == 5e-4 and changed.optimizer.warmup_steps == plain.optimizer.warmup_steps
    assert changed.seed == 3 and changed.model == plain.model
    several = Trainer("shapes", prompts={"per_iteration": 4}, held_out_prompts=["a cat"]).config.prompts
    assert (several.per_iteration, several.train, several.held_out) == (4, "shapes", ["a cat"])


def test_the_package_imports_nothing_heavy_by_itself():
    code = "import egrpo_fast, sys; egrpo_fast.Trainer, egrpo_fast.load_config; print('deepspeed' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
    code = "import egrpo_fast, sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
    assert Result.__module__ == "egrpo_fast.api"
    with pytest.raises(AttributeError, match="module 'egrpo_fast' has no attribute 'trainer_of'"):
        import egrpo_fast

        egrpo_fast.trainer_of  # noqa: B018
