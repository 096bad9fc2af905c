"""Draws what was measured: every `results/<gpu>.csv` beside it, as shares of the copy bandwidth at the problem with
the most rows, and every `results/iteration-<device>.json` into `docs/images`, seconds of one iteration by phase.
"""

import csv
import json
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
ORDER = ("triton", "extension", "compiled", "eager", "reference")


def draw(path: Path) -> Path:
    rows = list(csv.DictReader(path.open(newline="")))
    problems = Counter((int(row["tokens"]), int(row["prompts"])) for row in rows)
    chosen_problem = max(problems, key=lambda problem: (problems[problem], problem))
    rows = [row for row in rows if (int(row["tokens"]), int(row["prompts"])) == chosen_problem]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    shown = [name for name in ORDER if any(row["implementation"] == name for row in rows)]
    figure, axes = plt.subplots(figsize=(9, 0.9 * len(cases) + 1.5), layout="constrained")
    height = 0.8 / len(shown)
    for offset, implementation in enumerate(shown):
        chosen = [row for row in rows if row["implementation"] == implementation]
        at = [cases.index(row["case"]) + (offset - (len(shown) - 1) / 2) * height for row in chosen]
        axes.barh(at, [float(row["share_of_copy"]) for row in chosen], height, label=implementation)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel(f"minimal bytes / time, as a share of the copy bandwidth ({rows[0]['copy_gb_per_s']} GB/s)")
    axes.set_title("{gpu}, {tokens} tokens x {prompts} prompts, torch {torch}".format(**rows[0]), fontsize="medium")
    figure.legend(loc="outside right upper")
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target


def draw_iterations(path: Path) -> Path:
    models = json.loads(path.read_text())
    figure, axes = plt.subplots(1, len(models), figsize=(5.2 * len(models), 3.0), layout="constrained", squeeze=False)
    for axis, (name, told) in zip(axes[0], models.items()):
        variants, left = list(told["variants"]), [0.0] * len(told["variants"])
        for phase in ("rollout", "decode", "rewards", "update"):
            seconds = [told["variants"][variant]["seconds"][phase] for variant in variants]
            axis.barh(variants, seconds, left=left, label=phase)
            left = [a + b for a, b in zip(left, seconds)]
        for place, (end, variant) in enumerate(zip(left, variants)):
            axis.text(end, place, f" {told['variants'][variant]['ratio']:.1f}x", va="center")
        axis.set_xlim(0, 1.15 * max(left))
        axis.invert_yaxis()
        axis.set(xlabel="seconds", title=f"{name}, {sum(told['tokens'])} tokens, {told['device']}")
        axis.title.set_fontsize(9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    target = path.parents[2] / "docs" / "images" / f"{path.stem}.png"
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


if __name__ == "__main__":
    paths = sorted(RESULTS.glob("*.csv"))
    for path in paths:
        print(draw(path))
    for path in sorted(RESULTS.glob("iteration-*.json")):
        print(draw_iterations(path))
    if not paths:
        print("no measurements: `make gpu` on a machine with a GPU writes them")
