"""Export: what diffusers loads back is what was trained; whole or not there; a shard in memory at a time."""

import errno
import json
import os
import resource
import shutil
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from egrpo_fast import cli, noise, ops
from egrpo_fast.config import CHECKPOINTS, CONFIG_FILE, RUN_FILE, LoraConfig, load_config
from egrpo_fast.distributed.checkpoint import INDEX, CheckpointReader, Checkpoints, Piece, _read_sealed, _write_sealed
from egrpo_fast.models.fingerprint import identity
from egrpo_fast.models.flux.backbone import FluxBackbone
from egrpo_fast.models.flux.text import FluxTextEncoder
from egrpo_fast.models.random import make_pipeline
from egrpo_fast.models.transformer import meta_transformer
from egrpo_fast.plan import ode_plan
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.runs import export as module
from egrpo_fast.runs.export import export, find_checkpoint
from egrpo_fast.schedule import make_schedule

LORA = "model.lora={rank: 4, alpha: 16, target_modules: [to_q, to_v, proj_out]}"
CARD = """---
license: other
license_name: flux-1-dev-non-commercial-license
license_link: LICENSE.md
tags: [text-to-image]
---
# The base
"""
PROMPTS = ["a café at night", "two dogs"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "flux"
    make_pipeline("flux-dev").save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE.md").write_text("No commerce.")
    return folder


def trained(base, lora=None, iteration=1, kind="weight"):
    """Weights that a run could have come to: of all parameters, or of the adapters."""
    transformer, weights = meta_transformer(base, lora)
    generator = torch.Generator().manual_seed(iteration + 1000 * (kind == "ema"))
    return {
        name: weights(name) + 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in transformer.named_parameters()
        if value.requires_grad
    }


def save(run, base, iterations, kinds=("weight",), lora=None, best=(), ranks=2, keep=9):
    """Checkpoints as that many ranks write them, each tensor in two pieces."""
    writers = [Checkpoints(run / CHECKPOINTS, rank, ranks, keep) for rank in range(ranks)]
    for iteration in iterations:
        tensors = {kind: trained(base, lora, iteration, kind) for kind in kinds}
        for rank, writer in enumerate(writers):
            pieces = []
            for kind, named in tensors.items():
                for name, value in named.items():
                    size = -(-value.numel() // ranks)
                    flat = value.flatten()[rank * size : (rank + 1) * size]
                    pieces.append(Piece(name, kind, rank * size, tuple(value.shape), flat))
            writer.save(iteration, pieces, {}, {"iteration": iteration}, f"a{iteration}", iteration in best)
        for writer in writers:
            writer.wait()


def make_run(folder, base, *overrides, iterations=(1,), **options):
    config = load_config(
        "flux-dev",
        [f"model.path={base}", f"output_dir={folder}", "model.dtype=float32", "rewards=[{name: jpeg, weight: 2}]",
         *overrides],
    )  # fmt: skip
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(config.yaml())
    (folder / RUN_FILE).write_text(json.dumps({"version": "0.9", "commit": "c0ffee", "world_size": 2}))
    lines = [{"iteration": 1, "loss": 0.5}, *({"iteration": i, "held_out/jpeg": i / 2 - 3} for i in range(4))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "curve.png").write_bytes(b"an image")
    save(folder, base, iterations, lora=config.model.lora, **options)
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Iterations 1 (the best), 2 and 3, with averages."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    return make_run(folder, base, iterations=(1, 2, 3), kinds=("weight", "ema"), best=(1,))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_of(folder):
    files = (folder / "transformer").glob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("lora", [[], ["model.lora={rank: 2}"]], ids=["full", "lora"])
def test_files_can_be_read_by_whom_the_umask_says(lora, base, tmp_path):
    """Whatever the base's own files allow; those that diffusers writes allow nobody but their owner."""
    before = os.umask(0o022)
    try:
        export(make_run(tmp_path / "run", base, *lora), tmp_path / "out")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_checkpoint_of_another_run_is_refused(base, tmp_path):
    """Copied there whole: nothing else would show that its weights are another's."""
    run = make_run(tmp_path / "run", base)
    (run / RUN_FILE).write_text(json.dumps({"run": "this one"}))
    with pytest.raises(ValueError, match="checkpoint: .*iteration-000001 is another run's; choose another"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_copied_without_its_record_is_exported_with_a_warning(base, tmp_path):
    run = make_run(tmp_path / "run", base)
    index = run / CHECKPOINTS / "iteration-000001" / INDEX
    _write_sealed(index, {**_read_sealed(index), "run": "this one"})
    (run / RUN_FILE).unlink()
    with pytest.warns(UserWarning, match="run.json is missing, which names the run; .*000001 is taken to be of it"):
        export(run, tmp_path / "out")
    assert (tmp_path / "out" / "model_index.json").exists()


@pytest.mark.parametrize("card", ["---\na: " + "[" * 5000 + "\n---\n"], ids=["deep"])
def test_a_card_of_the_base_that_cannot_be_read_names_no_licence(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert module._licence(tmp_path) == {}


@pytest.mark.parametrize("shard_bytes", [module.SHARD_BYTES, 400_000], ids=["one file", "shards"])
def test_all_weights_and_the_rest_of_the_base(shard_bytes, run, base, tmp_path):
    before = contents(run)
    export(run, tmp_path / "out", shard_bytes=shard_bytes)
    expected, found = trained(base, iteration=3), weights_of(tmp_path / "out")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    files = sorted(path.name for path in (tmp_path / "out" / "transformer").iterdir())
    if shard_bytes == module.SHARD_BYTES:
        assert files == ["config.json", "diffusion_pytorch_model.safetensors"]
    else:
        count = len(files) - 2
        assert count > 2 and f"diffusion_pytorch_model-00001-of-{count:05d}.safetensors" in files
        assert "diffusion_pytorch_model.safetensors.index.json" in files
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        assert contents(tmp_path / "out" / part) == contents(base / part)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer").state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert contents(run) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "iteration", "kind"),
    [
        ((), 3, "weight"),
        (("--checkpoint", "newest", "--weights", "ema"), 3, "ema"),
        (("--checkpoint", "best"), 1, "weight"),
        (("--checkpoint", "2", "--weights", "model"), 2, "weight"),
    ],
    ids=["newest", "newest ema", "best", "given"],
)
def test_the_command_chooses_weights_and_checkpoint(options, iteration, kind, run, base, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["egrpo", "export", str(run), str(tmp_path / "out"), *options])
    cli.main()
    expected, found = trained(base, None, iteration, kind), weights_of(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert f"iteration-{iteration:06d}" in capsys.readouterr().out


def sampled(transformer, folder, config):
    """By the trainer's own sampler: latents, and images."""
    text = FluxTextEncoder(Path(folder), config.model)
    vae = FluxPipeline.from_pretrained(folder, transformer=None, text_encoder=None, text_encoder_2=None).vae
    guidance = FluxBackbone.guidance(Path(folder), config.model)
    backbone = FluxBackbone(transformer, vae, text, config.model, guidance)
    wavefront = Wavefront(ode_plan(make_schedule(4)), 2, backbone.latent_shape, ops.choose("reference"))
    conditioning = backbone.encode(PROMPTS)
    latents = wavefront.run(
        lambda latents, t, rows: backbone.velocity(transformer, latents, t, conditioning, rows),
        NoiseKey(config.seed, 0, torch.arange(2)),
    ).final_latents[:, 0]
    return latents, backbone.decode(latents)


def drawn(pipeline, config):
    """By diffusers, from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    tokens = (config.model.height // 16) * (config.model.width // 16)
    common = {
        "prompt": PROMPTS, "height": config.model.height, "width": config.model.width, "num_inference_steps": 4,
        "guidance_scale": config.model.guidance_scale, "max_sequence_length": config.model.max_sequence_length,
        "latents": noise.initial_noise(config.seed, 0, torch.arange(2), (tokens, 64)),
    }  # fmt: skip
    return [pipeline(**common, output_type=kind).images for kind in ("latent", "pt")]


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-4)


SMALL = ("model.height=64", "model.width=48", "model.max_sequence_length=32")


def test_images_of_the_exported_pipeline_are_the_trainers(base, tmp_path):
    run = make_run(tmp_path / "run", base, *SMALL)
    export(run, tmp_path / "out")
    config = load_config(str(run / CONFIG_FILE))
    transformer, _ = meta_transformer(base)
    transformer.load_state_dict(trained(base), assign=True)
    ours, theirs = sampled(transformer, base, config), drawn(FluxPipeline.from_pretrained(tmp_path / "out"), config)
    assert_same(ours, theirs)
    untrained = drawn(FluxPipeline.from_pretrained(base), config)
    assert (untrained[0] - theirs[0]).abs().max() > 0.05, "training must show, or the comparison shows nothing"


def test_images_of_the_base_with_the_lora_are_the_trainers(base, tmp_path):
    """alpha is not the rank: a loader that is not told the scale takes 1."""
    run = make_run(tmp_path / "run", base, LORA, *SMALL)
    export(run, tmp_path / "out")
    config = load_config(str(run / CONFIG_FILE))
    transformer, weights = meta_transformer(base, config.model.lora)
    values = {name: weights(name) for name, _ in transformer.named_parameters()} | trained(base, config.model.lora)
    transformer.load_state_dict(values, assign=True)
    pipeline = FluxPipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path / "out")
    ours, theirs = sampled(transformer, base, config), drawn(pipeline, config)
    assert_same(ours, theirs)
    assert (drawn(FluxPipeline.from_pretrained(base), config)[0] - theirs[0]).abs().max() > 0.05
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"pytorch_lora_weights.safetensors", "README.md", "LICENSE.md", "curve.png", "export.json"}
    # What was exported can be trained on.
    _, weights = meta_transformer(base, LoraConfig(path=str(tmp_path / "out")))
    assert weights.lora.rank == weights.lora.alpha == 4
    assert set(weights.lora.target_modules) == {"to_q", "to_v", "proj_out"}
    for name, value in trained(base, config.model.lora).items():
        assert torch.equal(weights(name), value * (4 if ".lora_B." in name else 1))


def test_the_weights_are_as_the_forward_used_them(base, tmp_path):
    run = make_run(tmp_path / "run", base, "model.dtype=bfloat16")
    export(run, tmp_path / "out")
    expected, found = trained(base), weights_of(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)


def fused_run(base, tmp_path, *overrides):
    """A LoRA run, exported as it is and fused. Returns its configuration."""
    run = make_run(tmp_path / "run", base, LORA, *SMALL, *overrides)
    export(run, tmp_path / "lora")
    export(run, tmp_path / "fused", fuse=True, shard_bytes=400_000)
    return load_config(str(run / CONFIG_FILE))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=["float32", "bfloat16"]
)
def test_images_of_the_fused_pipeline_are_those_of_the_base_with_the_adapters(dtype, bound, base, tmp_path):
    """Latents and pixels. In bfloat16 the sum of a weight and its adapters is rounded once more."""
    copy = tmp_path / "base"
    FluxPipeline.from_pretrained(base, torch_dtype=dtype).save_pretrained(copy)
    config = fused_run(copy, tmp_path, f"model.dtype={str(dtype).removeprefix('torch.')}")
    fused = FluxPipeline.from_pretrained(tmp_path / "fused", torch_dtype=dtype)
    pipeline = FluxPipeline.from_pretrained(copy, torch_dtype=dtype)
    before = drawn(pipeline, config)
    pipeline.load_lora_weights(tmp_path / "lora")
    for ours, theirs, untrained in zip(drawn(fused, config), drawn(pipeline, config), before, strict=True):
        assert (ours - theirs).abs().max() <= bound < (untrained - theirs).abs().max() / 2


def test_a_fused_weight_is_the_base_and_its_adapters_rounded_once(base, tmp_path):
    """In the dtype of the base's file, whatever the run's; what no adapter touches is the base's, bit for bit."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    transformer = FluxTransformer2DModel.from_pretrained(base / "transformer").to(torch.bfloat16)
    transformer.save_pretrained(copy / "transformer")
    config = fused_run(copy, tmp_path)
    adapters, before, after = trained(copy, config.model.lora), weights_of(copy), weights_of(tmp_path / "fused")
    assert before.keys() == after.keys() and len(list((tmp_path / "fused" / "transformer").glob("*.safetensors"))) == 2
    touched = 0
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        assert after[name].dtype == torch.bfloat16
        if (down := adapters.get(f"{layer}.lora_A.default.weight")) is None:
            assert torch.equal(after[name], value)
            continue
        touched += 1
        exact = value.double() + 16 / 4 * adapters[f"{layer}.lora_B.default.weight"].double() @ down.double()
        assert ((after[name].double() - exact).abs() <= exact.abs() * 2**-8).all()
    assert touched == len(adapters) / 2 > 5
    front, body = front_matter(tmp_path / "fused")
    assert front["base_model_relation"] == "finetune" and "lora" not in front["tags"]
    assert "low-rank adapters fused into the base" in body and 'from_pretrained("this folder")' in body


def test_what_cannot_be_fused_is_refused(run, base, tmp_path):
    with pytest.raises(ValueError, match="export: .*full trained all weights and has no adapters to fuse; leave"):
        export(run, tmp_path / "out", fuse=True)
    other = tmp_path / "base"
    shutil.copytree(base, other)
    lora_run = make_run(tmp_path / "run", other, LORA)
    (lora_run / RUN_FILE).write_text(json.dumps({"base": {**identity(other), "transformer": "another"}}))
    with pytest.raises(ValueError, match="is not the model this run began with: another transformer"):
        export(lora_run, tmp_path / "out", fuse=True)
    (lora_run / RUN_FILE).unlink()
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["transformer_blocks.0.attn.to_q.weight"] = tensors["transformer_blocks.0.attn.to_q.weight"][1:].contiguous()
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="export: the base has no layer transformer_blocks.0.attn.to_q of"):
        export(lora_run, tmp_path / "out", fuse=True)
    assert not (tmp_path / "out").exists()


def front_matter(folder):
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_model_card(run, base, tmp_path):
    export(run, tmp_path / "out", checkpoint="1")
    front, body = front_matter(tmp_path / "out")
    assert front["license"] == "other" and front["license_name"] == "flux-1-dev-non-commercial-license"
    assert front["license_link"] == "LICENSE.md" and (tmp_path / "out" / "LICENSE.md").read_text() == "No commerce."
    assert front["library_name"] == "diffusers" and front["base_model_relation"] == "finetune"
    assert "base_model" not in front, "a local folder is no id of the hub"
    assert "Trained with E-GRPO (arXiv 2601.00423)" in body and "e-grpo" in front["tags"]
    assert "commit c0ffee" in body and "for 1 iterations on jpeg (weight 2)" in body
    assert "flux-1-dev-non-commercial-license" in body and "as trained" in body and "from_pretrained" in body
    assert "| iteration | jpeg |\n| --- | --- |\n| 0 | -3.0000 |\n| 1 | -2.5000 |\n\n" in body, "nothing after it"
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert settings == yaml.safe_load((run / CONFIG_FILE).read_text())


def test_the_card_of_a_lora_of_a_hub_model(base, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "resolve", lambda path: {"someone/FLUX": base}[path])
    run = make_run(tmp_path / "run", base, LORA, "method.name=mix_grpo")
    text = (run / CONFIG_FILE).read_text().replace(f"path: {base}", "path: someone/FLUX")
    (run / CONFIG_FILE).write_text(text)
    (run / "metrics.jsonl").unlink()
    (run / "curve.png").unlink()
    (run / RUN_FILE).unlink()
    export(run, tmp_path / "out")
    front, body = front_matter(tmp_path / "out")
    assert front["base_model"] == "someone/FLUX" and front["base_model_relation"] == "adapter"
    assert {"lora", "mix-grpo"} <= set(front["tags"]) and "Trained with `mix_grpo`" in body
    assert 'from_pretrained("someone/FLUX")\npipe.load_lora_weights' in body and "low-rank adapters" in body
    assert "No evaluation was recorded." in body and "commit unknown" in body and "curve.png" not in body


@pytest.mark.parametrize("card", [None, "# no front matter\n", "---\n{\n---\n", "---\n- a list\n---\n"])
def test_without_a_licence_in_the_base_the_card_says_its_own(card, base, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(base, other)
    (other / "README.md").unlink()
    if card is not None:
        (other / "README.md").write_text(card)
    export(make_run(tmp_path / "run", other, LORA), tmp_path / "out")
    front, body = front_matter(tmp_path / "out")
    assert front["license"] == "other" and "is under its own licence" in body


def test_one_shard_is_in_memory_at_a_time(run, monkeypatch, tmp_path):
    """Every tensor that is read, as long as anything holds it; a shard is a tenth of the whole."""
    whole = sum(value.nbytes for value in weights_of_checkpoint(run).values())
    alive, peak, original = {}, 0, CheckpointReader.tensor

    def tensor(self, name, kind="weight"):
        nonlocal peak
        value = original(self, name, kind)
        alive[name] = value.nbytes
        weakref.finalize(value.untyped_storage(), alive.pop, name)
        peak = max(peak, sum(alive.values()))
        return value

    monkeypatch.setattr(CheckpointReader, "tensor", tensor)
    export(run, tmp_path / "out", shard_bytes=whole // 10)
    assert whole // 20 < peak <= whole // 10
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) >= 10


def test_one_shard_of_a_fused_pipeline_is_in_memory_at_a_time(base, monkeypatch, tmp_path):
    """Every adapted weight that is made, as long as anything holds it."""
    run = make_run(
        tmp_path / "run", base, "model.lora={rank: 4, alpha: 16, target_modules: [to_q, to_k, to_v, proj_out]}"
    )
    alive, peak, made, original = {}, 0, 0, module.fused

    def fused(*arguments):
        nonlocal peak, made
        value = original(*arguments)
        made += value.nbytes
        alive[id(value)] = value.nbytes
        weakref.finalize(value.untyped_storage(), alive.pop, id(value))
        peak = max(peak, sum(alive.values()))
        return value

    monkeypatch.setattr(module, "fused", fused)
    export(run, tmp_path / "out", fuse=True, shard_bytes=100_000)
    assert 0 < peak <= 100_000 < made


def weights_of_checkpoint(run):
    reader = CheckpointReader(find_checkpoint(run))
    return {name: reader.tensor(name) for name in reader.names()}


@contextmanager
def files_of_at_most(size):
    """Writing past `size` fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("override", [(), (LORA,)], ids=["full", "lora"])
def test_a_write_that_fails_leaves_nothing_behind(override, base, tmp_path):
    run = make_run(tmp_path / "run", base, *override)
    before = contents(run)
    with files_of_at_most(10_000), pytest.raises(ValueError, match="export: .*out could not be written: .*"):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and contents(run) == before
    export(run, tmp_path / "out")  # once there is room


def test_room_is_asked_for_before_anything_is_copied(run, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(ValueError, match=r"export: .* GiB are needed in .*, 0.0 are free"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way_stays(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(ValueError, match=f"export: .*{name} is in the way"):
            export(run, tmp_path / name)
    with pytest.raises(ValueError, match="is in the way"):
        export(run, run)
    with pytest.raises(ValueError, match="export: .*below could not be written"):
        export(run, tmp_path / "file" / "below")
    assert list(contents(tmp_path).values()) == [b"mine", b"mine"]
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_an_earlier_export_is_replaced_only_when_asked_and_only_by_a_whole_one(run, base, monkeypatch, tmp_path):
    out = tmp_path / "out"
    export(run, out, checkpoint="1")
    before = contents(out)
    with files_of_at_most(10_000), pytest.raises(ValueError, match="could not be written"):
        export(run, out, replace=True)
    assert contents(out) == before
    export(run, out, replace=True)
    expected, found = trained(base, iteration=3), weights_of(out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_cannot_be_exported_is_refused_by_name(run, base, tmp_path):
    with pytest.raises(ValueError, match="export: .*nothing holds no run"):
        export(tmp_path / "nothing", tmp_path / "out")
    bare = make_run(tmp_path / "bare", base)
    with pytest.raises(ValueError, match="export: .*iteration-000001 holds no ema weights; .* optimizer.ema_decay"):
        export(bare, tmp_path / "out", "ema")
    with pytest.raises(ValueError, match="checkpoint: .* has none marked as best; train with checkpoint.best"):
        find_checkpoint(bare, "best")
    for which in ("7", "-1", "last"):
        with pytest.raises(ValueError, match=f"has none of iteration {which}; there are newest, best and 1, 2, 3"):
            find_checkpoint(run, which)
    shutil.rmtree(bare / CHECKPOINTS)
    with pytest.raises(ValueError, match="checkpoint: .*bare has none yet"):
        export(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_size_is_refused(run, tmp_path):
    """The run's model.path holds another transformer than the one that was trained."""
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    make_pipeline("flux-schnell").save_pretrained(tmp_path / "base")
    config = yaml.safe_load((moved / CONFIG_FILE).read_text())
    config["model"]["path"] = str(tmp_path / "base")
    (moved / CONFIG_FILE).write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="base/transformer: weights of another architecture: .*guidance"):
        export(moved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_changed_since_is_refused_and_told_where_only_adapters_are_written(base, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(base, other)
    runs = [make_run(tmp_path / name, other, *some) for name, some in (("full", ()), ("lora", (LORA,)))]
    for run in runs:
        (run / RUN_FILE).write_text(json.dumps({"base": identity(other)}))
    (other / "vae" / "config.json").write_text((base / "vae" / "config.json").read_text().replace("32", "16"))
    told = "model.path: .*base is not the model this run began with: another vae; put that one back"
    with pytest.raises(ValueError, match=told):
        export(runs[0], tmp_path / "full-out")
    assert not (tmp_path / "full-out").exists()
    with pytest.warns(UserWarning, match=f"{told}.*; the adapters fit that one alone"):
        export(runs[1], tmp_path / "lora-out")
    assert (tmp_path / "lora-out" / "pytorch_lora_weights.safetensors").exists()


def test_the_command_refuses_a_damaged_checkpoint_by_name(base, monkeypatch, tmp_path):
    run = make_run(tmp_path / "run", base, iterations=(1, 2))
    file = max((run / CHECKPOINTS / "iteration-000002").glob("*.safetensors"))
    damaged = bytearray(file.read_bytes())
    damaged[-100] ^= 1
    file.write_bytes(damaged)
    monkeypatch.setattr(sys, "argv", ["egrpo", "export", str(run), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="error: checkpoint: .*iteration-000002 is damaged.*rank-00001.*checksum"):
        cli.main()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["egrpo", "export", str(run), str(tmp_path / "out"), "--checkpoint", "1"])
    cli.main()
    assert (tmp_path / "out").is_dir()


def test_a_replacement_killed_between_its_renames_is_undone(run, base, monkeypatch, tmp_path):
    out = tmp_path / "out"
    export(run, out, checkpoint="1")
    before, rename = contents(out), Path.rename

    def killed(self, target):
        rename(self, target)
        if target.suffix == ".replaced":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    monkeypatch.setattr(module, "_put_back", lambda *_: None)  # kill -9 leaves no time for it
    with pytest.raises(KeyboardInterrupt):
        export(run, out, replace=True)
    (replaced,) = tmp_path.glob("out.*.replaced")
    assert not out.exists() and contents(replaced) == before
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"out is in the way \(an export of iteration 1, model weights\); choose"):
        export(run, out)
    assert contents(out) == before and not replaced.exists()
    shutil.copytree(out, replaced)  # killed before the old one was deleted
    export(run, out, replace=True)
    found = weights_of(out)
    assert all(torch.equal(found[name], value) for name, value in trained(base, iteration=3).items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replacement_that_cannot_be_renamed_leaves_the_earlier_export(run, monkeypatch, tmp_path):
    out = tmp_path / "out"
    export(run, out, checkpoint="1")
    before, rename = contents(out), Path.rename

    def refused(self, target):
        if self.suffix == ".partial":
            raise OSError(errno.EACCES, "Permission denied")
        rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ValueError, match="export: .*out could not be written: Permission denied"):
        export(run, out, replace=True)
    assert contents(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_of_a_run_whose_last_line_is_unfinished(base, tmp_path):
    run = make_run(tmp_path / "run", base, LORA)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 1, "held_out/jp')
    export(run, tmp_path / "out")
    assert "| 1 | -2.5000 |\n\n" in front_matter(tmp_path / "out")[1]


def test_folders_of_ones_own_beside_an_export_stay(run, tmp_path):
    mine = [tmp_path / name for name in ("out.partial", "out.replaced", "out.0123abcd.partial", "out.old.replaced")]
    for folder in mine:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    export(run, tmp_path / "out", checkpoint="1")
    export(run, tmp_path / "out", replace=True)
    assert all((folder / "notes.txt").read_text() == "mine" for folder in mine)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *(folder.name for folder in mine)}


def test_a_second_export_into_the_same_folder_is_whole_or_refused(run, base, monkeypatch, tmp_path):
    """A whole one happens while another writes its first shard: each has a folder of its own, the first done stands."""
    original, told = module.save_file, []

    def interrupted(*arguments, **options):
        monkeypatch.setattr(module, "save_file", original)
        told.append(export(run, out, checkpoint="1", shard_bytes=400_000)[1])
        original(*arguments, **options)

    for out, ours in ((tmp_path / "same", "1"), (tmp_path / "other", "2")):
        monkeypatch.setattr(module, "save_file", interrupted)
        if ours == "1":
            assert export(run, out, checkpoint=ours)[1] is False, "the very same is there"
        else:
            with pytest.raises(ValueError, match="export: .*other could not be written: Directory not empty"):
                export(run, out, checkpoint=ours)
        expected, found = trained(base, iteration=1), weights_of(out)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        FluxTransformer2DModel.from_pretrained(out, subfolder="transformer")
    assert told == [True, True] and {path.name for path in tmp_path.iterdir()} == {"same", "other"}


def test_the_same_again_is_done_already(run, monkeypatch, tmp_path, capsys):
    """As after a kill that came after the last rename. What is not whole, or not the same, is in the way."""
    out = tmp_path / "out"
    export(run, out)
    before = contents(out)
    monkeypatch.setattr(sys, "argv", ["egrpo", "export", str(run), str(out)])
    cli.main()
    assert "already there, whole, and left as it is: model weights of" in capsys.readouterr().out
    assert contents(out) == before
    for options in ({"checkpoint": "2"}, {"weights": "ema"}):
        with pytest.raises(ValueError, match=r"out is in the way \(an export of iteration 3, model weights\); choose"):
            export(run, out, **options)
    (out / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="out is in the way; choose another folder, or delete it"):
        export(run, out)


def test_what_a_killed_export_left_is_removed_and_what_another_writes_is_not(run, tmp_path):
    out = tmp_path / "out"
    with module._new_beside(out) as writing:
        dead = tmp_path / "out.00000000.partial"
        shutil.copytree(writing, dead)
        export(run, out)
        assert writing.is_dir() and not dead.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def during_the_first_read(monkeypatch, act):
    original = CheckpointReader.tensor

    def tensor(self, *arguments):
        monkeypatch.setattr(CheckpointReader, "tensor", original)
        act()
        return self.tensor(*arguments)

    monkeypatch.setattr(CheckpointReader, "tensor", tensor)


def kept_by(run):
    return [path.name for path in Checkpoints(run / CHECKPOINTS).all()]


def test_a_run_that_goes_on_prunes_what_is_exported_later(base, monkeypatch, tmp_path):
    run = make_run(tmp_path / "run", base, LORA)
    lora = load_config(str(run / CONFIG_FILE)).model.lora
    during_the_first_read(monkeypatch, lambda: save(run, base, (2, 3), lora=lora, keep=1))
    path, _ = export(run, tmp_path / "out")
    assert path.name == "iteration-000001" and kept_by(run) == ["iteration-000001", "iteration-000003"]
    found = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    downs = {name: value for name, value in trained(base, lora, 1).items() if ".lora_A." in name}
    assert all(torch.equal(found[f"transformer.{k.replace('.default.', '.')}"], v) for k, v in downs.items())
    save(run, base, (4,), lora=lora, keep=1)
    assert kept_by(run) == ["iteration-000004"]


def test_a_checkpoint_that_is_written_anew_while_it_is_read_is_not_mixed(base, monkeypatch, tmp_path):
    run = make_run(tmp_path / "run", base, LORA)
    lora = load_config(str(run / CONFIG_FILE)).model.lora
    during_the_first_read(monkeypatch, lambda: save(run, base, (1,), lora=lora))
    with pytest.raises(
        ValueError, match="iteration-000001 was deleted or written anew by its run while it was read; try"
    ):
        export(run, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_checkpoint_that_is_pruned_before_it_is_opened_gives_way_to_the_next(base, monkeypatch, tmp_path):
    run, original = make_run(tmp_path / "run", base, LORA), module.find_checkpoint
    lora = load_config(str(run / CONFIG_FILE)).model.lora

    def find(*arguments):
        found = original(*arguments)
        if found.name == "iteration-000001":
            save(run, base, (2,), lora=lora, keep=1)
        return found

    monkeypatch.setattr(module, "find_checkpoint", find)
    assert export(run, tmp_path / "out")[0].name == "iteration-000002"


def test_the_best_is_found_beside_a_damaged_one(base, tmp_path):
    run = make_run(tmp_path / "run", base, LORA, iterations=(1, 2, 3), best=(2,))
    index = run / CHECKPOINTS / "iteration-000001" / "checkpoint.json"
    index.write_text("{")
    assert find_checkpoint(run, "best").name == "iteration-000002", "an older one cannot be the best"
    (run / CHECKPOINTS / "iteration-000003" / "checkpoint.json").write_text("{")
    told = r"iteration-000002 is the best of those that can be read; not iteration-000003 \(checkpoint.json: damaged"
    with pytest.warns(UserWarning, match=told):
        export(run, tmp_path / "out", checkpoint="best")
    (run / CHECKPOINTS / "iteration-000002" / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match="has none marked as best; .*iteration-000003 .*damaged.* could not be read"):
        find_checkpoint(run, "best")
