"""The benchmark of one iteration: its variants are the same iteration, and what it counts is what the plan says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from egrpo_fast.config import load_config, plan_of

ROOT = Path(__file__).parents[2]
SMALL = ["schedule.num_steps=4", "rollout.group_size=2"]


def run(*arguments):
    result = subprocess.run(
        [sys.executable, "benchmarks/iteration.py", *arguments, *SMALL], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_its_variants_are_one_iteration(tmp_path):
    told = run(
        "--rounds", "1", "--leave-out", "compiled", "--leave-out", "fast", "--together", "--results", str(tmp_path)
    )
    variants = json.loads((tmp_path / "iteration-cpu.json").read_text())["shapes"]["variants"]
    plan = plan_of(load_config("shapes", SMALL), 0)
    evaluations = {"naive": plan.evaluations_alone, "batched": plan.evaluations_alone, "exact": plan.evaluations}
    assert {name: row["evaluations"] for name, row in variants.items()} == evaluations
    assert variants["exact"]["calls"] == len(plan.waves) and variants["naive"]["ratio"] == 1
    for name, row in variants.items():
        assert row["largest_difference"] < 1e-4 and row["gradient_norm_apart"] < 1e-4 and name in told
    assert variants["exact"]["largest_difference"] > 0, "compared with itself"


@pytest.mark.slow
def test_its_profile_has_every_phase(tmp_path):
    run("--profile", str(tmp_path))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    header = (tmp_path / "table.txt").read_text().splitlines()[0].split()
    assert set(header) == {"milliseconds", "rollout", "decode", "rewards", "update"}
