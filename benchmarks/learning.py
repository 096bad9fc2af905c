"""Does it learn? The embedded recipe over several seeds, against the ground-truth images' own score.

    python benchmarks/learning.py [--seeds 0 1 2] [--out runs/learning] [key.path=value ...]

Runs `deepspeed egrpo_fast/train.py shapes` once per seed (one that has finished is not run again), then writes
`benchmarks/results/learning.json` and `docs/images/learning.png`, and copies the last seed's before/after grid there.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from egrpo_fast.config import load_config
from egrpo_fast.rewards import make_reward, score
from egrpo_fast.shapes import PROMPTS
from egrpo_fast.shapes.world import parse, render

ROOT = Path(__file__).parents[1]
REWARDS = ("shapes_soft", "clip", "shapes_strict")


def ground_truth(captions):
    """Scores of the world's own images of the held-out captions, jittered as the training images were."""
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([render(parse(caption), generator) for caption in captions])
    options = {"clip": {"model": "shapes"}}
    rewards = {name: make_reward(name, options.get(name, {})) for name in REWARDS}
    return {name: score(name, reward, images, captions).mean().item() for name, reward in rewards.items()}


def train(folder, seed, overrides):
    if (folder / "summary.json").exists():
        print(f"seed {seed}: done before, in {folder}")
        return
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "egrpo_fast/train.py", "shapes", f"seed={seed}"]
    subprocess.run([*command, f"output_dir={folder}", *overrides], cwd=ROOT, check=True)


def read(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = {
        name: [(line["iteration"], line[f"held_out/{name}"]) for line in lines if f"held_out/{name}" in line]
        for name in REWARDS
    }
    phases = [{k: v for k, v in line.items() if k.startswith("seconds/")} for line in lines]
    seconds = {name: sum(line.get(name, 0.0) for line in phases) for name in sorted({k for p in phases for k in p})}
    return curve, seconds


def plot(path, curves, truth):
    figure, axes = plt.subplots(1, len(REWARDS), figsize=(4.0 * len(REWARDS), 3.2))
    titles = ("soft score (trained on)", "CLIP score (never trained on)", "share with everything right")
    for axis, name, title in zip(axes, REWARDS, titles):
        for seed, curve in curves.items():
            axis.plot(*zip(*curve[name]), marker="o", markersize=3, label=f"seed {seed}")
        axis.axhline(truth[name], color="gray", linestyle="--", linewidth=1, label="ground-truth images")
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "learning")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    config = load_config("shapes", arguments.overrides)
    truth = ground_truth(PROMPTS["held_out"].read_text().splitlines()[: config.evaluation.num_prompts])
    curves, seconds = {}, {}
    for seed in arguments.seeds:
        folder = arguments.out / f"seed-{seed}"
        train(folder, seed, arguments.overrides)
        curves[seed], seconds[seed] = read(folder)

    table = {}
    for name in REWARDS:
        before, after = ([curve[name][place][1] for curve in curves.values()] for place in (0, -1))
        closed = [(b - a) / (truth[name] - a) for a, b in zip(before, after)]
        table[name] = {"before": before, "after": after, "ground_truth": truth[name], "share_of_gap_closed": closed}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    results = ROOT / "benchmarks" / "results" / "learning.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "commit": commit.strip(),
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "iterations": config.iterations,
        "seeds": arguments.seeds,
        "rewards": table,
        "seconds_by_phase": {str(seed): value for seed, value in seconds.items()},
    }
    results.write_text(json.dumps(told, indent=2) + "\n")
    images = ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    plot(images / "learning.png", curves, truth)
    shutil.copy(arguments.out / f"seed-{arguments.seeds[-1]}" / "before_after.png", images / "before_after.png")

    print(f"\n{'held out':<16}{'before':>18}{'after':>18}{'ground truth':>14}{'gap closed':>22}")
    for name, row in table.items():
        before, after = (f"{statistics.mean(row[k]):.3f} +- {spread(row[k]):.3f}" for k in ("before", "after"))
        closed = row["share_of_gap_closed"]
        share = f"{min(closed):.0%} to {max(closed):.0%}"
        print(f"{name:<16}{before:>18}{after:>18}{row['ground_truth']:>14.3f}{share:>22}")
    for seed, phases in seconds.items():
        print(f"seed {seed}: {sum(phases.values()):.0f} s: {', '.join(f'{k[8:]} {v:.0f}' for k, v in phases.items())}")


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
