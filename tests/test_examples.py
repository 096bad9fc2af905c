"""The examples do what they say."""

import importlib.util
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
