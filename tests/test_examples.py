"""The examples do what they say."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_minimal_learns():
    before, after = load("minimal").main()
    assert before < 0.4 and after > 0.8


RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import own_reward
result = own_reward.main(6, output_dir="own", schedule={"num_steps": 4})
assert result.iterations == 6 and set(result.after) == {"brightness", "shapes_strict"}
assert result.after["brightness"] > result.before["brightness"] + 0.02
"""


@pytest.mark.slow
def test_own_reward_is_learned(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", RUN, EXAMPLES], cwd=tmp_path, capture_output=True, text=True, timeout=1800
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "brightness of the training images, by iteration: " in run.stdout


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    checks = [
        "assert result.after['redness'] > result.before['redness'] + 0.02",
        "assert more.iterations == 12 and image.size == (32, 32) and len(rewards_seen) == 10",
    ]
    program = "\n".join([*code, *checks])
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


@pytest.mark.slow
def test_minimal_learns_nothing_from_rewards_that_say_nothing(monkeypatch):
    """The negative control: the same training on noise in the reward's place."""
    minimal = load("minimal")
    torch.manual_seed(0)
    model = minimal.Velocity()
    minimal.pretrain(model)
    before, generator = minimal.evaluate(model), torch.Generator().manual_seed(1)
    with monkeypatch.context() as patch:
        patch.setattr(minimal, "reward", lambda points: torch.rand(points.shape[:2], generator=generator))
        minimal.train(model)
    assert minimal.evaluate(model) < before + 0.15
