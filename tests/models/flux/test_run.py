"""Runs on FLUX's own layout, random weights in several shards: two CPU ranks, export, resuming on one rank.

Started by the launcher, this file is what its ranks run: several trainers one after the other.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from egrpo_fast import noise
from egrpo_fast.commands.encode import encode
from egrpo_fast.config import CHECKPOINTS, CONFIG_FILE, load_config
from egrpo_fast.distributed.checkpoint import CheckpointReader, problems
from egrpo_fast.distributed.world import free_port
from egrpo_fast.models.random import make_pipeline
from egrpo_fast.models.transformer import meta_transformer
from egrpo_fast.runs.export import export, find_checkpoint

ROOT = Path(__file__).parents[3]
PROMPTS = ["a café at night", "two dogs in the snow", "a red kite over the sea", "an old map", "a chair", "rain"]
SETTINGS = [
    "model.height=32", "model.width=48", "model.max_sequence_length=32", "model.dtype=float32",
    "prompts.per_iteration=2", "schedule.num_steps=4", "schedule.active_steps=[0]", "rollout.group_size=2",
    "evaluation.num_inference_steps=4", "evaluation.num_prompts=3", "checkpoint.every=1",
    "checkpoint.save_total_limit=4", "iterations=3",
    "optimizer.lr=1e-3", "objective.mix=advantage",
    # Of two samples each reward prefers one: with equal weights two that disagree would leave nothing to learn.
    "rewards=[{name: jpeg, weight: 2.0}, {name: clip, options: {model: shapes}}]",
]  # fmt: skip
LORA = "model.lora={rank: 4, alpha: 16, target_modules: [to_q, to_v, proj_out]}"
EMA_DECAY = 0.5


def overrides(folder, name, *others):
    inputs = [f"model.path={folder / 'base'}", f"prompts.train={folder / 'prompts.txt'}"]
    return [*SETTINGS, *inputs, f"prompts.held_out={folder / 'prompts.txt'}", f"output_dir={folder / name}", *others]


def run(world, heart, config, images=None):
    """Train to the end; the held-out images of the last weights, by the trainer's own sampler."""
    from egrpo_fast.train import check_inputs, make_trainer

    trainer = make_trainer(config, world, heart, *check_inputs(config))
    assert trainer.train() == 0
    if images is not None:
        held_out = trainer.evaluate().images
        if world.is_main:
            save_file({"images": held_out.contiguous()}, images)


def interrupted(world, folder, name, copy, iteration):
    """A copy of a run as it was after `iteration`."""
    if world.is_main:
        shutil.copytree(folder / name, folder / copy)
        for path in (folder / copy / CHECKPOINTS).iterdir():
            if int(path.name.removeprefix("iteration-")) > iteration:
                shutil.rmtree(path)
    world.gather(None)


def two_ranks(world, heart, folder):
    run(world, heart, load_config("flux-dev", overrides(folder, "full")), folder / "full.safetensors")
    lora = overrides(folder, "lora", LORA, f"optimizer.ema_decay={EMA_DECAY}", "checkpoint.best=jpeg", "iterations=2")
    run(world, heart, load_config("flux-dev", lora), folder / "lora.safetensors")
    offload = ["deepspeed.offload_optimizer=cpu", f"prompts.embeddings={folder / 'embeddings'}", "iterations=2"]
    run(world, heart, load_config("flux-dev", overrides(folder, "offload", *offload)))
    eight = ["optimizer.name=adamw8bit", "model.dtype=bfloat16"]
    run(world, heart, load_config("flux-dev", overrides(folder, "eight", *eight)))
    interrupted(world, folder, "eight", "eight-resumed", 2)
    run(world, heart, load_config("flux-dev", overrides(folder, "eight-resumed", *eight, "resume=true")))


def one_rank(world, heart, folder):
    interrupted(world, folder, "full", "full-resumed", 1)
    run(world, heart, load_config("flux-dev", overrides(folder, "full-resumed", "resume=true")))
    interrupted(world, folder, "eight", "eight-alone", 2)
    eight = ["optimizer.name=adamw8bit", "model.dtype=bfloat16", "resume=true"]
    with pytest.raises(ValueError, match="was written by 2 ranks, this run has 1"):
        run(world, heart, load_config("flux-dev", overrides(folder, "eight-alone", *eight)))


def main(what, folder):
    from egrpo_fast.distributed.heartbeat import Heartbeat, group_store
    from egrpo_fast.distributed.world import World

    world = World()
    with Heartbeat(world.rank, world.size, group_store(), 300.0) as heart:
        {"two": two_ranks, "one": one_rank}[what](world, heart, folder)
    world.close()


def launch(ranks, what, folder):
    ports = ["--master_port", str(free_port())]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), *ports]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, __file__, what, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """full, lora, offload and eight, by two ranks."""
    folder = tmp_path_factory.mktemp("flux")
    make_pipeline("flux-dev").save_pretrained(folder / "base", max_shard_size="400KB")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    encode(
        [folder / "prompts.txt"], folder / "embeddings", str(folder / "base"), max_sequence_length=32, dtype="float32"
    )
    launch(2, "two", folder)
    return folder


@pytest.fixture(scope="module")
def alone(runs):
    """full-resumed, by one rank."""
    launch(1, "one", runs)
    return runs


def weights(run, iteration, kind="weight"):
    reader = CheckpointReader(find_checkpoint(run, str(iteration)))
    assert not problems(reader.path)
    return {name: reader.tensor(name, kind) for name in reader.names(kind)}


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "held_out/jpeg" in line]


def moved(ours, theirs):
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("name", ["full", "lora", "offload", "eight"])
def test_every_variant_learns_from_the_same_first_rollout(name, runs):
    """Live encoders and cache, full and LoRA: before the first update all are the base. Then weights move."""
    iterations, evaluations = metrics(runs / name)
    tolerance = 0.02 if name == "eight" else 1e-5  # bfloat16, float32
    full = metrics(runs / "full")
    for reward in ("jpeg", "clip"):
        for line, like, key in (
            (iterations[0], full[0][0], f"reward/{reward}"), (evaluations[0], full[1][0], f"held_out/{reward}")
        ):  # fmt: skip
            assert line[key] == pytest.approx(like[key], rel=0, abs=tolerance)
    for line in iterations:
        assert line["log_ratio_before_update"] == 0.0 and line["skipped_steps"] == 0 and line["grad_norm"] > 0
    assert moved(weights(runs / name, 2), weights(runs / name, 1)) > 1e-4


def drawn(pipeline, config):
    """The held-out prompts by diffusers, from the trainer's noise. The folder's scheduler has the run's shift."""
    pipeline.set_progress_bar_config(disable=True)
    number = torch.arange(config.evaluation.num_prompts)
    shape = (config.model.height * config.model.width // 256, 64)
    return pipeline(
        PROMPTS[: len(number)], height=config.model.height, width=config.model.width, output_type="pt",
        num_inference_steps=config.evaluation.num_inference_steps, guidance_scale=config.model.guidance_scale,
        max_sequence_length=config.model.max_sequence_length,
        latents=noise.initial_noise(config.seed, 0, number, shape, step=noise.EVALUATION),
    ).images  # fmt: skip


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_exported_pipeline_draws_the_trainers_images(name, runs, tmp_path):
    config = load_config(str(runs / name / CONFIG_FILE))
    export(runs / name, tmp_path / "out")
    if name == "full":
        pipeline = FluxPipeline.from_pretrained(tmp_path / "out")
    else:
        pipeline = FluxPipeline.from_pretrained(runs / "base")
        pipeline.load_lora_weights(tmp_path / "out")
    ours, theirs = load_file(runs / f"{name}.safetensors")["images"], drawn(pipeline, config)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)
    before = load_file(runs / name / "base_images.safetensors")["images"]
    assert (before - ours).abs().max() > 1e-3, "training must show, or the comparison shows nothing"
    for file in (runs / name / "pipeline").rglob("*.safetensors"):
        ours, again = load_file(file), load_file(tmp_path / "out" / file.relative_to(runs / name / "pipeline"))
        assert ours.keys() == again.keys() and all(torch.equal(ours[key], again[key]) for key in ours), file


def test_the_average_is_the_averages_formula(runs, tmp_path):
    """`ema <- d ema + (1 - d) w` after every step, from the first weights on, and exported as such."""
    config = load_config(str(runs / "lora" / CONFIG_FILE))
    transformer, initial = meta_transformer(runs / "base", config.model.lora, config.seed)
    average = {name: initial(name) for name, value in transformer.named_parameters() if value.requires_grad}
    for iteration in (1, 2):
        now = weights(runs / "lora", iteration)
        average = {name: EMA_DECAY * value + (1 - EMA_DECAY) * now[name] for name, value in average.items()}
        found = weights(runs / "lora", iteration, "ema")
        assert found.keys() == average.keys() and moved(found, average) < 1e-7
    assert moved(average, now) > 1e-4
    export(runs / "lora", tmp_path / "out", "ema")
    FluxPipeline.from_pretrained(runs / "base").load_lora_weights(tmp_path / "out")


def test_offloaded_and_from_the_cache_it_is_the_same_run(runs):
    """The optimizer on the host, embeddings from `egrpo encode`: the weights of live encoders and no offload."""
    for iteration in (1, 2):
        assert moved(weights(runs / "full", iteration), weights(runs / "offload", iteration)) < 2e-6


@pytest.mark.slow
def test_eight_bit_resumed_on_as_many_ranks_is_the_same_run(runs, alone):
    """And on another number it is refused by name: `alone` has tried."""
    full, resumed = weights(runs / "eight", 3), weights(runs / "eight-resumed", 3)
    assert all(torch.equal(full[name], resumed[name]) for name in full)
    assert moved(full, weights(runs / "eight", 2)) > 1e-4


def test_resumed_on_one_rank_equals_two(alone):
    """From iteration 1 on: the weights of the run that went on with two ranks, to float tolerance; logs go on."""
    for iteration in (2, 3):
        assert moved(weights(alone / "full", iteration), weights(alone / "full-resumed", iteration)) < 1e-5
    ours, theirs = metrics(alone / "full"), metrics(alone / "full-resumed")
    assert [line["iteration"] for line in theirs[0]] == [1, 2, 3]
    assert theirs[1][-1]["held_out/jpeg"] == pytest.approx(ours[1][-1]["held_out/jpeg"], rel=1e-4)
    assert (alone / "full-resumed" / "pipeline" / "model_index.json").is_file(), "the earlier export was replaced"


if __name__ == "__main__":
    main(sys.argv[-2], Path(sys.argv[-1]))
