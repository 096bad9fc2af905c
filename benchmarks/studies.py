"""What is worth what, on the embedded world: every method at equal model evaluations, and the paper's ablations.

    python benchmarks/studies.py compare | ablations [--seeds 0 1 2] [--jobs 2] [--report] [--out runs/studies]

A cell of a study is one training run of the embedded recipe, in a folder of its own; what has finished is not run
again, so a study can be stopped and taken up at any cell. `--jobs` cells run at a time, the cores shared out to them.
Then the runs are recorded in `benchmarks/results/STUDY.json`, and from there (`--report`: from there alone) drawn in
`docs/images/STUDY.png` and written into `docs/comparison.md`.
"""

import argparse
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import accumulate, count, islice
from pathlib import Path

import matplotlib.pyplot as plt
import scipy.stats
import torch
from tqdm import tqdm

from egrpo_fast.config import Config, load_config, plan_of
from egrpo_fast.distributed.world import free_port
from egrpo_fast.methods.e_grpo import group_sizes_by_spread

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "comparison.md"
BACKWARD = 3
"""A state that the update runs the model at, forward and backward, counts as so many evaluations."""
BUDGET = 24
"""Iterations of E-GRPO; what they evaluate is what every method of the comparison may."""
REWARDS = {"shapes_soft": "trained on", "clip": "CLIP, not trained on", "shapes_strict": "everything right"}
BASE, TRAINED = "e_grpo", "shapes_soft"
SECONDS = "seconds", "cpu_seconds"


@dataclass(frozen=True)
class Cell:
    """One way to train: its folder's name, its row's label, what it changes in the recipe, the panel it is drawn in."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()
    panel: str = ""


FAST_TAIL = "tail.stride=[4,3,3,3,4,3,4,3]", "tail.solver=dpm2m"
"""Composed by active step, and measured on further prompts: docs/tails.md."""
METHODS = [
    Cell(BASE, "E-GRPO"),
    # More optimizer steps: each iteration costs a fifth.
    Cell("e_grpo-small", "E-GRPO, 4 samples at 4 steps", ("rollout.group_size=4", "schedule.active_steps=[0,2,4,6]")),
    Cell("e_grpo-fast", "E-GRPO, fast tail", FAST_TAIL),
    Cell("flow_grpo", "Flow-GRPO", ("method.name=flow_grpo",)),
    Cell("dance_grpo", "DanceGRPO", ("method.name=dance_grpo",)),
    # Its window moves over the whole grid in a run, as it does in its paper's 300 iterations.
    Cell("mix_grpo", "MixGRPO", ("method.name=mix_grpo", "method.every=8")),
    Cell("branch_grpo", "BranchGRPO", ("method.name=branch_grpo",)),
    Cell("granular_grpo", "Granular-GRPO", ("method.name=granular_grpo",)),
    Cell("tempflow_grpo", "TempFlow-GRPO", ("method.name=tempflow_grpo",)),
]
COMPARE = [replace(cell, panel="equal evaluations") for cell in METHODS]
ABLATIONS = [
    replace(METHODS[0], label="E-GRPO: threshold 2.2, first half of the steps"),
    *(
        Cell(f"threshold-{tau:g}", f"threshold {tau:g}", (f"schedule.entropy_threshold={tau}",), "threshold")
        for tau in (0, 1.8, 2.0, 2.6)
    ),
    *(
        Cell(f"merge-{length}", f"every step merged over {length}", (f"schedule.merge_lengths={length}",), "merge")
        for length in (2, 4, 6)
    ),
    *(
        Cell(f"steps-{name}", f"trained steps: {name}", (f"schedule.active_steps={list(steps)}",), "trained steps")
        for name, steps in {"first-quarter": range(4), "second-half": range(8, 16), "all": range(16)}.items()
    ),
    Cell("antithetic", "antithetic pairs", ("objective.antithetic=true",), "estimator"),
    Cell("leave-one-out", "leave-one-out baseline", ("objective.baseline=leave_one_out",), "estimator"),
    Cell("not-normalised", "advantages not divided by the spread", ("objective.scale_rewards=none",), "estimator"),
    Cell("sizes-by-spread", "group sizes by reward spread", ("rollout.group_size={sizes}",), "estimator"),
    Cell("fast-tail", "fast tail", FAST_TAIL, "tail"),
]
STUDIES = {"compare": COMPARE, "ablations": ABLATIONS}


def evaluations_of(overrides: Iterable[str]) -> Iterator[int]:
    """Model evaluations done after 0, 1, ... iterations, without end; those of held-out images apart."""
    config = load_config("shapes", list(overrides))
    return accumulate((_evaluations(config, iteration) for iteration in count()), initial=0)


def _evaluations(config: Config, iteration: int) -> int:
    plan, every = plan_of(config, iteration), config.tail.check_every
    checked = not config.tail.exact and every and iteration % every == 0
    check = plan_of(config.with_tail(), iteration).evaluations if checked else 0
    return plan.evaluations + BACKWARD * plan.trained_states + check


def evaluations(overrides: Iterable[str], iterations: int) -> list[int]:
    """Model evaluations done after 0, 1, ... `iterations` iterations."""
    return list(islice(evaluations_of(overrides), iterations + 1))


def affordable(overrides: Iterable[str], budget: int) -> int:
    """The number of iterations whose evaluations come nearest to `budget`."""
    before = 0
    for iteration, done in enumerate(evaluations_of(overrides)):
        if done >= budget:
            return iteration if done - budget <= budget - before else iteration - 1
        before = done
    raise AssertionError


def measured_sizes(runs: Path, seeds: Iterable[int]) -> list[int]:
    """E-GRPO's 96 samples allotted to its active steps by the reward spread that its own runs measured."""
    lines = [line for seed in seeds for line in metrics(runs / BASE / f"seed-{seed}") if "spread_by_step" in line]
    spreads = [line["spread_by_step"]["shapes_soft"] for line in lines]
    config = load_config("shapes", [])
    means = [statistics.mean(spread[str(step)] for spread in spreads) for step in config.build_schedule().active]
    return group_sizes_by_spread(means, sum(config.per_active_step(config.rollout.group_size)))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip()


def train(folder: Path, seed: int, iterations: int, overrides: Iterable[str], threads: int) -> None:
    """One cell and seed: nothing where it has finished before, from the beginning otherwise."""
    if (folder / "cell.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--master_port={free_port()}", "egrpo_fast/train.py"]
    settings = [f"output_dir={folder / 'run'}", f"seed={seed}", f"iterations={iterations}", *overrides]
    settings += [f"evaluation.every={math.ceil(iterations / 4)}", "checkpoint.every=0"]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            [*command, "shapes", *settings],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{folder}: training failed, see log.txt there")
    for file in ("metrics.jsonl", "config.yaml"):
        shutil.move(folder / "run" / file, folder / file)
    shutil.rmtree(folder / "run")  # its weights
    cpu = usage.ru_utime + usage.ru_stime
    told = {"overrides": list(overrides), "iterations": iterations, "cpu_seconds": cpu, "commit": commit()}
    (folder / "cell.json").write_text(json.dumps(told))


def record(study: str, runs: Path, seeds: list[int], threads: int) -> None:
    """Every cell that all seeds have finished -> benchmarks/results/STUDY.json."""
    cells = {}
    for cell in STUDIES[study]:
        folders = [runs / cell.name / f"seed-{seed}" for seed in seeds]
        if not all((folder / "cell.json").exists() for folder in folders):
            print(f"{cell.name}: not finished, left out", file=sys.stderr)
            continue
        told = [json.loads((folder / "cell.json").read_text()) for folder in folders]
        cells[cell.name] = {
            "label": cell.label,
            "panel": cell.panel,
            "overrides": told[0]["overrides"],
            "iterations": told[0]["iterations"],
            "commit": told[0]["commit"],
            "evaluations": evaluations(told[0]["overrides"], told[0]["iterations"]),
            "seeds": [read(folder) | {"cpu_seconds": one["cpu_seconds"]} for folder, one in zip(folders, told)],
        }
    told = {
        "machine": f"{platform.machine()} server CPU, {os.cpu_count()} cores; {threads} thread(s) per run",
        "torch": torch.__version__,
        "seeds": seeds,
        "cells": cells,
    }
    (ROOT / "benchmarks" / "results" / f"{study}.json").write_text(json.dumps(told, indent=1) + "\n")


def read(folder: Path) -> dict:
    """Of a finished run: held-out rewards by iteration, and the seconds of its training phases."""
    lines = metrics(folder)
    held_out = [line for line in lines if "held_out/shapes_soft" in line]
    phases = ("rollout", "rewards", "update")
    return {
        "held_out": {name: [round(line[f"held_out/{name}"], 5) for line in held_out] for name in REWARDS},
        "at": [line["iteration"] for line in held_out],
        "seconds": round(sum(line.get(f"seconds/{phase}", 0.0) for line in lines for phase in phases), 1),
    }


def interval(values: list[float]) -> float:
    """Half the width of the 95% confidence interval of the mean, by Student's t."""
    return scipy.stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def gains(cell: dict, reward: str, place: int = -1) -> list[float]:
    """What training has added by then, per seed: the same noise and prompts before and after."""
    return [seed["held_out"][reward][place] - seed["held_out"][reward][0] for seed in cell["seeds"]]


def table(results: dict) -> str:
    """Markdown, a row per cell: gains of the held-out rewards, mean and 95% interval; paired difference to E-GRPO's."""
    cells, base = results["cells"], results["cells"][BASE]
    heads = ["gain of", "iterations", "evaluations", *(f"`{name}`" for name in REWARDS), "less E-GRPO's", "minutes"]
    rows = [heads, ["---"] * len(heads)]
    for name, cell in cells.items():
        differences = [ours - theirs for ours, theirs in zip(gains(cell, TRAINED), gains(base, TRAINED))]
        rows.append(
            [
                cell["label"],
                str(cell["iterations"]),
                f"{cell['evaluations'][-1]:,}",
                *(shown(gains(cell, reward)) for reward in REWARDS),
                "" if name == BASE else shown(differences),
                " / ".join(f"{statistics.mean(s[key] for s in cell['seeds']) / 60:.1f}" for key in SECONDS),
            ]
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    first = ", ".join(f"`{r}` {statistics.mean(s['held_out'][r][0] for s in base['seeds']):.3f}" for r in REWARDS)
    commits = ", ".join(dict.fromkeys(cell["commit"] for cell in cells.values()))
    told = (
        f"Untrained: {first}. {len(results['seeds'])} seeds; {results['machine']}; torch {results['torch']}; "
        f"commit {commits}."
    )
    return "\n".join([*lines, "", *textwrap.wrap(told, 118)])


def shown(values: list[float]) -> str:
    return f"{statistics.mean(values):+.3f} ± {interval(values):.3f}"


def plot(path: Path, study: str, results: dict) -> None:
    """Gain of held-out reward: a line per cell with the 95% band over seeds, panel by panel."""
    cells = results["cells"]
    panels = list(dict.fromkeys(cell["panel"] for cell in cells.values() if cell["panel"]))
    by_iteration = study == "ablations"
    pages = [(panel, reward) for panel in panels for reward in ([TRAINED] if by_iteration else REWARDS)]
    rows = math.ceil(len(pages) / 3)
    figure, axes = plt.subplots(rows, 3, figsize=(13.5, 4.0 * rows), squeeze=False, layout="constrained")
    for axis, (panel, reward) in itertools.zip_longest(axes.flat, pages, fillvalue=(None, None)):
        if panel is None:
            axis.axis("off")
            continue
        for place, cell in enumerate(cell for cell in cells.values() if cell["panel"] in ("", panel)):
            at = cell["seeds"][0]["at"]
            values = [gains(cell, reward, i) for i in range(len(at))]
            mean, half = [statistics.mean(v) for v in values], [interval(v) for v in values]
            x = at if by_iteration else [cell["evaluations"][i] / 1000 for i in at]
            colour = "black" if place == 0 else f"C{place - 1}"
            axis.plot(x, mean, label=cell["label"], marker="o", markersize=3, color=colour)
            axis.fill_between(
                x, [m - h for m, h in zip(mean, half)], [m + h for m, h in zip(mean, half)], alpha=0.1, color=colour
            )
        axis.axhline(0.0, color="gray", linewidth=0.8)
        axis.set(xlabel="iteration" if by_iteration else "evaluations, thousands")
        axis.set_title(f"{panel}: {reward}, {REWARDS[reward]}", fontsize=9)
        axis.grid(alpha=0.3)
        if by_iteration:
            axis.legend(fontsize=7, loc="upper left")
    if not by_iteration:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5)
    figure.supylabel("gain over the untrained model, held out")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def written(page: str, study: str, text: str) -> str:
    """The page with the text between the study's two marks replaced."""
    begin, end = f"<!-- {study}: written by benchmarks/studies.py -->", f"<!-- {study}: end -->"
    return re.sub(f"(?s){re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n\n{text}\n\n{end}", page)


def report(study: str) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / f"{study}.json").read_text())
    plot(ROOT / "docs" / "images" / f"{study}.png", study, results)
    PAGE.write_text(written(PAGE.read_text(), study, table(results)))
    print(table(results))


def run(study: str, runs: Path, seeds: list[int], jobs: int) -> None:
    budget = evaluations((), BUDGET)[-1]
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def one(cell: Cell, seed: int) -> str:
        overrides = cell.overrides
        if "{sizes}" in "".join(overrides):
            overrides = tuple(override.format(sizes=measured_sizes(runs, seeds)) for override in overrides)
        iterations = affordable(overrides, budget) if study == "compare" else BUDGET
        train(runs / cell.name / f"seed-{seed}", seed, iterations, overrides, threads)
        return f"{cell.name}, seed {seed}"

    with ThreadPoolExecutor(jobs) as pool:
        cells = [pool.submit(one, cell, seed) for cell in STUDIES[study] for seed in seeds]
        for done in tqdm(as_completed(cells), study, len(cells), unit="run"):
            tqdm.write(f"{done.result()}: done")
    record(study, runs, seeds, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "studies")
    parser.add_argument("--report", action="store_true", help="train nothing, write from what is recorded")
    arguments = parser.parse_args()
    if not arguments.report:
        run(arguments.study, arguments.out.resolve(), arguments.seeds, arguments.jobs)
    report(arguments.study)


if __name__ == "__main__":
    main()
