"""What the known models take, by the planner: writes results/models.json, and prints the table of docs/models.md.

Nothing is measured. Every model draws at the default guidance of its pipeline, with the settings of the recipe
`flux-dev` and embeddings that were made beforehand. So numbers compare models; a recipe fits a card better.
"""

import json
from pathlib import Path
from typing import Any

from egrpo_fast import __version__, models
from egrpo_fast.commands.cluster import GIB, Cluster
from egrpo_fast.commands.cost import Cost
from egrpo_fast.config import load_config
from egrpo_fast.models.sizes import Sizes

RESULT = Path(__file__).parent / "results" / "models.json"
ONE, SMALL, LARGE = "prompts.per_iteration=1", (512, 512), (1024, 1024)
HOST = ["deepspeed.offload_param=cpu", "rollout.parameters=sharded", "rollout.max_rows_per_call=8"]
RUNS = {
    "1x24": (SMALL, ["model.lora={}", ONE, *HOST], Cluster(1, kind="RTX4090")),
    "1x80": (LARGE, ["model.lora={}", ONE], Cluster(1)),
    "8x80": (LARGE, ["rollout.parameters=sharded"], Cluster(8)),
}
"""LoRA of rank 64 at 512 pixels, its weights in host memory; at 1024 pixels; all weights at 1024 pixels."""


def measure(path: str) -> dict[str, Any]:
    settings = [f"model.path={path}", "model.height=1024", "model.width=1024", "model.guidance_scale=null",
                "prompts.embeddings=embeddings", "rewards=[{name: jpeg}]"]  # fmt: skip
    sizes = Sizes(load_config("flux-dev", settings).model)
    flops, _ = sizes.evaluation_flops
    velocities = sizes.backbone.rows_per_velocity
    found: dict[str, Any] = {
        "parameters": sizes.parameters, "tflop": round(flops / 1e12, 1), "velocities": velocities
    }  # fmt: skip
    for name, ((height, width), more, cluster) in RUNS.items():
        config = load_config("flux-dev", [*settings, *more, f"model.height={height}", f"model.width={width}"])
        cost = Cost(config, cluster, sizes if (height, width) == LARGE else None)
        found[name] = {
            "gib": round(cost.memory.peak / GIB, 1), "fits": cost.fits, "seconds": round(cost.seconds["total"])
        }  # fmt: skip
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| model | parameters | TFLOP per velocity | LoRA, 1 x 24 GB | LoRA, 1 x 80 GB | all weights, 8 x 80 GB |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for path, one in found.items():
        twice = " (guided: two evaluations)" if one["velocities"] == 2 else ""
        told = " | ".join(
            f"{run['gib']} GiB, {run['seconds']} s" if run["fits"] else f"{run['gib']} GiB, too much"
            for run in (one[name] for name in RUNS)
        )
        lines.append(f"| `{path}` | {one['parameters']:,} | {one['tflop']}{twice} | {told} |")
    return "\n".join(lines)


def main() -> None:
    files = sorted(Path(models.__path__[0]).glob("*/configs/*/*.json"))
    found = {path: measure(path) for path in (f"{file.parent.name}/{file.stem}" for file in files)}
    RESULT.write_text(json.dumps({"version": __version__, "models": found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
