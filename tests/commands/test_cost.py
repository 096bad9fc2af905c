"""The cost model against what it models: counts exactly, FLOPs within 2%, bytes of CPU runs within 15%."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import weakref
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from egrpo_fast import cli
from egrpo_fast.commands import cost
from egrpo_fast.commands.cluster import GIB, Cluster, Gpu, parse_gpu
from egrpo_fast.commands.cost import Cost
from egrpo_fast.config import Config, LoraConfig, ModelConfig, load_config
from egrpo_fast.config.recipe_files import recipe_names
from egrpo_fast.models.flux.backbone import FluxBackbone
from egrpo_fast.models.folder import configs_of
from egrpo_fast.models.lora import save_lora
from egrpo_fast.models.protocol import families
from egrpo_fast.models.random import make_pipeline
from egrpo_fast.models.sizes import Sizes
from egrpo_fast.models.vae import decoder_width
from egrpo_fast.rewards import NAMES, make_reward, parameters
from egrpo_fast.shapes import PIPELINE

FLUX_DEV = "black-forest-labs/FLUX.1-dev"
RECIPES = [name for name in recipe_names() if name not in ("shapes", "flux-dev")]


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside that are alive, now and at most."""

    def __init__(self, known=()):
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def _drop(self, key):
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._drop, storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small FLUX pipeline's configs; no weights."""
    return small_configs(tmp_path_factory.mktemp("small"))


def small_configs(folder, **transformer):
    pipeline = make_pipeline("flux-dev", "small")
    # The shape of FLUX's: its channels double twice.
    vae = dict(pipeline.vae.config) | {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 2}
    AutoencoderKL.from_config(vae).save_config(folder / "vae")
    for part in ("text_encoder", "text_encoder_2"):
        getattr(pipeline, part).config.save_pretrained(folder / part)
    config = dict(pipeline.transformer.config) | transformer
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return folder


def settings_of(folder, height=256, width=256, tokens=64, dtype="float32"):
    return ModelConfig(path=str(folder), height=height, width=width, max_sequence_length=tokens, dtype=dtype)


def made(sizes, dtype=torch.float32):
    """The transformer that was counted, with weights."""
    return FluxTransformer2DModel.from_config(sizes.transformer.config).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_other_decoders_activations(dtype):
    double = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    flux2 = AutoencoderKLFlux2(**double, block_out_channels=(16, 32, 64, 64), norm_num_groups=8)
    for vae, shape, family in (
        (flux2, (2, 32, 16, 12), "Flux2Pipeline"),
        (AutoencoderKLQwenImage(base_dim=16), (2, 16, 1, 16, 12), "QwenImagePipeline"),
        (AutoencoderKLQwenImage21(base_dim=16, decoder_base_dim=24), (2, 64, 1, 8, 6), "QwenImage21Pipeline"),
    ):
        vae.to(dtype).eval()
        with torch.no_grad(), LiveBytes(vae.parameters()) as live:
            vae.decode(torch.randn(shape, dtype=dtype), return_dict=False)
        unit = 2 * 128 * 96 * decoder_width(vae.config) * dtype.itemsize
        assert families()[family].units.decode * unit == pytest.approx(live.peak, rel=0.15)


def evaluate(transformer, sizes, rows):
    """By the family's own code, on the CPU."""
    model = getattr(transformer, "module", transformer)  # what DeepSpeed's engine wraps
    shapes = sizes.backbone._text.shapes.items()
    conditioning = {name: torch.randn(rows, *shape, dtype=model.dtype) for name, shape in shapes}
    backbone = copy.copy(sizes.backbone)
    backbone._image_ids = torch.zeros(backbone.latent_shape[0], 3)
    latents = torch.randn(rows, *backbone.latent_shape, dtype=model.dtype)
    return backbone.velocity(transformer, latents, 0.5, conditioning, torch.arange(rows))


# --- counts ----------------------------------------------------------------------------------------------------------


def test_flux_dev_is_what_the_paper_notes_say():
    estimate = Cost(load_config("flux-dev"), Cluster(8))
    assert estimate.parameters == 11_901_408_320
    assert estimate.flops["evaluation"] == pytest.approx(37.28e12, rel=1e-3)
    assert estimate.flops["attention"] == pytest.approx(4.5e12, rel=0.02)
    total = sum(estimate.flops[part] for part in ("rollout", "update", "decode"))
    assert total == pytest.approx(39e15, rel=0.02)
    assert estimate.flops["rollout"] / total == pytest.approx(0.97, abs=0.02)


KNOWN = {
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "black-forest-labs/FLUX.2-dev": 32_223_281_152,
    "black-forest-labs/FLUX.2-klein-4B": 3_875_544_576,
    "black-forest-labs/FLUX.2-klein-9B": 9_078_581_248,
    "black-forest-labs/FLUX.2-klein-base-4B": 3_875_544_576,
    "black-forest-labs/FLUX.2-klein-base-9B": 9_078_581_248,
    "Qwen/Qwen-Image": 20_430_401_088,
    "Qwen/Qwen-Image-2.1": 7_115_124_736,
    "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520,
    "stabilityai/stable-diffusion-3.5-large": 8_056_627_520,
    "Tongyi-MAI/Z-Image": 6_154_908_736,
    "Tongyi-MAI/Z-Image-Turbo": 6_154_908_736,
}
"""Parameters of the transformers of known models."""


def test_known_models_are_counted_without_a_network():
    rooms = Path(cost.__file__).parents[1] / "models"
    assert {f"{file.parent.name}/{file.stem}" for file in rooms.glob("*/configs/*/*.json")} == KNOWN.keys()
    counted = {path: Sizes(ModelConfig(path=path, height=1024, width=1024)).parameters for path in KNOWN}
    assert counted == KNOWN


def test_guidance_costs_a_second_evaluation():
    """None at the scale without it; the negative half has no backward where it is not trained."""
    settings = ["model.path=stabilityai/stable-diffusion-3.5-medium", "model.height=512", "model.width=512"]

    def estimate(*more):
        return Cost(load_config("flux-dev", [*settings, *more]), Cluster(8))

    guided, plain = estimate(), estimate("model.guidance_scale=1")
    assert guided.flops["evaluation"] == pytest.approx(2 * plain.flops["evaluation"], rel=1e-6)
    assert guided.flops["update"] == pytest.approx(2 * plain.flops["update"], rel=1e-6)
    half = estimate("model.guidance.train=conditional")
    forward = guided.flops["evaluation"] * guided.plan.trained_states
    assert half.flops["update"] == pytest.approx(forward + (guided.flops["update"] - forward) / 2, rel=1e-6)
    tried = (guided, plain, estimate("model.guidance.calls=2"))
    rollouts = [one.memory.phases["rollout"]["activations"] for one in tried]
    assert rollouts == [2 * rollouts[1], rollouts[1], rollouts[1]]
    update = "update"
    assert guided.memory.phases[update]["activations"] == 2 * plain.memory.phases[update]["activations"]
    assert half.memory.phases[update]["activations"] == plain.memory.phases[update]["activations"]


@pytest.mark.parametrize(
    ("rank", "targets"),
    [
        (4, ["to_q", "to_k", "to_v", "to_out.0"]),
        (3, ["proj_out", "net.2", "linear", "add_k_proj"]),
        (2, ["x_embedder"]),
    ],
)
def test_adapters_are_counted_as_peft_makes_them(rank, targets, folder):
    import peft

    sizes = Sizes(settings_of(folder))
    model = made(sizes).requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=rank, target_modules=targets))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    lora = LoraConfig(rank=rank, target_modules=targets)
    assert sizes.adapters(lora) == trained > 0


def test_a_plan_follows_the_lora_that_a_run_would_start_from(tmp_path):
    layers = [
        f"transformer_blocks.{block}.attn.to_q.lora_{which}.default.weight" for block in range(19) for which in "AB"
    ]
    adapters = {name: torch.zeros((5, 3072) if "_A." in name else (3072, 5)) for name in layers}
    save_lora(tmp_path, adapters, LoraConfig(rank=5, target_modules=["to_q"]), FluxPipeline)
    config = load_config("flux-dev-lora-8x24gb", [f"model.lora.path={tmp_path}"])
    assert Cost(config, Cluster(8)).adapters == 19 * 5 * 2 * 3072
    with pytest.raises(ValueError, match="model.lora.path: no file or folder /nowhere"):
        Cost(load_config("flux-dev-lora-8x24gb", ["model.lora.path=/nowhere"]), Cluster(8))
    tight = Cost(config, Cluster(1, 1, "RTX4090"))
    assert not tight.fits and tight.advice, "advice is for the adapters of the file, too"


def test_frozen_parts_of_flux_dev():
    """Parameters as the published files have them: VAE, CLIP-L, T5-XXL, of which the embedding is never quantized."""
    vae, clip, t5, embedding = 83_819_683, 123_060_480, 4_762_310_656, 32_128 * 4096
    for how, bits in (("none", 16), ("int8", 8), ("nf4", 4.5)):
        model = ModelConfig(path=FLUX_DEV, text_encoder_quantization=how)
        text = 2 * (clip + embedding) + (t5 - embedding) * bits / 8
        assert FluxBackbone.frozen_bytes(configs_of(FLUX_DEV), model) == {"VAE": 2 * vae, "text encoders": text}


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("clip", {"model": "ViT-B-32"}, 151_277_313),
        ("clip/large", {"model": "ViT-L-14"}, 427_616_513),
        ("hps", {}, 986_109_441),
        ("jpeg", {}, 0),
        ("http/hps", {"reward": "hps"}, 0),
        ("shapes_soft", {}, 0),
        ("clip", {"model": "no such model"}, None),
        ("clip", {"model": "hf-hub:some/model"}, None),
        ("clip", {"model": "local-dir:/nowhere"}, None),
        ("clip", {}, None),
        ("json:dumps", {}, None),
    ],
)
def test_parameters_of_rewards(name, options, count):
    """What cannot be counted here, be it for want of a network, is None; the plan says so and goes on."""
    assert parameters(name, options) == count


def test_pick_score_is_as_large_as_open_clips_model():
    assert parameters("pick_score", {}) == parameters("clip", {"model": "ViT-H-14"})


def test_the_embedded_clip_is_counted_from_its_folder():
    judge = make_reward("clip", {"model": "shapes"})
    assert parameters("clip", {"model": "shapes"}) == sum(p.numel() for p in judge.network.parameters())


def test_a_reward_is_one_file():
    """Each has its own module, which says how large it is; and no code of a stranger's runs to find that out."""
    for name in NAMES:
        reward = import_module(f"egrpo_fast.rewards.{name}").REWARD
        assert reward.__module__ == f"egrpo_fast.rewards.{name}" and callable(reward.parameters)


def test_a_local_folder_is_counted_from_its_configs():
    sizes = Sizes(load_config("shapes").model)
    loaded = FluxPipeline.from_pretrained(PIPELINE)
    assert sizes.parameters == loaded.transformer.num_parameters()
    text = loaded.text_encoder.num_parameters() + loaded.text_encoder_2.num_parameters()
    assert sizes.frozen == {"VAE": 4 * loaded.vae.num_parameters(), "text encoders": 4 * text}


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def test_flops_of_an_evaluation_and_of_decoding(folder):
    """On the meta device as on the CPU; and attention's share by its formula."""
    sizes = Sizes(settings_of(folder, 128, 64, 24))
    model, tokens = made(sizes), sizes.backbone.latent_shape[0]
    # The counter does not know the CPU's fused attention in every version of torch; it always knows matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        evaluate(model, sizes, 2)
    found, attention = sizes.evaluation_flops
    assert 2 * found == pytest.approx(counter.get_total_flops(), rel=0.01)
    blocks, width = len(FluxBackbone.blocks(model)), model.inner_dim
    assert attention == 4 * (tokens + 24) ** 2 * width * blocks < found
    vae = AutoencoderKL.from_config(sizes.backbone._vae.config)
    for dtype in (torch.float32, torch.bfloat16):
        vae.to(dtype)
        latents = torch.randn(2, 16, 16, 8, dtype=dtype)
        with torch.no_grad(), LiveBytes(vae.parameters()) as live:
            vae.decode(latents, return_dict=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            vae.decode(latents, return_dict=False)
        assert 2 * sizes.decode_flops == counter.get_total_flops()
        decode = FluxBackbone.units.decode * 128 * 64 * decoder_width(vae.config) * dtype.itemsize
        assert 2 * decode == pytest.approx(live.peak, rel=0.15)


# --- memory ----------------------------------------------------------------------------------------------------------


BOTH = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]  # a CPU is slow in bfloat16


@pytest.mark.parametrize("dtype", BOTH, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["sd3", "flux2-klein-base", "qwen-image", "qwen-image-2.1", "z-image"])
def test_activations_of_every_family(kind, dtype, tmp_path):
    """Measured peaks of a forward, and of a forward and backward with and without checkpointing."""
    make_pipeline(kind, "small").save_pretrained(tmp_path)
    scale = {"guidance_scale": 0.0 if kind == "z-image" else 1.0}
    sizes = Sizes(settings_of(tmp_path, 320, 256, 64, str(dtype)[6:]).model_copy(update=scale))
    ours, rows = sizes.activations, 2
    model = sizes.family.mended(type(sizes.transformer).from_config(sizes.transformer.config)).to(dtype)
    backbone, where = copy.copy(sizes.backbone), torch.arange(2)
    if hasattr(backbone, "_image_ids"):
        backbone._image_ids = torch.zeros(backbone._image_ids.shape)
    shapes = {name: shape for name, shape in backbone._text.shapes.items() if name != "mask"}
    text = {name: torch.randn(rows, *shape, dtype=dtype) for name, shape in shapes.items()}
    latents = torch.randn(rows, *backbone.latent_shape, dtype=dtype)
    backbone.predict(model, latents, 0.5, text, where)  # tables of positions are made once
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *(parameter.grad for parameter in model.parameters()), *model.buffers()]
    with torch.no_grad(), LiveBytes(known) as live:
        backbone.predict(model, latents, 0.5, text, where)
    assert rows * ours.forward == pytest.approx(live.peak, rel=0.15)
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        with LiveBytes(known) as live:
            backbone.predict(model, latents, 0.5, text, where).float().square().mean().backward()
        assert rows * ours.update(checkpointing) == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "axes", "blocks", "rows", "image", "text"),
    [
        (4, 32, (8, 12, 12), (2, 4), 2, (256, 256), 64),
        pytest.param(2, 128, (16, 56, 56), (1, 6), 3, (320, 160), 128, marks=pytest.mark.slow),
        pytest.param(6, 64, (16, 24, 24), (4, 3), 1, (512, 256), 32, marks=pytest.mark.slow),
    ],
)
def test_activations(heads, head_dim, axes, blocks, rows, image, text, dtype, tmp_path):
    """Measured peaks of a forward, and of a forward and backward with and without checkpointing."""
    config = {
        "num_attention_heads": heads, "attention_head_dim": head_dim, "axes_dims_rope": axes,
        "num_layers": blocks[0], "num_single_layers": blocks[1],
    }  # fmt: skip
    sizes = Sizes(settings_of(small_configs(tmp_path, **config), *image, text, str(dtype)[6:]))
    ours, model = sizes.activations, made(sizes, dtype)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *(parameter.grad for parameter in model.parameters())]
    with torch.no_grad(), LiveBytes(known) as live:
        evaluate(model, sizes, rows)
    assert rows * ours.forward == pytest.approx(live.peak, rel=0.15)
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        with LiveBytes(known) as live:
            evaluate(model, sizes, rows).float().square().mean().backward()
        assert rows * ours.update(checkpointing) == pytest.approx(live.peak, rel=0.15)


def small_run(folder, stage, dtype, checkpointing):
    """A recipe of two prompts' rows that a `small` FLUX can take."""
    return load_config(
        "flux-dev",
        [
            f"model.path={folder}",
            "model.height=256", "model.width=256", "model.max_sequence_length=64", f"model.dtype={dtype}",
            f"model.gradient_checkpointing={checkpointing}", "prompts.per_iteration=2", "rollout.prompts_per_rollout=2",
            f"deepspeed.zero_stage={stage}", "deepspeed.overrides={zero_optimization: {reduce_bucket_size: 1000000}}",
        ],
    )  # fmt: skip


def measure_a_step(folder, stage, dtype, checkpointing):
    """Live bytes of a second training step under DeepSpeed on one CPU rank: before it, in its update, in its step."""
    import deepspeed

    from egrpo_fast.distributed.engine import deepspeed_config
    from egrpo_fast.distributed.world import World

    config = small_run(folder, stage, dtype, checkpointing)
    sizes, world = Sizes(config.model), World()
    with LiveBytes() as live:
        model = made(sizes, getattr(torch, dtype))
        if checkpointing:
            model.enable_gradient_checkpointing()
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(model.parameters(), 1e-3), config=deepspeed_config(config)
        )
        told = {}
        for _ in range(2):  # the first step makes the optimizer's state
            told["standing"] = live.live
            for phase, run in {
                "update": lambda: engine.backward(evaluate(engine, sizes, 2).float().square().mean()),
                "optimizer step": engine.step,
            }.items():
                live.peak = live.live
                run()
                told[phase] = live.peak
    world.close()
    print(json.dumps(told))


@pytest.mark.parametrize(
    ("stage", "dtype", "checkpointing"),
    [
        (3, "bfloat16", False),
        pytest.param(2, "bfloat16", True, marks=pytest.mark.slow),
        pytest.param(3, "bfloat16", True, marks=pytest.mark.slow),
        pytest.param(3, "float32", False, marks=pytest.mark.slow),
        pytest.param(2, "bfloat16", False, marks=pytest.mark.slow),
        pytest.param(1, "bfloat16", True, marks=pytest.mark.slow),
    ],
)
def test_memory_of_training_steps_under_deepspeed(folder, stage, dtype, checkpointing):
    """Weights, gradients, optimizer and activations of real steps, each within 15%."""
    from egrpo_fast.distributed.world import free_port

    command = [sys.executable, __file__, str(folder), str(stage), dtype, str(checkpointing)]
    environment = {**os.environ, "MASTER_PORT": str(free_port())}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-2000:]
    measured = json.loads(result.stdout.strip().splitlines()[-1])
    memory = Cost(small_run(folder, stage, dtype, checkpointing), Cluster(1, 1, "cpu")).memory
    standing = ("weights", "gradients", "master weights", "optimizer moments", "reduction bucket")
    loaded = sum(memory.always[part] for part in standing)
    if stage == 3:  # below, gradients are made by the first backward and go with the step
        assert loaded == pytest.approx(measured["standing"], rel=0.01)
    kept = memory.phases["update"]["images' latents"]  # no rollout came before this step
    for phase, parts in (("update", memory.phases["update"]), ("optimizer step", memory.phases["optimizer step"])):
        predicted = loaded + sum(parts.values()) - (kept if phase == "update" else 0)
        assert predicted == pytest.approx(measured[phase], rel=0.15), phase


# --- the estimate ----------------------------------------------------------------------------------------------------


def flux(*overrides, cluster=Cluster(8)):  # noqa: B008 - it is frozen
    return Cost(load_config("flux-dev", overrides), cluster)


def test_partitions_shrink_with_ranks():
    overrides = ("prompts.per_iteration=16",)
    one, sixteen = flux(*overrides, cluster=Cluster(1)).memory, flux(*overrides, cluster=Cluster(16, 2)).memory
    for part in ("weights", "gradients", "master weights", "optimizer moments"):
        assert sixteen.always[part] == pytest.approx(one.always[part] / 16)
    assert one.always["weights"] == 2 * 11_901_408_320
    assert flux("deepspeed.zero_stage=2").memory.always["weights"] == one.always["weights"]


def test_what_saves_memory_does():
    peak = flux().memory.peak
    for change in (
        "rollout.parameters=sharded", "rollout.max_rows_per_call=1", "optimizer.name=adamw8bit",
        "prompts.embeddings=folder",
        "deepspeed.offload_optimizer=cpu", "model.lora={rank: 8}", "model.text_encoder_quantization=nf4",
    ):  # fmt: skip
        assert flux(change).memory.peak < peak, change
    update = flux().memory.totals["update"]
    assert flux("model.gradient_checkpointing=false").memory.totals["update"] > update + 10 * GIB
    assert flux("optimizer.ema_decay=0.99").memory.peak > peak
    offloaded = flux("deepspeed.offload_optimizer=cpu").memory
    assert offloaded.host["master weights"] + offloaded.host["optimizer moments"] == 12 * 11_901_408_320 / 8


@pytest.mark.parametrize(
    ("changes", "per_weight"),
    [
        ((), 12),
        (("optimizer.ema_decay=0.99",), 16),
        (("optimizer.name=adamw8bit",), 4 + 2 + 2 * 4 / 256),
        (("deepspeed.offload_optimizer=nvme", "deepspeed.nvme_path=folder"), 12),
    ],
)
def test_a_checkpoint_is_copied_to_host_memory_by_each_rank_and_kept_on_the_disk(changes, per_weight):
    estimate = flux("checkpoint.save_total_limit=3", "checkpoint.best=clip", *changes)
    assert estimate.checkpoint == pytest.approx(per_weight * 11_901_408_320)
    assert estimate.memory.host["copy of a checkpoint"] == pytest.approx(estimate.checkpoint / 8)
    assert estimate.checkpoints_on_disk == 5
    adapters = flux("model.lora={rank: 8}", *changes)
    assert adapters.checkpoint == pytest.approx(per_weight * adapters.trained) and adapters.trained < 10**8


def test_the_plan_tells_host_memory_by_machine_and_the_checkpoints(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["egrpo", "plan", "flux-dev-32gpu", "--gpus", "32", "--nodes", "4"])
    cli.main()
    told = capsys.readouterr().out
    host = Cost(load_config("flux-dev-32gpu"), Cluster(32, 4)).memory.host
    assert f"host memory per machine {8 * sum(host.values()) / GIB:.3g} GiB; per GPU: " in told
    assert "copy of a checkpoint 4.16" in told
    assert "a checkpoint 133 GiB; at most 3 on the disk at once, 399 GiB" in told


def test_gathered_weights_are_received_once():
    gathered, sharded = flux(), flux("rollout.parameters=sharded")
    assert gathered.traffic["rollout"] == 2 * 11_901_408_320 * 7 / 8
    assert sharded.traffic["rollout"] == sharded.calls * gathered.traffic["rollout"]
    assert sharded.calls == sum(-(-rows // 8) for rows in (1, 13, 25, 25, 37, 49, 61, 61, 72, 84, *[96] * 6))


def test_advice_fits():
    """What alone suffices is told by itself; else changes that suffice together."""
    tight = flux(cluster=Cluster(8, 1, "RTX4090"))
    assert not tight.fits
    (together,) = tight.advice
    assert together["fits"] and len(together["settings"]) > 1
    assert together["peak"] <= tight.cluster.gpu.memory
    near = flux("model.gradient_checkpointing=false", "prompts.per_iteration=16", "rollout.prompts_per_rollout=2")
    assert not near.fits and near.advice[0]["settings"] == {"model.gradient_checkpointing": True}
    assert not flux().advice


def test_advice_knows_what_helps_only_together():
    """On one GPU sharded rollouts save nothing, and weights on the host nothing while a rollout gathers them all."""
    alone = {"cluster": Cluster(1, 1, "RTX4090")}
    for sharded, settings in (("gathered", []), ("sharded", ["rollout.parameters=sharded"])):
        lora = flux("model.lora={rank: 8}", *settings, **alone)
        assert not flux("model.lora={rank: 8}", *settings, "deepspeed.offload_param=cpu", **alone).fits or settings
        (told,) = lora.advice[:1]
        assert told["fits"] and told["settings"]["deepspeed.offload_param"] == "cpu"
        assert ("rollout.parameters" in told["settings"]) == (sharded == "gathered")
        assert "model.lora" not in told["settings"], "there is one"
    (whole,) = flux(**alone).advice
    assert whole["fits"] and whole["settings"] == {
        "rollout.parameters": "sharded", "deepspeed.offload_optimizer": "cpu", "deepspeed.offload_param": "cpu",
    }  # fmt: skip


OWN = "L40S={memory: 44, tflops: 362, bandwidth: 864, link: 32}"


def test_a_gpu_of_ones_own_numbers(monkeypatch, capsys):
    assert parse_gpu(OWN) == ("L40S", Gpu(362e12, 44 * GIB, 864e9, 32e9))
    monkeypatch.setattr(sys, "argv", ["egrpo", "plan", "flux-dev", "--gpu", OWN, "--json"])
    cli.main()
    told = json.loads(capsys.readouterr().out)["cost"]
    assert told["cluster"]["gpu"] == "L40S" and told["cluster"]["memory"] == 44 * GIB and told["memory"]["advice"]


@pytest.mark.parametrize(
    ("gpu", "told"),
    [
        ("L40S", "'L40S' is unknown; there are A100, .*numbers: L40S={tflops: N, memory: N, bandwidth: N, link: N}"),
        ("L40S={memory: 44}", "L40S={tflops: N, memory: N, bandwidth: N, link: N} is needed, not '{memory: 44}'"),
        (OWN.replace("44", "0"), "memory: 0 is no number above 0"),
        (OWN.replace("44", "many"), "memory: 'many' is no number above 0"),
        (OWN.replace("44", "true"), "memory: True is no number above 0"),
        ("L40S={", "not YAML"),
    ],
)
def test_gpus_that_cannot_be(gpu, told):
    with pytest.raises(ValueError, match=f"^--gpu: {told}"):
        parse_gpu(gpu)
    with pytest.raises(ValueError, match="--gpu: 'L40S' is unknown"):
        Cluster(1, 1, "L40S")


@pytest.mark.parametrize("path", ["/no/such/folder", "./flux", "flux", "~/nothing/here", "a/b/c"])
def test_a_model_that_is_not_there_is_not_planned_for(path):
    with pytest.raises(ValueError, match="model.path: no folder "):
        Cost(load_config("flux-dev", [f"model.path={path}"]), Cluster(8))


def test_a_hub_id_is_asked_for_its_configs_alone(monkeypatch):
    asked = []

    def download(path, allow_patterns):
        asked.append((path, allow_patterns))
        return configs_of(FLUX_DEV)

    monkeypatch.setattr("egrpo_fast.models.folder.snapshot_download", download)
    assert Sizes(ModelConfig(path="owner/name")).parameters == 11_901_408_320
    assert Sizes(ModelConfig(path=FLUX_DEV)).parameters == 11_901_408_320
    assert asked == [("owner/name", ["model_index.json", "*/config.json", "scheduler/*"])]


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        (
            "schedule.num_steps=1000 rollout.group_size=65536",
            "schedule.num_steps, rollout.group_size, schedule.active_",
        ),
        pytest.param(
            "method=flow_grpo schedule.num_steps=1000 rollout.group_size=65536",
            "schedule.num_steps, rollout.group_size: ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_plan_larger_than_memory_is_refused_by_its_settings(overrides, fields, monkeypatch):
    monkeypatch.setattr("egrpo_fast.plan.MOST_EDGES", 100_000)  # the same refusal, sooner
    monkeypatch.setattr(sys, "argv", ["egrpo", "plan", "shapes", *overrides.split()])
    with pytest.raises(SystemExit, match=f"^error: {fields}.*more than 100,000 steps of samples"):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "3"], "prompts.per_iteration: 8 is not a multiple of 3 GPUs"),
        (["--gpus", "8", "--nodes", "3"], "--nodes: 8 GPUs cannot be spread evenly over 3 machines"),
    ],
)
def test_clusters_that_cannot_be(arguments, told, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["egrpo", "plan", "flux-dev", *arguments])
    with pytest.raises(SystemExit, match=re.escape(told)):
        cli.main()


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=f"model.path: {tmp_path} has no model_index.json"):
        Sizes(settings_of(tmp_path))
    small_configs(tmp_path)
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model.path: .* cannot be read as a FluxPipeline: KeyError"):
        Sizes(settings_of(tmp_path))
    (tmp_path / "transformer" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="model.path: .* describes no transformer"):
        Sizes(settings_of(tmp_path))


def test_json_holds_the_schedule_and_the_cost(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["egrpo", "plan", "shapes", "--json", "--gpu", "cpu"])
    cli.main()
    told = json.loads(capsys.readouterr().out)
    assert told["work"]["model_calls"] == 16 and told["cost"]["parameters"]["total"] == 1_338_448
    assert told["cost"]["memory"]["fits"] and not told["cost"]["memory"]["unknown_rewards"]
    assert told["cost"]["cluster"]["gpus"] == 1


def test_moments_in_8_bits():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.randn(1 << 16))
    optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=1e-3)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    measured = sum(state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2"))
    eight, full = (flux(f"optimizer.name={name}").memory.always["optimizer moments"] for name in ("adamw8bit", "adamw"))
    assert eight / full == pytest.approx(measured / (8 * weight.numel()), rel=0.01)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_state_their_estimate(recipe, monkeypatch, capsys):
    """The comment on top of a recipe is what the command in it prints; and the recipe fits."""
    comment = (Path(cost.__file__).parents[1] / "recipes" / f"{recipe}.yaml").read_text()
    command = re.search(r"^#   (egrpo plan .*)$", comment, re.MULTILINE).group(1)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    cli.main()
    summary = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"# {summary}\n" in comment and "does not fit" not in summary
    config: Config = load_config(recipe)
    assert "clip" in {reward.name for reward in config.rewards}


if __name__ == "__main__":
    measure_a_step(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "True")
