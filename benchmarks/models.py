"""What the known models take, by the planner: writes results/models.json, and prints the table of docs/models.md.

Nothing is measured. Every model draws 1024 x 1024 pixels, at the default guidance of its pipeline, with the settings of
the recipe `flux-dev` and embeddings that were made beforehand. So numbers compare models; a recipe fits a card better.
"""

import json
from pathlib import Path

from egrpo_fast import __version__, models
from egrpo_fast.commands.cluster import GIB, Cluster
from egrpo_fast.commands.cost import Cost
from egrpo_fast.config import load_config
from egrpo_fast.models.sizes import Sizes

RESULT = Path(__file__).parent / "results" / "models.json"
SHARDED = ["rollout.parameters=sharded"]
RUNS = {
    "lora_1": (["model.lora={}", "prompts.per_iteration=1"], Cluster(1)),
    "lora_8": (["model.lora={}", *SHARDED], Cluster(8)),
    "full_8": (SHARDED, Cluster(8)),
}
"""LoRA of rank 64 on one GPU, and on 8 of one machine; all weights on 8."""


def measure(path: str) -> dict[str, float]:
    settings = [f"model.path={path}", "model.height=1024", "model.width=1024", "model.guidance_scale=null",
                "prompts.embeddings=embeddings", "rewards=[{name: jpeg}]"]  # fmt: skip
    sizes = Sizes(load_config("flux-dev", settings).model)
    flops, _ = sizes.evaluation_flops
    velocities = sizes.backbone.rows_per_velocity
    found = {"parameters": sizes.parameters, "tflop": round(flops / 1e12, 1), "velocities": velocities}
    for name, (more, cluster) in RUNS.items():
        cost = Cost(load_config("flux-dev", [*settings, *more]), cluster, sizes)
        found[name] = round(cost.memory.peak / GIB, 1)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    lines = ["| model | parameters | TFLOP per velocity | LoRA, 1 GPU | LoRA, 8 GPUs | all weights, 8 GPUs |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for path, one in found.items():
        twice = " (guided: two evaluations)" if one["velocities"] == 2 else ""
        memory = " | ".join(f"{one[name]} GiB" for name in RUNS)
        lines.append(f"| `{path}` | {one['parameters']:,} | {one['tflop']}{twice} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    files = sorted(Path(models.__path__[0]).glob("*/configs/*/*.json"))
    found = {path: measure(path) for path in (f"{file.parent.name}/{file.stem}" for file in files)}
    RESULT.write_text(json.dumps({"version": __version__, "models": found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
