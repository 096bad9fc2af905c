"""Does a long run leak? Memory and open files of one rank over many iterations of a tiny run on the CPU.

    python benchmarks/soak.py [--iterations 1000] [--out FOLDER]

Runs `egrpo_fast/train.py shapes` on one thread, with a checkpoint every 50 iterations and an evaluation every 250, and
looks at the process four times a second. Memory is what no file backs: pages of libraries come and go with what else
the machine does. The first tenth is warm-up. The slope is least squares over the means of 20 blocks, with its 95%
interval: neighbouring samples are no independent ones. Ends with status 1 where a metric is missing, files stay open,
or memory surely grows by more than 8 MiB per 1,000 iterations; writes `benchmarks/results/soak-cpu.json`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from scipy import stats

from egrpo_fast.runs.provenance import commit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "soak-cpu.json"
SETTINGS = [
    "schedule.num_steps=2", "schedule.active_steps=[0]", "rollout.group_size=2", "evaluation.num_prompts=4",
    "evaluation.num_inference_steps=2", "evaluation.every=250", "checkpoint.every=50",
]  # fmt: skip
BLOCKS = 20
GROWTH = 8.0
"""MiB per 1,000 iterations that the slope's interval must not lie above."""


def soak(folder, iterations):
    """Rows [iterations done, MiB of resident memory that no file backs, open files] of a run, and its seconds."""
    command = [sys.executable, "egrpo_fast/train.py", "shapes", f"output_dir={folder}", f"iterations={iterations}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rows, began, metrics = [], time.monotonic(), folder / "metrics.jsonl"
    with subprocess.Popen([*command, *SETTINGS], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        rank = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                done = metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0
                memory = rank.memory_info()
                rows.append((done, (memory.rss - memory.shared) / 2**20, rank.num_fds()))
            except psutil.Error:
                break  # it has just ended
            time.sleep(0.25)
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode}")
    return np.array(rows), time.monotonic() - began


def slope(iterations, values):
    """Per 1,000 iterations, with the half width of its 95% interval, from the means of BLOCKS blocks."""
    x, y = (np.array([block.mean() for block in np.array_split(each, BLOCKS)]) for each in (iterations, values))
    fit = stats.linregress(x, y)
    return 1000 * fit.slope, 1000 * fit.stderr * stats.t.ppf(0.975, BLOCKS - 2)


def missing(folder, iterations):
    """Iterations without a whole line in metrics.jsonl, or with more than one."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line["iteration"] for line in lines if {"loss", "grad_norm", "reward/shapes_soft"} <= line.keys()]
    return [at for at in range(1, iterations + 1) if found.count(at) != 1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="where the run goes; none given: a folder that is removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.out or Path(temporary)) / "soak"
        rows, seconds = soak(folder, arguments.iterations)
        lost = missing(folder, arguments.iterations)
    steady = rows[(rows[:, 0] > arguments.iterations / 10) & (rows[:, 0] < arguments.iterations)]
    memory, interval = slope(steady[:, 0], steady[:, 1])
    first, *_, last = np.array_split(steady, BLOCKS)
    files = [int(np.median(block[:, 2])) for block in (first, last)]
    told = {
        "commit": commit(),
        "machine": f"{platform.machine()} CPU, 1 thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "iterations": arguments.iterations,
        "settings": SETTINGS,
        "seconds": round(seconds, 1),
        "samples": len(steady),
        "memory_mib": {"first_block": first[:, 1].mean(), "last_block": last[:, 1].mean(), "peak": rows[:, 1].max()},
        "memory_slope_mib_per_1000_iterations": {
            "slope": memory,
            "interval_95": [memory - interval, memory + interval],
        },
        "open_files": {"first_block": files[0], "last_block": files[1], "most": int(rows[:, 2].max())},
        "iterations_without_metrics": lost,
    }
    RESULTS.write_text(json.dumps(told, indent=2) + "\n")
    print(f"\n{arguments.iterations} iterations in {seconds:.0f} s, {len(steady)} samples after the warm-up")
    print(f"memory: {first[:, 1].mean():.1f} -> {last[:, 1].mean():.1f} MiB, peak {rows[:, 1].max():.1f}")
    print(f"slope: {memory:+.2f} +- {interval:.2f} MiB per 1,000 iterations (95%)")
    print(f"open files: {files[0]} -> {files[1]}, at most {int(rows[:, 2].max())}")
    print(f"metrics: {arguments.iterations - len(lost)} of {arguments.iterations} iterations, each once")
    if lost or files[1] > files[0] or memory - interval > GROWTH:
        raise SystemExit("leaks, or lost metrics")


if __name__ == "__main__":
    main()
