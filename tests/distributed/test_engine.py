"""The engine against plain PyTorch: one training iteration under ZeRO, and the same iteration without DeepSpeed."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from egrpo_fast.config import ConfigError, OptimizerConfig, load_config
from egrpo_fast.distributed.checkpoint import CheckpointReader, Checkpoints
from egrpo_fast.distributed.engine import check_overrides, learning_rate_factor
from egrpo_fast.distributed.world import World, free_port

ROOT = Path(__file__).parents[2]
TINY = [
    "schedule.num_steps=4", "rollout.group_size=3", "prompts.per_iteration=4", "optimizer.warmup_steps=0",
    "optimizer.lr=1e-3", "optimizer.weight_decay=0.1", "evaluation.num_prompts=2", "optimizer.max_grad_norm=0.002",
    "deepspeed.overrides={zero_optimization: {stage3_param_persistence_threshold: 100}}",
]  # fmt: skip
FAMILY_LORA = "model.lora={rank: 4, alpha: 8}"
LORA = "model.lora={rank: 4, alpha: 8, target_modules: [to_q, to_k, to_v, proj_out]}"


def gathered_weights(trainer):
    """Name -> float32 master weights, put together from all ranks' pieces; each element once."""
    whole, seen = {}, {}
    for rank in trainer.world.gather([piece for piece in trainer.engine.state_shards() if piece.kind == "weight"]):
        for piece in rank:
            numel = torch.Size(piece.shape).numel()
            flat = whole.setdefault(piece.name, torch.empty(numel))
            flat[piece.start : piece.start + piece.tensor.numel()] = piece.tensor
            seen[piece.name] = (seen.get(piece.name, (0,))[0] + piece.tensor.numel(), piece.shape)
    assert all(count == torch.Size(shape).numel() for count, shape in seen.values()), "pieces do not tile"
    return {name: flat.reshape(seen[name][1]) for name, flat in whole.items()}


def plain_iteration(trainer, transformer, batch):
    """The paper's update written out with torch.optim: mean loss over active steps and prompts, clip, AdamW.

    Master weights and their gradient are float32. Returns the gradient norm and the new masters.
    """
    settings = trainer.config.optimizer
    trained = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    masters = {name: torch.nn.Parameter(parameter.detach().float()) for name, parameter in trained.items()}
    for master in masters.values():
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(
        masters.values(), lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    for n, group in enumerate(trainer.sampler.wavefront.plan.groups):
        for experience in batch:
            rows = torch.arange(len(experience.rollout.states[n])) // len(group.sources)
            v = trainer.sampler.policy.backbone.velocity(
                transformer, experience.rollout.states[n], group.time, experience.conditioning, rows
            )
            rewards = trainer.sampler.wavefront.plan.by_group(experience.rewards)[n]
            loss = trainer.objective(group, experience.rollout.key, v, v.detach(), rewards).loss
            (loss / (len(trainer.sampler.wavefront.plan.groups) * len(batch))).backward()
            for name, parameter in trained.items():
                if parameter.grad is not None:  # of a last block's text nothing may come of it
                    masters[name].grad += parameter.grad.float()
                parameter.grad = None
    norm = torch.nn.utils.clip_grad_norm_(masters.values(), settings.max_grad_norm)
    optimizer.step()
    return norm.item(), {name: master.detach() for name, master in masters.items()}


def check(world, heart, folder, overrides, saved):
    """One iteration, ours and by plain PyTorch on all ranks' experience. saved: where the trained weights go."""
    from egrpo_fast.models.transformer import fill_buffers, meta_transformer
    from egrpo_fast.rollout import NoiseKey
    from egrpo_fast.shapes import pipeline_path
    from egrpo_fast.train import check_inputs, make_trainer

    config = load_config("shapes", [*TINY, f"output_dir={folder}", *overrides])
    trainer = make_trainer(config, world, heart, *check_inputs(config))
    before = gathered_weights(trainer)
    transformer, weights = meta_transformer(Path(pipeline_path(config.model.path)), config.model.lora, config.seed)
    dtype = getattr(torch, config.model.dtype)
    values = {name: weights(name).to(dtype) for name, _ in transformer.named_parameters()}
    transformer.load_state_dict(values, assign=True, strict=False)
    fill_buffers(transformer, weights, dtype, "cpu")
    trained = {name: value for name, value in transformer.named_parameters() if value.requires_grad}
    assert trained.keys() == before.keys() and all(torch.equal(trained[name], before[name]) for name in before)

    # However the rollout finds its weights, its latents are the same bits.
    prompts = trainer.order.iteration(0, 4, world.rank, world.size)
    conditioning = trainer.sampler.policy.backbone.encode([prompts[0].text])
    key = NoiseKey(config.seed, 0, torch.tensor([prompts[0].number]))

    def latents(gathered):
        with trainer.engine.inference(gathered) as module:
            return trainer.sampler.wavefront.run(trainer.policy.velocity(conditioning, module), key).final_latents

    assert torch.equal(latents(gathered=True), latents(gathered=False))

    batch = trainer.sampler.sample(prompts)
    told = trainer.update(batch)
    norm, expected = plain_iteration(trainer, transformer, [one for rank in world.gather(batch) for one in rank])
    exact = dtype == torch.float32
    assert told["grad_norm"] == pytest.approx(norm, rel=1e-4 if exact else 2e-2) and told["skipped_steps"] == 0
    after, moved = gathered_weights(trainer), 0.0
    for name, ours in after.items():
        moved = max(moved, (ours - before[name]).abs().max().item())
        apart = (ours - expected[name]).abs()
        # In bfloat16 gradients are rounded in another order, and AdamW's first step follows the sign of the smallest.
        assert apart.max() <= 2e-6 if exact else apart.mean() < 0.05 * config.optimizer.lr, name
    assert moved > 5e-4, "AdamW's first step moves a weight by about lr"
    # What the forward uses followed the master weights, on every rank.
    with trainer.engine.inference(gathered=True) as module:
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, after[name].to(dtype) if name in after else values[name])
    # A checkpoint brings them back, for forwards that find their weights in either way.
    checkpoints = Checkpoints(folder / "checkpoints", world.rank, world.size, asynchronous=False)
    checkpoints.save(1, trainer.engine.state_shards(), trainer.engine.rank_local_state(), {}, "test")
    expected = latents(gathered=False)
    trainer.update(batch)
    assert not torch.equal(latents(gathered=False), expected)
    trainer.engine.restore(CheckpointReader(checkpoints.newest()), 1)
    assert all(torch.equal(latents(gathered), expected) for gathered in (False, True))
    if world.is_main:
        save_file({name: value.contiguous() for name, value in after.items()}, saved)


def main(folder, stage, *overrides):
    from egrpo_fast.distributed.heartbeat import Heartbeat, group_store
    from egrpo_fast.distributed.world import World

    world = World()
    with Heartbeat(world.rank, world.size, group_store(), 300.0) as heart:
        families = overrides and overrides[0].startswith("model.path=")
        variants = {"full": overrides, "lora": (*overrides, FAMILY_LORA if families else LORA)}
        for name, settings in (variants if families or not overrides else {"full": overrides}).items():
            saved = folder / f"{name}-{stage}-{world.size}.safetensors"
            check(world, heart, folder / name, [f"deepspeed.zero_stage={stage}", *settings], saved)
    world.close()


def launch(folder, stage, ranks, *overrides):
    """In processes of its own: DeepSpeed keeps one world per process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command = [*launcher, "--master_port", str(free_port()), __file__, str(folder), str(stage), *overrides]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        (3, 2), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1, 1), (2, 2), (3, 1))),
        pytest.param(3, 4, marks=pytest.mark.slow), pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(2, 4, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_an_iteration_under_zero_equals_plain_pytorch(stage, ranks, tmp_path):
    """Full and LoRA: gradients of active steps, prompts and ranks add up, clipping bites, AdamW decays weights."""
    launch(tmp_path, stage, ranks)
    assert {len(load_file(tmp_path / f"{name}-{stage}-{ranks}.safetensors")) > 0 for name in ("full", "lora")} == {True}


@pytest.mark.parametrize(
    "kind",
    ["sd3", *(pytest.param(kind, marks=pytest.mark.slow)
              for kind in ("flux2-dev", "flux2-klein", "flux2-klein-base", "qwen-image", "qwen-image-2.1", "z-image"))],
)  # fmt: skip
def test_an_iteration_of_every_family_equals_plain_pytorch(kind, tmp_path):
    """Full, and LoRA on the family's own layers; guidance at the pipeline's default, which gradients flow through."""
    from egrpo_fast.models.random import make_pipeline

    make_pipeline(kind).save_pretrained(tmp_path / "base")
    # AdamW's first step follows the sign of the smallest gradients, whose rounding is another: a larger epsilon.
    length = 320 if kind == "flux2-dev" else 64  # its system message is read before the prompt
    settings = [f"model.max_sequence_length={length}", "model.guidance_scale=null"]
    settings += ["optimizer.max_grad_norm=1", "optimizer.eps=1e-5"]
    launch(tmp_path, 3, 2, f"model.path={tmp_path / 'base'}", *settings)
    assert {len(load_file(tmp_path / f"{name}-3-2.safetensors")) > 0 for name in ("full", "lora")} == {True}


def stall():
    """Two ranks load; rank 0's disk does not answer at one parameter."""
    from egrpo_fast.distributed.heartbeat import Heartbeat, group_store
    from egrpo_fast.distributed.loading import materialize
    from egrpo_fast.distributed.world import World
    from egrpo_fast.models.transformer import meta_transformer
    from egrpo_fast.shapes import PIPELINE

    config = load_config("shapes", ["deepspeed.init_timeout=2"])
    world = World()
    transformer, weights = meta_transformer(PIPELINE)

    def read(name):
        if name == "transformer_blocks.0.attn.to_q.weight":
            time.sleep(600)
        return weights(name)

    with Heartbeat(world.rank, world.size, group_store(), 300.0, gone_seconds=20.0, beat=0.2) as heart:
        materialize(transformer, read, config, world, heart)


def test_a_load_that_hangs_ends_and_names_rank_and_parameter():
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **world}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "stall"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [rank.communicate(timeout=600)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75], told
    where = r"loading transformer_blocks\.0\.attn\.to_q\.weight"
    named = rf"rank [01] (waited \d+ s in|failed: .*waited \d+ s in) {where}"
    assert all(re.search(named, text) for text in told), told


def count():
    """Two ranks, on machines whose names differ or do not."""
    from egrpo_fast.distributed.world import World

    socket.gethostname = lambda: f"machine-{os.environ['RANK']}" if sys.argv[2] == "names apart" else "localhost"
    world = World()
    counts = [world.local_size]
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # of a launcher, on machines that perhaps share their name
        os.environ[variable] = "1"
        counts.append(world._ranks_here())
        del os.environ[variable]
    print("ranks here", *counts)


@pytest.mark.parametrize(("machines", "expected"), [("names apart", "1 1 1"), ("one name", "2 1 1")])
def test_the_ranks_of_a_machine_are_counted_whoever_started_them(machines, expected):
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **world}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "count", machines], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [rank.communicate(timeout=1800)[0].splitlines()[-1] for rank in ranks]
    assert told == [f"ranks here {expected}"] * 2


OVERRIDES = {
    "{foo: 1}": "foo: unknown to DeepSpeed",
    "{zero_optimization: {reduce_bucket_sise: 1}}": "zero_optimization.reduce_bucket_sise: unknown to DeepSpeed",
    "{zero_optimization: {reduce_bucket_size: many}}": "zero_optimization.reduce_bucket_size: 'many': .*valid integer",
    "{data_types: {grad_accum_dtyp: fp32}}": "data_types.grad_accum_dtyp: unknown to DeepSpeed",
    "{aio: {block_sise: 1}}": "aio.block_sise: unknown to DeepSpeed",
    "{comms_logger: {enabled: true, verbos: true}}": "comms_logger.verbos: unknown to DeepSpeed",
    "{communication_data_type: fp33}": "DeepSpeed refuses them: .*fp33",
    "{wall_clock_breakdown: maybe}": "DeepSpeed refuses them: ",
    "{aio: 3}": "DeepSpeed refuses them: ",
    "{elasticity: {enabled: false}}": "DeepSpeed refuses them: .*removed",
}


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_overrides_that_deepspeed_does_not_read_are_refused(overrides):
    with pytest.raises(ConfigError, match=f"^deepspeed.overrides: {OVERRIDES[overrides]}") as told:
        check_overrides(load_config("shapes", [f"deepspeed.overrides={overrides}"]))
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        "{}",
        "{zero_optimization: {reduce_bucket_size: 100000000, sub_group_size: 1, zero_hpz_partition_size: 8}}",
        "{zero_optimization: {stage3_param_persistence_threshold: 0}}",
        "{comms_logger: {enabled: true, verbose: true}, flops_profiler: {enabled: true, profile_step: 3}}",
        "{aio: {block_size: 1048576}, wall_clock_breakdown: true, communication_data_type: fp32}",
        "{tensorboard: {enabled: true, output_path: x}, activation_checkpointing: {partition_activations: true}}",
    ],
)
def test_overrides_that_deepspeed_reads_are_taken(overrides):
    check_overrides(load_config("shapes", [f"deepspeed.overrides={overrides}"]))


@pytest.mark.parametrize("lacking", ["RANK", "LOCAL_RANK", "MASTER_ADDR"])
def test_a_world_that_is_told_by_half_is_refused(lacking, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(lacking)
    with pytest.raises(ValueError, match=f"WORLD_SIZE: 2 ranks, but {lacking} is not set"):
        World()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        "deepspeed.overrides={zero_optimization: {zero_hpz_partition_size: 2, stage3_param_persistence_threshold: 0}}",
        "deepspeed.offload_optimizer=cpu",
        "deepspeed.offload_param=cpu",
    ],
    ids=["hierarchical partitions", "optimizer on the host", "weights on the host"],
)
def test_other_places_for_weights_and_optimizer(overrides, tmp_path):
    launch(tmp_path, 3, 2, overrides)
    assert load_file(tmp_path / "full-3-2.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_iteration_in_bfloat16(stage, tmp_path):
    """With float32 master weights and gradients, whichever of DeepSpeed's optimizers that takes."""
    launch(tmp_path, stage, 2, "model.dtype=bfloat16")
    assert load_file(tmp_path / f"full-{stage}-2.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["method={name: flow_grpo, fraction: 0.7}"], id="flow_grpo"),
        pytest.param(["method=dance_grpo"], id="dance_grpo"),
        pytest.param(["method={name: mix_grpo, window: 2}", "objective.scale_rewards=none"], id="mix_grpo"),
        pytest.param(["rollout={}", "method={name: branch_grpo, splits: [0, 1], branching: 3}"], id="branch_grpo"),
        pytest.param(["method=granular_grpo", "objective.antithetic=true"], id="granular_grpo"),
        pytest.param(["method=tempflow_grpo", "objective.baseline=leave_one_out"], id="tempflow_grpo"),
    ],
)
def test_an_iteration_of_every_method(overrides, tmp_path):
    """One trainer for all: what a plan says is what plain PyTorch does, two ranks and four prompts added up."""
    launch(tmp_path, 3, 2, *overrides)
    assert load_file(tmp_path / "full-3-2.safetensors")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"warmup_steps": 3}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"warmup_steps": 1, "lr_scheduler": "linear"}, [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"warmup_steps": 2, "lr_scheduler": "cosine"}, [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate(settings, expected):
    found = [learning_rate_factor(OptimizerConfig(**settings), 6, step) for step in range(6)]
    assert found == pytest.approx(expected, abs=1e-6)


if __name__ == "__main__":
    if sys.argv[1] in ("stall", "count"):
        {"stall": stall, "count": count}[sys.argv[1]]()
        raise SystemExit
    folder, stage, *overrides = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    main(Path(folder), int(stage), *overrides)
