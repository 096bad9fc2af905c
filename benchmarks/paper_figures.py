"""The paper's images of the schedule: entropy by step and merge, reward spread by step, merged and not.

    python benchmarks/paper_figures.py                 docs/images/entropy.png, and spread.png from the recorded file
    python benchmarks/paper_figures.py --measure       first measures benchmarks/results/spread.json anew: minutes

Spread is the standard deviation of a reward within the group of one active step, of the embedded pipeline as it ships,
on the first training captions. Merged and unmerged groups leave the same states by the same noise.
"""

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats

from egrpo_fast import ops
from egrpo_fast.config import ModelConfig, load_config, plan_of
from egrpo_fast.policy import Policy
from egrpo_fast.rewards import make_reward, score
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.runs.plots import entropy_plot
from egrpo_fast.schedule import make_schedule
from egrpo_fast.shapes import PIPELINE, PROMPTS

ROOT = Path(__file__).parents[1]
RECORDED, IMAGES = ROOT / "benchmarks" / "results" / "spread.json", ROOT / "docs" / "images"
REWARDS = {"shapes_soft": {}, "clip": {"model": "shapes"}}
TITLES = {"shapes_soft": "soft score (trained on)", "clip": "CLIP score (not trained on)"}
THRESHOLDS = (2.2, 0.0)


@torch.no_grad()
def measure(num_prompts):
    """Reward spread of every (threshold, reward, prompt, active step)."""
    captions = PROMPTS["train"].read_text().splitlines()[:num_prompts]
    backbone = (
        Policy(ModelConfig(path=str(PIPELINE), height=32, width=32, max_sequence_length=24, dtype="float32"), PIPELINE)
        .load(torch.device("cpu"))
        .backbone
    )
    rewards = {name: make_reward(name, options) for name, options in REWARDS.items()}
    told = {"steps": {}, "prompts": num_prompts, "thresholds": {}}
    for threshold in THRESHOLDS:
        config, started = load_config("shapes", [f"schedule.entropy_threshold={threshold}"]), time.perf_counter()
        plan = plan_of(config, 0)
        wavefront = Wavefront(plan, 1, backbone.latent_shape, ops.choose())
        spreads = {name: [] for name in rewards}
        for number, caption in enumerate(captions):
            conditioning = backbone.encode([caption])
            rollout = wavefront.run(
                lambda latents, t, rows, text=conditioning: backbone.velocity(
                    backbone.transformer, latents, t, text, rows
                ),
                NoiseKey(config.seed, 0, torch.tensor([number])),
            )
            images = backbone.decode(rollout.final_latents[0])
            for name, reward in rewards.items():
                groups = plan.by_group(score(name, reward, images, [caption] * len(images))[None, None])
                spreads[name].append([round(values.std().item(), 6) for values in groups])
        told["steps"] = [group.index for group in plan.groups]
        told["group_size"] = plan.groups[0].size
        told["thresholds"][str(threshold)] = {
            "merges": [plan.schedule.merges[group.index] for group in plan.groups],
            "entropy": [group.step.entropy for group in plan.groups],
            "seconds": round(time.perf_counter() - started, 1),
            "spread": spreads,
        }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    RECORDED.write_text(
        json.dumps({"commit": commit.strip(), "machine": machine, "torch": torch.__version__} | told) + "\n"
    )


def band(values):
    """Mean over prompts [N, steps], and Student's 95% interval of it."""
    mean, half = np.mean(values, axis=0), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values, axis=0)
    return mean, mean - half, mean + half


def gain(recorded, name):
    """What merging adds to a prompt's spread: [N, steps]. The same states and noise, so prompts are paired."""
    merged, plain = (np.array(recorded["thresholds"][str(threshold)]["spread"][name]) for threshold in THRESHOLDS)
    return merged - plain


def spread_plot(path, recorded):
    """Spreads above, what merging adds to them below; means over prompts and their 95% intervals."""
    steps, lengths = recorded["steps"], recorded["thresholds"][str(THRESHOLDS[0])]["merges"]
    figure, axes = plt.subplots(2, len(REWARDS), figsize=(4.6 * len(REWARDS), 5.6), sharex=True, layout="constrained")

    def draw(axis, values, color, label):
        mean, low, high = band(values)
        axis.plot(steps, mean, color=color, marker="o", markersize=4, label=label)
        axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axis.grid(alpha=0.3)

    for (above, below), name in zip(axes.T, REWARDS):
        for threshold, color, label in zip(THRESHOLDS, ("tab:red", "tab:blue"), ("merged", "not merged")):
            draw(above, recorded["thresholds"][str(threshold)]["spread"][name], color, label)
        above.set(title=TITLES[name], ylim=(0, None))
        above.legend(fontsize=8)
        draw(below, gain(recorded, name), "tab:purple", None)
        below.axhline(0.0, color="gray", linestyle="--", linewidth=1)
        below.set_xticks(steps, [f"{step}\n(x{length})" for step, length in zip(steps, lengths)])
        below.set(xlabel="active step (0: noise), and its merge")
    axes[0, 0].set(ylabel="spread within the group")
    axes[1, 0].set(ylabel="merged less not merged")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--prompts", type=int, default=32, help="captions to measure on (%(default)s)")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.prompts)
    recorded = json.loads(RECORDED.read_text())
    entropy_plot(IMAGES / "entropy.png", make_schedule(), 2.2)
    spread_plot(IMAGES / "spread.png", recorded)
    for name in REWARDS:
        lines = {str(threshold): found["spread"][name] for threshold, found in recorded["thresholds"].items()}
        for label, values in (lines | {"gain": gain(recorded, name)}).items():
            told = "  ".join(f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in zip(*band(values)))
            print(f"{name:<12}{label:>5}: {told}")


if __name__ == "__main__":
    main()
