"""Quantized weights under LoRA: the layers, how they are loaded, what they take, and whole runs.

Started with a folder, a kind and a number of ranks, this file is what the processes of a run execute.
"""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from egrpo_fast import noise
from egrpo_fast.commands.cluster import Cluster
from egrpo_fast.commands.cost import Cost
from egrpo_fast.config import CHECKPOINTS, load_config
from egrpo_fast.distributed.checkpoint import CheckpointReader
from egrpo_fast.distributed.world import free_port
from egrpo_fast.models.fingerprint import identity
from egrpo_fast.models.quantization import FrozenLinear, nbytes, quantization_config, quantize_layers, weight_takers
from egrpo_fast.models.random import make_pipeline
from egrpo_fast.models.transformer import meta_transformer
from egrpo_fast.policy import Policy
from egrpo_fast.runs.export import find_checkpoint

CPU = torch.device("cpu")
KINDS = ["nf4", "int8", "float8"]
SHARE = {"nf4": 0.1, "int8": 0.01, "float8": 0.04}
"""Root mean square error of a weight, as a share of its own, at most: of normal ones about 0.09, 0.005 and 0.025."""


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    """diffusers refuses to quantize by bitsandbytes where there is no GPU, although bitsandbytes itself does not."""
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)


PROMPTS = ["a café at night", "two dogs that chase a red kite over the sea in the snow", "rain", "an old map"]
SETTINGS = [
    "model.lora={rank: 4, alpha: 16}", "model.height=48", "model.width=80", "model.max_sequence_length=64",
    "model.guidance_scale=null", "prompts.per_iteration=2", "schedule.num_steps=4", "schedule.shift=auto",
    "schedule.active_steps=[0, 1]", "rollout.group_size=2", "evaluation.num_inference_steps=3",
    "evaluation.num_prompts=3", "checkpoint.every=1", "iterations=2", "optimizer.lr=1e-2", "optimizer.warmup_steps=0",
    f"prompts.train={json.dumps(PROMPTS)}", f"prompts.held_out={json.dumps(PROMPTS)}",
    "rewards=[{name: jpeg}]", "deepspeed.zero_stage=2",
]  # fmt: skip


def settings(folder, kind, *overrides):
    return load_config("shapes", [f"model.path={folder}", f"model.quantization={kind}", *SETTINGS, *overrides])


def from_pretrained(transformer_class, folder, kind):
    """As users of diffusers load a quantized transformer, but on the CPU."""
    how = quantization_config(kind, torch.float32)
    place = {"device_map": {"": "cpu"}} if kind == "nf4" else {}  # it is bitsandbytes' default to go to a GPU
    return transformer_class.from_pretrained(
        folder / "transformer", quantization_config=how, torch_dtype=torch.float32, **place
    )


def dequantized(weight):
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(weight, "quant_state", None)
    return dequantize_4bit(weight.data, state) if state else weight.dequantize()


def layers_of(transformer):
    """The quantized ones, by name in the files."""
    named = ((name, module) for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    return {name.removesuffix(".base_layer"): module for name, module in named if ".lora_" not in name}


def filled(kind, layers, dtype):
    """A stack of these layers, quantized."""
    stack = nn.Sequential(*(nn.Linear(layer.in_features, layer.out_features, device="meta") for layer in layers))
    stack.config = SimpleNamespace()  # where diffusers notes how it is quantized
    quantize_layers(stack, quantization_config(kind, dtype))
    takers = weight_takers(stack, CPU)
    for name, value in nn.Sequential(*layers).to(dtype).named_parameters():
        place, leaf = name.split(".")
        takers[name](value) if leaf == "weight" else setattr(stack[int(place)], leaf, nn.Parameter(value.detach()))
    return stack.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_linear_in_what_its_bits_stand_for(kind, dtype):
    """Forward and gradient against float64; a row is the same beside others, and without gradient."""
    torch.manual_seed(0)
    (layer,) = filled(kind, [original := nn.Linear(192, 80)], dtype)
    weight, error = dequantized(layer.weight), 4 * torch.finfo(dtype).eps  # of the sum of all terms' magnitudes
    apart = (weight - original.weight.to(dtype)).float().square().mean().sqrt() / original.weight.square().mean().sqrt()
    assert SHARE[kind] / 10 < apart < SHARE[kind]
    x = torch.randn(3, 7, 192, dtype=dtype, requires_grad=True)
    out, gradient = layer(x), torch.randn(3, 7, 80, dtype=dtype)
    out.backward(gradient)
    for found, given, matrix, more in ((out, x.detach(), weight.T, layer.bias), (x.grad, gradient, weight, 0.0)):
        exact = given.double() @ matrix.double() + more
        magnitude = (given.abs().double() @ matrix.abs().double()).max()
        assert found.dtype == dtype and (found - exact).abs().max() < error * magnitude
    for training in (False, True):
        with torch.no_grad():
            torch.testing.assert_close(layer.train(training)(x.detach()[1:2]), out[1:2], rtol=error, atol=error)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_no_dequantized_weight_is_kept_for_the_backward(kind):
    """A tensor that autograd keeps has a weight's size in a plain layer that torchao quantized, and none has here."""

    def largest(stack):
        kept = []
        hooks = (lambda some: kept.append(some.numel()) or some), (lambda some: some)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            stack(torch.randn(2, 64, requires_grad=True)).sum().backward()
        return max(kept, default=0)

    stack = filled(kind, [nn.Linear(64, 64), nn.Linear(64, 64)], torch.float32)
    assert largest(stack) < 64 * 64
    for layer in stack:
        assert type(layer) is FrozenLinear
        layer.__class__ = nn.Linear
    assert largest(stack) == 64 * 64


def test_the_layout_that_loses_gradients_is_not_taken(monkeypatch):
    """On a CPU with AVX512-BF16 a forward without gradient would pack the weights, and every later one lose them."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    packed = []
    convert = "bitsandbytes.nn.modules._convert_weight_packed_for_cpu"
    monkeypatch.setattr(convert, lambda data, state: packed.append(data) or (data, state))
    stack, x = filled("nf4", [nn.Linear(64, 64)], torch.float32).eval(), torch.randn(2, 64)
    stack(x)
    assert not packed
    stack[0].support_avx512bf16_for_cpu = True
    stack(x)
    assert packed, "bitsandbytes does so by itself"


FAMILIES = ["flux-dev", "flux2-klein", "sd3", "qwen-image", "z-image"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformer_takes_what_the_plan_says_and_is_near_the_original(family, kind, tmp_path):
    """The same layers, bits and scales as diffusers' own loader makes; the base's fingerprint stays that of its files.

    Bytes of every part equal to the plan's.
    """
    make_pipeline(family).save_pretrained(tmp_path)
    config = settings(tmp_path, kind)
    policies = {
        name: Policy(config.model.model_copy(update={"quantization": name}), tmp_path) for name in ("none", kind)
    }
    began = identity(tmp_path)
    for policy in policies.values():
        policy.load(CPU)
    assert identity(tmp_path) == began
    whole, quantized = (policies[name].transformer for name in ("none", kind))
    layers = layers_of(quantized)
    assert layers.keys() == layers_of(whole).keys()

    theirs = from_pretrained(policies[kind]._family.transformer_class, tmp_path, kind)
    for name, layer in layers.items():
        weight = theirs.get_submodule(name).weight
        assert type(weight) is type(layer.weight) and nbytes(weight) == nbytes(layer.weight)
        assert torch.equal(dequantized(weight), dequantized(layer.weight)), name

    always = Cost(config, Cluster(1)).memory.always
    taken = sum(nbytes(layer.weight) for layer in layers.values())
    assert always["quantized weights"] + always["their scales"] == taken
    assert always["weights"] == sum(parameter.nbytes for parameter in quantized.parameters())
    ids = {id(parameter) for parameter in quantized.parameters()}
    assert not ids.intersection(id(layer.weight) for layer in layers.values()), "what DeepSpeed would find"

    prompts = ["rain", "two dogs that chase a red kite"]
    x = noise.initial_noise(5, 0, torch.arange(2), policies[kind].latent_shape)
    with torch.no_grad():
        exact, found = (
            policy.velocity(policy.encode(prompts))(x, 0.7, torch.arange(2)) for policy in policies.values()
        )
    apart = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-4 < apart < 5 * SHARE[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_that_is_missing_is_named_before_anything_is_downloaded(kind, monkeypatch):
    from egrpo_fast.train import check_inputs

    package = "bitsandbytes" if kind == "nf4" else "torchao"
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    with pytest.raises(ValueError, match=f"^model.quantization: {kind} needs {package}; pip install 'egrpo_fast"):
        check_inputs(settings("nobody/has-this", kind))


class Live(TorchDispatchMode):
    """Bytes of all storages that were made or touched inside and are alive, at most."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {}

    def _drop(self, key):
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu"
            if plain and (storage := tensor.untyped_storage())._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._drop, storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return result


def load(world, heart, folder, kind, at_once=False):
    """A transformer in bfloat16 as every rank gets it: (live bytes at most, bytes that are kept, of a layer, of all).

    at_once: rank 0 reads all weights before the first is passed on.
    """
    from egrpo_fast.distributed.loading import materialize

    config = settings(folder, kind, "model.dtype=bfloat16")
    how = quantization_config(kind, torch.bfloat16)
    transformer, weights = meta_transformer(folder, config.model.lora, quantization=how)
    sizes = [2 * parameter.numel() for parameter in transformer.parameters()]
    with Live() as live:
        values = {name: weights(name).bfloat16() for name, _ in transformer.named_parameters()} if at_once else {}
        read = values.__getitem__ if at_once else weights
        materialize(transformer, read, config, world, heart, weight_takers(transformer, CPU))
    kept = sum(parameter.nbytes for parameter in transformer.parameters())
    kept += sum(nbytes(layer.weight) for layer in layers_of(transformer).values())
    return live.peak, kept, max(sizes), sum(sizes)


def main(folder, kind, ranks):
    from egrpo_fast.distributed.heartbeat import Heartbeat, group_store
    from egrpo_fast.distributed.world import World
    from egrpo_fast.train import check_inputs, make_trainer

    world = World()

    def train(name, *others):
        """Returns this rank's bytes by part, once it has trained."""
        config = settings(folder / "base", kind, f"output_dir={folder / name}", *others)
        trainer = make_trainer(config, world, heart, *check_inputs(config))
        assert trainer.train() == 0
        images = trainer.evaluate().images  # of all ranks, on rank 0
        if world.is_main:
            save_file({"images": images.contiguous()}, folder / f"{name}.safetensors")
        transformer = trainer.engine._engine.module
        layers, pieces = layers_of(transformer).values(), list(trainer.engine.state_shards())
        of = {kind: [piece.tensor.nbytes for piece in pieces if piece.kind == kind] for kind in ("weight", "exp_avg")}
        return {
            "weights": sum(parameter.nbytes for parameter in transformer.parameters()),
            "quantized": sum(nbytes(layer.weight) for layer in layers),
            "master weights": sum(of["weight"]),
            "optimizer moments": 2 * sum(of["exp_avg"]),
        }

    with Heartbeat(world.rank, world.size, group_store(), 300.0) as heart:
        loaded = load(world, heart, folder / "large", kind), load(world, heart, folder / "large", kind, at_once=True)
        parts = train("run")
        if world.is_main:
            shutil.copytree(folder / "run", folder / "resumed")
            shutil.rmtree(folder / "resumed" / CHECKPOINTS / "iteration-000002")
        world.broadcast(0)
        train("resumed", "resume=true")
    everything = world.gather((loaded, parts))
    if world.is_main:
        (folder / "told.json").write_text(json.dumps(everything))
    world.close()


RUNS = [
    ("flux-dev", "nf4", 1),
    *(pytest.param(one, marks=pytest.mark.slow) for one in (
        ("flux-dev", "nf4", 2), ("flux-dev", "int8", 1), ("flux-dev", "int8", 2), ("flux-dev", "float8", 2),
        ("z-image", "nf4", 1), ("z-image", "int8", 2), ("z-image", "float8", 1),
    )),
]  # fmt: skip


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: "-".join(map(str, run)))
def run(request, tmp_path_factory):
    """(family, kind, ranks, folder)"""
    family, kind, ranks = request.param
    folder = tmp_path_factory.mktemp(family)
    make_pipeline(family).save_pretrained(folder / "base")
    make_pipeline("flux-dev", "small").save_pretrained(folder / "large")
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **world}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), kind, str(ranks)], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    told = [process.communicate(timeout=1800)[0] for process in processes]
    assert not any(process.returncode for process in processes), told[0][-3000:]
    return family, kind, ranks, folder


def checkpoint(folder, name, iteration):
    """Adapters, their average and moments: (kind, name) -> tensor."""
    reader = CheckpointReader(find_checkpoint(folder / name, str(iteration)))
    return {(kind, name): reader.tensor(name, kind) for kind in reader.kinds() for name in reader.names(kind)}


def test_adapters_alone_are_trained_from_a_ratio_of_1_and_resumed_bit_by_bit(run):
    _, _, _, folder = run
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert len(trained) == 2
    for line in trained:
        assert line["log_ratio_before_update"] == 0.0 and line["grad_norm"] > 0 and line["skipped_steps"] == 0
        assert line["policy_mismatch"] < 1e-3
    before, after = (checkpoint(folder, "run", iteration) for iteration in (1, 2))
    resumed = checkpoint(folder, "resumed", 2)
    assert all(".lora_" in name and value.dtype == torch.float32 for (_, name), value in after.items())
    assert max((before[key] - after[key]).abs().max() for key in before if key[0] == "weight") > 1e-4
    assert after.keys() == resumed.keys() and all(torch.equal(after[key], resumed[key]) for key in after)


def test_no_rank_holds_the_whole_before_it_is_quantized(run):
    """At the peak of loading there is what is kept and some copies of a layer; the control reads all weights first."""
    *_, folder = run
    for loaded, _ in json.loads((folder / "told.json").read_text()):
        (peak, kept, layer, whole), (control, *_) = loaded
        assert peak < kept + 8 * layer < whole, "of a layer: the file's, what is passed on, torchao's in float32"
    (_, (control, _, _, whole)), _ = json.loads((folder / "told.json").read_text())[0]
    assert control > whole


def test_the_plan_knows_the_bytes_of_every_part(run):
    _, kind, ranks, folder = run
    told = [parts for _, parts in json.loads((folder / "told.json").read_text())]
    always = Cost(settings(folder / "base", kind), Cluster(ranks)).memory.always
    for parts in told:
        assert parts["quantized"] == always["quantized weights"] + always["their scales"]
        assert parts["weights"] == always["weights"]
    for part in ("master weights", "optimizer moments"):
        assert sum(parts[part] for parts in told) == pytest.approx(ranks * always[part])


def test_diffusers_draws_the_trainers_images_on_the_quantized_base(run):
    """With the LoRA that the run exported; on the base as it is in the folder they are near, and not the same."""
    family, kind, _, folder = run
    ours = load_file(folder / "run.safetensors")["images"]
    assert torch.equal(ours, load_file(folder / "resumed.safetensors")["images"])
    images = {}
    for name in (kind, "whole", "untrained"):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "base")
        if name != "whole":
            pipeline.transformer = from_pretrained(type(pipeline.transformer), folder / "base", kind)
        if name != "untrained":
            pipeline.load_lora_weights(folder / "run" / "pipeline")
        pipeline.set_progress_bar_config(disable=True)
        packed, rows = family == "flux-dev", torch.arange(3)
        start = noise.initial_noise(0, 0, rows, (15, 64) if packed else (16, 60), step=noise.EVALUATION)
        images[name] = pipeline(
            prompt=PROMPTS[:3], height=48, width=80, num_inference_steps=3, output_type="pt", max_sequence_length=64,
            latents=start if packed else start.unflatten(2, (6, 10)),
        ).images  # fmt: skip
    torch.testing.assert_close(ours, images[kind], rtol=0, atol=2e-4)
    for other in ("whole", "untrained"):
        assert (ours - images[other]).abs().max() > 1e-3, f"{other}: or the comparison shows nothing"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
