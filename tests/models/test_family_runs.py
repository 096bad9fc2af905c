"""Whole runs of every model family: full and LoRA, resumed, exported, and drawn by the family's own pipeline.

Started with a folder, this file is what its process runs: several trainers one after the other.
"""

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from egrpo_fast import noise
from egrpo_fast.commands.encode import encode
from egrpo_fast.config import CHECKPOINTS, load_config
from egrpo_fast.distributed.checkpoint import CheckpointReader
from egrpo_fast.models.random import make_pipeline
from egrpo_fast.models.sizes import Sizes
from egrpo_fast.runs.export import find_checkpoint

PROMPTS = ["a café at night", "two dogs that chase a red kite over the sea in the snow", "rain", "an old map"]
SETTINGS = [
    "model.height=48", "model.width=80", "model.max_sequence_length=64", "prompts.per_iteration=2",
    "rollout.prompts_per_rollout=2", "schedule.num_steps=4", "schedule.shift=auto", "schedule.active_steps=[0]",
    "rollout.group_size=2", "evaluation.num_inference_steps=3", "evaluation.num_prompts=3", "checkpoint.every=1",
    "checkpoint.save_total_limit=4", "iterations=2", "optimizer.lr=1e-3", "optimizer.warmup_steps=0",
    f"prompts.train={json.dumps(PROMPTS)}", f"prompts.held_out={json.dumps(PROMPTS)}",
    "rewards=[{name: jpeg, weight: 2.0}, {name: clip, options: {model: shapes}}]",
]  # fmt: skip
LORA = "model.lora={rank: 4, alpha: 16}"


@dataclass(frozen=True)
class Family:
    """settings: other than SETTINGS. called: what its pipeline is called with, for each prompt. theirs: of our latents
    what it takes. alone: it is called for one prompt after the other."""

    settings: tuple[str, ...] = ()
    called: dict = field(default_factory=dict)
    theirs: Callable = lambda latents: latents
    alone: bool = False


def channels_first(latents):
    return latents.unflatten(2, (6, 10))


def unpacked(latents):
    return latents.transpose(1, 2).unflatten(2, (3, 5))


FAMILIES = {
    "sd3": Family(theirs=channels_first),
    # Its system message is read before the prompt.
    "flux2-dev": Family(("model.max_sequence_length=320",), theirs=unpacked),
    "flux2-klein": Family(theirs=unpacked),
    "flux2-klein-base": Family(theirs=unpacked),
    "qwen-image": Family(called={"negative_prompt": ""}),
    "qwen-image-2.1": Family(("model.height=64", "model.width=96", "model.max_sequence_length=80"), alone=True),
    "z-image": Family(theirs=channels_first),
}
KINDS = ["sd3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(FAMILIES.keys() - {"sd3"}))]


def config(folder, name, *others):
    own = FAMILIES[folder.name].settings
    inputs = [f"model.path={folder / 'base'}", f"output_dir={folder / name}"]
    return load_config("shapes", [*SETTINGS, "model.guidance_scale=null", *own, *inputs, *others])


def main(folder):
    from egrpo_fast.distributed.heartbeat import Heartbeat, group_store
    from egrpo_fast.distributed.world import World
    from egrpo_fast.train import check_inputs, make_trainer

    world = World()

    def run(name, *others):
        settings = config(folder, name, *others)
        trainer = make_trainer(settings, world, heart, *check_inputs(settings))
        assert trainer.train() == 0
        save_file({"images": trainer.evaluate().images.contiguous()}, folder / f"{name}.safetensors")

    with Heartbeat(world.rank, world.size, group_store(), 300.0) as heart:
        run("full")
        run("lora", LORA, f"prompts.embeddings={folder / 'embeddings'}")
        shutil.copytree(folder / "full", folder / "resumed")
        shutil.rmtree(folder / "resumed" / CHECKPOINTS / "iteration-000002")
        run("resumed", "resume=true")
    world.close()


@pytest.fixture(scope="module", params=KINDS)
def runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param, numbered=False)
    make_pipeline(request.param).save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    length = config(folder, "any").model.max_sequence_length
    encode([folder / "prompts.txt"], folder / "embeddings", str(folder / "base"), length, "float32")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]
    return request.param, folder


def weights(run, iteration):
    reader = CheckpointReader(find_checkpoint(run, str(iteration)))
    return {name: reader.tensor(name) for name in reader.names()}


def test_it_learns_and_resumes_bit_by_bit(runs):
    _, folder = runs
    for name in ("full", "lora"):
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for line in (line for line in lines if "loss" in line):
            assert line["log_ratio_before_update"] == 0.0 and line["grad_norm"] > 0 and line["skipped_steps"] == 0
        before, after = weights(folder / name, 1), weights(folder / name, 2)
        assert max((before[key] - after[key]).abs().max() for key in before) > 1e-4
    whole, resumed = weights(folder / "full", 2), weights(folder / "resumed", 2)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_familys_own_pipeline_draws_the_trainers_images(runs, name):
    kind, folder = runs
    family, settings = FAMILIES[kind], config(folder, name).model
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / ("base" if name == "lora" else "full/pipeline"))
    if name == "lora":
        pipeline.load_lora_weights(folder / "lora" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    shape = Sizes(settings).backbone.latent_shape
    start = family.theirs(noise.initial_noise(0, 0, torch.arange(3), shape, step=noise.EVALUATION))
    called = {"height": settings.height, "width": settings.width, "num_inference_steps": 3, "output_type": "pt"}
    if "max_sequence_length" in inspect.signature(pipeline.__call__).parameters:
        called["max_sequence_length"] = settings.max_sequence_length
    drawn = [
        pipeline(
            prompt=PROMPTS[rows], latents=start[rows], **called,
            **{key: [value] * len(PROMPTS[rows]) for key, value in family.called.items()},
        ).images
        for rows in ([slice(row, row + 1) for row in range(3)] if family.alone else [slice(3)])
    ]  # fmt: skip
    colour, alpha = torch.cat(drawn).tensor_split((3,), dim=1)
    images = colour * alpha + 1 - alpha if alpha.shape[1] else colour
    others = (name, "full" if name == "lora" else "lora")
    ours, other = (load_file(folder / f"{one}.safetensors")["images"] for one in others)
    torch.testing.assert_close(ours, images, rtol=0, atol=2e-4)
    assert (ours - other).abs().max() > 1e-3, "training must show, or the comparison shows nothing"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
