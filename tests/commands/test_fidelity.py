"""What a tail costs, judged: rank correlations against scipy, verdicts, the cheapest strides, the command on Shapes."""

import itertools
import json
import math
import random
import re

import pytest
import torch
from scipy.stats import spearmanr

from egrpo_fast import ops
from egrpo_fast.commands import fidelity as fidelity_module
from egrpo_fast.commands.fidelity import cheapest_strides, fidelity
from egrpo_fast.config import CHECKPOINTS, CONFIG_FILE, RUN_FILE, ConfigError, TailConfig, load_config, plan_of
from egrpo_fast.distributed.checkpoint import Checkpoints, Piece
from egrpo_fast.methods.e_grpo import e_grpo
from egrpo_fast.models.fingerprint import identity
from egrpo_fast.models.tail_check import WINDOW, TailGuard, compare, rank_correlation
from egrpo_fast.models.transformer import meta_transformer
from egrpo_fast.objective import Objective
from egrpo_fast.runs.export import export
from egrpo_fast.schedule import make_schedule
from egrpo_fast.shapes import PIPELINE

OPS = ops.choose("reference")
SMALL = ["schedule.num_steps=6", "rollout.group_size=4", "schedule.active_steps=[0,2]"]
CACHED = "tail.cache.name=taylor_seer tail.cache.interval=100"


@pytest.mark.parametrize("values", [2, 5, 1000], ids="{} different values".format)
def test_rank_correlation_is_spearmans(values):
    generator = torch.Generator().manual_seed(values)
    exact, tail = torch.randint(values, (2, 50, 3, 12), generator=generator).float()
    found = rank_correlation(exact, tail)
    for place in itertools.product(range(50), range(3)):
        if exact[place].unique().numel() > 1 and tail[place].unique().numel() > 1:
            assert found[place].item() == pytest.approx(spearmanr(exact[place], tail[place])[0], abs=1e-12)


def test_rewards_that_tell_nothing_apart():
    """Where the exact ones are equal there was nothing to lose; where only the tail's are, all is lost."""
    some, equal = torch.arange(4.0), torch.ones(4)
    assert rank_correlation(equal, some).isnan() and rank_correlation(some, equal) == 0


def test_comparison_by_hand():
    """Two groups of two: one keeps its order, in the other the samples change places; the mix of rewards counts."""
    plan = e_grpo(make_schedule(4, active_steps=[0, 1], merge_lengths=1), [2, 2], [1, 1])
    exact = torch.tensor([[[0.0, 1.0, 0.0, 1.0]], [[5.0, 5.0, 5.0, 5.0]]])
    tail = torch.tensor([[[0.0, 3.0, 1.0, 0.0]], [[5.0, 5.0, 5.0, 5.0]]])
    found = compare(plan, Objective(OPS, (2.0, 1.0)), exact, tail)
    assert found.correlations.tolist() == [[1.0], [-1.0]] and found.flips.tolist() == [[0.0], [1.0]]
    assert found.correlation == 0 and found.standard_error == pytest.approx(1.0)
    assert found.bias.item() == pytest.approx(2 * (3 + 1 + 0 - 2) / 4)


def test_a_run_gives_its_tail_up_once_it_is_surely_below_the_target():
    guard = TailGuard(TailConfig(stride=2, check_every=5, target=0.9))
    assert [i for i in range(12) if guard.due(i)] == [0, 5, 10]
    assert guard.judge([0.8, 1.0, math.nan]) is None, "at the target"
    assert guard.judge([0.7, 0.99]) is None, "below it by less than a standard error"
    again = TailGuard(TailConfig(stride=2, check_every=5, target=0.9))
    again.state = json.loads(json.dumps(guard.state))
    for one in (guard, again):
        assert "correlation of 0.789 (tail.target 0.9): the exact tail" in one.judge([0.7, 0.75, 0.74, 0.8, 0.62])
        assert one.fallen and not one.due(10)


def test_old_checks_are_forgotten():
    guard = TailGuard(TailConfig(stride=2, target=0.9))
    assert guard.judge([0.95, 0.4, 0.95]) is None
    for _ in range(WINDOW - 1):
        assert guard.judge([0.91, 0.95]) is None
    assert guard.judge([0.6, 0.99]) is None
    assert len(guard.state["checks"]) == WINDOW and guard.state["checks"][0] == [0.91, 0.95]


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "check_every": 0}], ids=["exact", "not asked for"])
def test_nothing_to_check(settings):
    assert not TailGuard(TailConfig(**settings)).due(0)


def test_the_cheapest_strides_are_those_of_a_search_of_all():
    random.seed(0)
    for _ in range(30):
        costs = [{n: 12 // n for n in (1, 2, 3, 4)} for _ in range(3)]
        correlations = [{n: 1 - random.random() * 0.1 * n for n in cost} for cost in costs]
        reached = [
            (sum(cost[n] for cost, n in zip(costs, strides)), -sum(c[n] for c, n in zip(correlations, strides)))
            for strides in itertools.product(*correlations)
            if sum(c[n] for c, n in zip(correlations, strides)) >= 3 * 0.85
        ]
        found = cheapest_strides(costs, correlations, 0.85)
        spent = sum(cost[n] for cost, n in zip(costs, found))
        assert (spent, -sum(c[n] for c, n in zip(correlations, found))) == pytest.approx(min(reached))
    assert cheapest_strides([{1: 5}], [{1: 0.8}], 0.9) is None


def test_the_command_on_shapes(tmp_path):
    told = fidelity(
        "shapes", SMALL, ["tail.stride=1", "tail.stride=5", "tail.stride=2 tail.solver=dpm2m", CACHED], target=0.3,
        num_prompts=1, out=tmp_path / "found.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    same, coarse, fine, cached = found["tails"]
    assert same["correlation"] == 1 and same["reward_bias"] == same["sign_flips"] == 0 and same["tail_evaluations"] == 1
    assert coarse["tail_evaluations"] < fine["tail_evaluations"] < 1
    assert coarse["correlation"] < fine["correlation"] <= 1
    plan = plan_of(load_config("shapes", SMALL), 0)
    steps = plan.tail_evaluations // 4  # of one row of each of the two groups
    assert cached["tail_evaluations"] == pytest.approx(2 * 2 / steps), "the first and the third step of each tail"
    suggested = found["suggested"]
    assert suggested["correlation"] >= 0.3 and suggested["tail_evaluations"] <= fine["tail_evaluations"]
    assert f"suggested for a correlation of 0.3: {suggested['settings']}" in told
    assert re.search(r"\| tail.stride=1 +\| +1.000 ± 0.000 \| +0.0% \| +\+0.0000 \| +100.0% \|", told)


BAD = {
    "tail.target=1": "tail.target: 1: .*less than 1",
    "tail.stride=[2,3]": "tail.stride: 2 numbers, one per active step needed \\(8\\)",
    "tail.solver=heun": "tail.solver: 'heun': .*'euler', 'ab2' or 'dpm2m'",
    "tail.lora=/nowhere rollout.parameters=sharded": "tail.lora: .*needs rollout.parameters gathered",
    "tail.cache=taylor_seer rollout.parameters=sharded": "tail.cache: .*needs rollout.parameters gathered",
    "tail.cache=mag": "tail.cache.name: .*'mag'.*'taylor_seer'",
    "tail.cache.threshold=0.1": "tail.cache.name: missing",
    "tail.cache.name=taylor_seer tail.cache.threshold=0.1": "tail.cache.threshold: unknown key",
    "tail.cache.name=taylor_seer tail.cache.interval=1": "tail.cache.interval: 1: .*greater than or equal to 2",
}


@pytest.mark.parametrize("overrides", BAD)
def test_settings_that_cannot_be_are_refused_by_name(overrides):
    with pytest.raises(ConfigError, match=BAD[overrides]):
        load_config("shapes", overrides.split())


@pytest.mark.parametrize(
    ("overrides", "count", "cached"),
    [
        ([], 17, 2), (["rollout.parameters=sharded"], 15, 0), (["tail.lora=/nowhere"], 18, 2),
        (["method=granular_grpo"], 3, 1), (["method=branch_grpo"], 0, 0),
    ],
)  # fmt: skip
def test_what_the_search_tries_can_be_loaded(overrides, count, cached):
    found = fidelity_module._candidates(load_config("shapes", overrides))
    made = [load_config("shapes", [*overrides, *settings.split()]) for settings in found]
    assert len(made) == count and sum(config.tail.cache is not None for config in made) == cached


def test_a_run_whose_model_has_changed_is_not_measured(tmp_path):
    run = tmp_path / "run"
    checkpoints = Checkpoints(run / CHECKPOINTS, 0, 1, asynchronous=False)
    checkpoints.save(1, [Piece("a", "weight", 0, (1,), torch.ones(1))], {}, {}, "test")
    (run / CONFIG_FILE).write_text(load_config("shapes", [f"output_dir={run}"]).yaml())
    (run / RUN_FILE).write_text(json.dumps({"base": {**identity(PIPELINE), "transformer": "another"}}))
    with pytest.raises(ValueError, match="model.path: .* is not the model this run began with: another transformer;"):
        fidelity(str(run), SMALL, ["tail.stride=2"], num_prompts=1)


def test_a_strangers_run_runs_no_code(tmp_path, monkeypatch):
    (tmp_path / "fidelitys_stranger.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('it_ran').touch()\ndef it(images, prompts): 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    checkpoints = Checkpoints(run / CHECKPOINTS, 0, 1, asynchronous=False)
    checkpoints.save(1, [Piece("a", "weight", 0, (1,), torch.ones(1))], {}, {}, "test")
    strange = "rewards=[{name: 'fidelitys_stranger:it'}]"
    (run / CONFIG_FILE).write_text(load_config("shapes", [f"output_dir={run}", strange]).yaml())
    (run / RUN_FILE).write_text(json.dumps({"base": identity(PIPELINE)}))
    with pytest.raises(ValueError, match="rewards: .*config.yaml asks for fidelitys_stranger:it.*--trust-run"):
        fidelity(str(run), SMALL, ["tail.stride=2"], num_prompts=1)
    assert not (tmp_path / "it_ran").exists()
    for overrides, trust_run in (([], True), ([strange], False)):
        with pytest.raises(ValueError, match="fidelitys_stranger:it: ZeroDivisionError"):
            fidelity(str(run), [*SMALL, *overrides], ["tail.stride=2"], num_prompts=1, trust_run=trust_run)


def test_what_the_command_refuses(tmp_path):
    with pytest.raises(ValueError, match="tails: 'schedule.eta=1' changes more than tail"):
        fidelity("shapes", tails=["schedule.eta=1"])
    with pytest.raises(ValueError, match="method: the tails of dance_grpo cannot be approximated"):
        fidelity("shapes", ["method=dance_grpo"])
    with pytest.raises(ValueError, match="recipe: .* holds no run"):
        fidelity(str(tmp_path))


def test_a_lora_runs_policy_is_its_base_with_the_adapters(tmp_path):
    """Measured like a pipeline that has the adapters in its weights, and unlike the base."""
    run, fused = tmp_path / "run", tmp_path / "fused"
    config = load_config("shapes", ["model.lora={rank: 4, alpha: 8, target_modules: [to_q]}", f"output_dir={run}"])
    transformer, weights = meta_transformer(PIPELINE, config.model.lora)
    generator = torch.Generator().manual_seed(0)
    pieces = [
        Piece(
            name, "weight", 0, tuple(value.shape), weights(name) + 0.1 * torch.randn(value.shape, generator=generator)
        )
        for name, value in transformer.named_parameters()
        if value.requires_grad
    ]
    Checkpoints(run / CHECKPOINTS, asynchronous=False).save(1, pieces, {}, {}, "test")
    (run / CONFIG_FILE).write_text(config.yaml())
    (run / RUN_FILE).write_text(json.dumps({"base": identity(PIPELINE)}))
    export(run, fused, fuse=True)
    measured = []
    for recipe, overrides in ((str(run), SMALL), ("shapes", [*SMALL, f"model.path={fused}"]), ("shapes", SMALL)):
        fidelity(recipe, overrides, ["tail.stride=2"], num_prompts=1, out=tmp_path / "told.json")
        measured.append(json.loads((tmp_path / "told.json").read_text())["tails"][0]["reward_bias"])
    assert measured[0] == pytest.approx(measured[1], abs=1e-4) and abs(measured[0] - measured[2]) > 1e-3


def test_a_hub_id_is_downloaded_when_all_else_is_known_to_be_right(monkeypatch):
    asked = []

    def download(path, **patterns):
        asked.append(path)
        raise OSError("no network")

    monkeypatch.setattr("egrpo_fast.models.folder.snapshot_download", download)
    settings = [*SMALL, "model.path=some/model", "rewards=[{name: shapes_soft}]", "model.height=64"]
    with pytest.raises(ValueError, match="^rewards.shapes_soft: judges images of 32x32"):
        fidelity("shapes", settings, ["tail.stride=2"], num_prompts=1)
    assert not asked
    with pytest.raises(ValueError, match="model.path: some/model is no folder here and could not be downloaded"):
        fidelity("shapes", settings[:-1], ["tail.stride=2"], num_prompts=1)
    assert asked == ["some/model"]
