"""The comparison page and its plots come from the recorded runs; cells are what they say."""

import importlib.util
import json
import statistics
from pathlib import Path

import pytest

from egrpo_fast.config import load_config, plan_of

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("studies", ROOT / "benchmarks" / "studies.py")
studies = importlib.util.module_from_spec(spec)
spec.loader.exec_module(studies)


def recorded(study):
    return json.loads((ROOT / "benchmarks" / "results" / f"{study}.json").read_text())


@pytest.mark.parametrize("study", studies.STUDIES)
def test_the_page_says_what_was_recorded(study):
    page = studies.PAGE.read_text()
    assert studies.written(page, study, studies.table(recorded(study))) == page
    assert studies.written(page, study, "something else") != page


@pytest.mark.parametrize("study", studies.STUDIES)
def test_every_cell_was_run_with_every_seed(study):
    results = recorded(study)
    assert list(results["cells"]) == [cell.name for cell in studies.STUDIES[study]]
    assert len(results["seeds"]) >= 3
    for cell in results["cells"].values():
        assert all(seed["at"][-1] == cell["iterations"] for seed in cell["seeds"])
        assert cell["evaluations"] == studies.evaluations(cell["overrides"], cell["iterations"])


def test_evaluations_count_every_model_call():
    config = load_config("shapes", ["method=dance_grpo"])
    plans = [plan_of(config, i) for i in range(3)]
    rows = sum(len(wave.sources) for plan in plans for wave in plan.waves)
    states = sum(len(group.sources) for plan in plans for group in plan.groups)
    assert studies.evaluations(["method=dance_grpo"], 3)[-1] == rows + 3 * states


@pytest.mark.parametrize("cell", studies.COMPARE, ids=lambda cell: cell.name)
def test_every_method_may_evaluate_as_much_as_e_grpo(cell):
    budget = studies.evaluations((), studies.BUDGET)[-1]
    done = studies.evaluations(cell.overrides, studies.affordable(cell.overrides, budget))
    assert abs(done[-1] - budget) <= (done[-1] - done[-2]) / 2


def test_the_interval_is_students():
    values = [0.71, 0.68, 0.74]
    assert studies.interval(values) == pytest.approx(4.30265 * statistics.stdev(values) / 3**0.5, rel=1e-5)


def test_measured_sizes_go_where_the_spread_is(tmp_path):
    spreads = {str(step): 0.1 + 0.1 * (step == 2) for step in range(8)}
    folder = tmp_path / "e_grpo" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"spread_by_step": {"shapes_soft": spreads}}) + "\n")
    sizes = studies.measured_sizes(tmp_path, [0])
    assert sum(sizes) == 96 and max(sizes) == sizes[2] > 12
