"""Our FLUX room against diffusers' own FluxPipeline, on the embedded pipeline and on FLUX's own layout."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.errors as hub
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from egrpo_fast import noise, ops
from egrpo_fast.config import LoraConfig, ModelConfig, TaylorSeerConfig
from egrpo_fast.methods.e_grpo import e_grpo
from egrpo_fast.models import folder as folders
from egrpo_fast.models.flux.backbone import FluxBackbone
from egrpo_fast.models.flux.compiled import CompiledFlux
from egrpo_fast.models.flux.text import FluxTextEncoder
from egrpo_fast.models.folder import check_folder, fetch_card, resolve
from egrpo_fast.models.lora import save_lora
from egrpo_fast.models.random import make_pipeline
from egrpo_fast.models.tail import TailCache
from egrpo_fast.models.transformer import meta_transformer
from egrpo_fast.models.vae import load_vae
from egrpo_fast.objective import Objective, policy_mismatch
from egrpo_fast.plan import ode_plan
from egrpo_fast.policy import Policy
from egrpo_fast.rollout import NoiseKey, TailVelocity, Wavefront
from egrpo_fast.schedule import make_schedule
from egrpo_fast.shapes import PIPELINE, PROMPTS

CAPTIONS = PROMPTS["held_out"].read_text().splitlines()[:3]
KEY = NoiseKey(5, 0, torch.arange(3))
SMALL = ModelConfig(path=str(PIPELINE), height=32, width=32, max_sequence_length=24, dtype="float32")


@pytest.fixture(scope="module")
def backbone():
    return Policy(SMALL, PIPELINE).load(torch.device("cpu")).backbone


def sample(backbone, num_steps=16, micro_batch=None):
    wavefront = Wavefront(
        ode_plan(make_schedule(num_steps)), 3, backbone.latent_shape, ops.choose("reference"), micro_batch=micro_batch
    )
    conditioning = backbone.encode(CAPTIONS)
    return wavefront.run(
        lambda latents, t, rows: backbone.velocity(backbone.transformer, latents, t, conditioning, rows), KEY
    ).final_latents[:, 0]


def assert_step_for_step(backbone, pipeline, prompts, schedule, **arguments):
    """Packing, ids, time, guidance and shift: the pipeline's latents after every step, and its images."""
    rows, steps = torch.arange(len(prompts)), []
    start = noise.initial_noise(5, 0, rows, backbone.latent_shape)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompts, height=backbone.height, width=backbone.width, num_inference_steps=len(schedule.times) - 1,
        latents=start, output_type="pt", **arguments,
        callback_on_step_end=lambda pipe, i, t, values: steps.append(values["latents"].clone()) or {},
    ).images  # fmt: skip
    conditioning, x = backbone.encode(prompts), start
    with torch.no_grad():
        for i, theirs in enumerate(steps):
            v = backbone.velocity(backbone.transformer, x, schedule.times[i], conditioning, rows)
            x = x + schedule.ode(i, i + 1).c_v * v
            assert torch.allclose(x, theirs, rtol=0, atol=2e-4), f"step {i}"
    assert len(steps) == len(schedule.times) - 1
    assert torch.allclose(backbone.decode(x), images, rtol=0, atol=1e-3)
    return x


def test_the_ode_sampler_reproduces_the_pipeline_step_for_step(backbone):
    pipeline = FluxPipeline.from_pretrained(PIPELINE)
    x = assert_step_for_step(
        backbone, pipeline, CAPTIONS, make_schedule(16), guidance_scale=3.5, max_sequence_length=24
    )
    assert torch.allclose(sample(backbone), x, rtol=0, atol=2e-4)


DEV_SHIFT = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
"""As FLUX.1-dev's scheduler_config.json: `shift` is ignored, exp(mu) of the number of tokens takes its place."""


@pytest.mark.parametrize(
    ("guided", "scheduler", "shift", "height", "width"),
    [
        pytest.param(True, {"shift": 3.0}, 3.0, 144, 80, id="the recipes' fixed shift"),
        pytest.param(True, DEV_SHIFT, None, 144, 80, id="dev"),
        pytest.param(False, {"shift": 1.0}, 1.0, 80, 144, id="schnell"),
        pytest.param(True, DEV_SHIFT, None, 720, 400, id="dev, 720 x 400"),
    ],
)
def test_flux_layouts_are_sampled_as_the_pipeline_samples_them(guided, scheduler, shift, height, width, tmp_path):
    """Not square, an odd number of tokens a side, with and without guidance embedding. One fixed `schedule.shift` does
    what each of the schedulers does: 1 is schnell's, and exp(mu) dev's at one image size."""
    pipeline = make_pipeline("flux-dev" if guided else "flux-schnell", "small")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**scheduler)
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline = FluxPipeline.from_pretrained(tmp_path / "pipeline")
    if shift is None:
        shift = math.exp(calculate_shift(height * width // 256))
    scale = {"guidance_scale": 2.0} if guided else {}
    changes = {"height": height, "width": width, "max_sequence_length": 40} | scale
    model = SMALL.model_copy(update=changes)
    backbone = Policy(model, tmp_path / "pipeline").load(torch.device("cpu")).backbone
    prompts = CAPTIONS[:2] if height < 720 else CAPTIONS[:1]
    schedule = make_schedule(4 if height < 720 else 2, shift)
    assert_step_for_step(backbone, pipeline, prompts, schedule, guidance_scale=2.0, max_sequence_length=40)


@pytest.mark.parametrize("micro_batch", [1, 7, None], ids=["1", "7", "all"])
def test_the_ratio_is_exactly_one_before_the_first_update(backbone, micro_batch):
    """The rollout at any micro-batch; old policy: a forward without gradient, new: one with. The real transformer."""
    plan = e_grpo(make_schedule(4, active_steps=[0, 1]), [4, 3], [1, 1])
    chosen, conditioning, rows = ops.choose("reference"), backbone.encode(CAPTIONS), torch.arange(3)

    def velocity(latents, t, rows):
        return backbone.velocity(backbone.transformer, latents, t, conditioning, rows)

    rollout = Wavefront(plan, 3, backbone.latent_shape, chosen, micro_batch=micro_batch).run(velocity, KEY)
    for n, group in enumerate(plan.groups):
        with torch.no_grad():
            old = velocity(rollout.states[n], group.time, rows)
        new = velocity(rollout.states[n], group.time, rows)
        rewards = torch.rand(1, 3, group.size)
        ratio = Objective(chosen, (1.0,))(group, KEY, new, old, rewards).log_ratio.exp()
        assert torch.equal(ratio, torch.ones(3, group.size))
        moved = Objective(chosen, (1.0,))(group, KEY, new + 1e-3, old, rewards).log_ratio
        assert (moved != 0).all() and policy_mismatch(group, old, rollout.velocities[n]) < 1e-5


def test_micro_batches_agree(backbone):
    assert torch.allclose(sample(backbone, 4, micro_batch=1), sample(backbone, 4), rtol=0, atol=1e-4)


STEMS = {part: stem for part in FluxBackbone.parts if (stem := folders.weights_stem(part))}
LORA = LoraConfig(rank=4, alpha=16, target_modules=["to_q", "proj_out"])


def weight_file(folder, part="transformer"):
    return next((folder / part).glob("*.safetensors"))


def cut(part):
    return lambda folder: weight_file(folder, part).write_bytes(weight_file(folder, part).read_bytes()[:-10])


def config(part, **changes):
    def damage(folder):
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def index_naming_an_absent_shard(folder):
    names = load_file(weight_file(folder))
    weight_map = dict.fromkeys(names, weight_file(folder).name) | {min(names): "diffusion_pytorch_model-2.safetensors"}
    text = json.dumps({"weight_map": weight_map})
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)


def index_outside(part):
    """An index that names a sound file of weights two folders up."""

    def damage(folder):
        file = weight_file(folder, part)
        elsewhere = folder.parent / "elsewhere.safetensors"
        file.rename(elsewhere)
        weight_map = dict.fromkeys(load_file(elsewhere), "../../elsewhere.safetensors")
        (file.parent / f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def tokenizer_config(part, **changes):
    def damage(folder):
        file = folder / part / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def without_a_weight(part):
    def damage(folder):
        weights = load_file(weight_file(folder, part))
        del weights[min(weights)]
        save_file(weights, weight_file(folder, part), metadata={"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        pytest.param(lambda f: (f / "model_index.json").unlink(), "no model_index.json", id="no index"),
        pytest.param(lambda f: (f / "model_index.json").write_text("{"), "cannot be read", id="broken index"),
        pytest.param(lambda f: (f / "model_index.json").write_text("[]"), "holds a list", id="index of another kind"),
        pytest.param(lambda f: (f / "model_index.json").write_text('{"_class_name": "X"}'), "holds a X", id="class"),
        *(
            pytest.param(lambda f, part=part: shutil.rmtree(f / part), f"lacks {part}$", id=f"no {part}")
            for part in FluxBackbone.parts
        ),
        pytest.param(cut("transformer"), "transformer/diff.* its header asks for", id="truncated transformer"),
        pytest.param(
            lambda f: weight_file(f).write_bytes(b"\0" * 100), "transformer/diff.* cannot be read as safetensors",
            id="corrupt header",
        ),
        pytest.param(
            index_naming_an_absent_shard, "transformer lacks diffusion_pytorch_model-2.safetensors", id="absent shard"
        ),
        pytest.param(without_a_weight("transformer"), "another architecture: of .* they lack 1", id="a weight less"),
        pytest.param(config("transformer", num_layers=3), "another architecture: .*lack .*blocks", id="more layers"),
        pytest.param(config("transformer", guidance_embeds=False), "they add .*guidance", id="no guidance"),
        pytest.param(config("transformer", joint_attention_dim=8), r"context_embedder.weight is \(", id="wider"),
        pytest.param(config("transformer", num_layers="two"), "config.json describes no transformer", id="no number"),
        pytest.param(
            config("transformer", _class_name="SD3Transformer2DModel"),
            "transformer of .* is a SD3Transformer2DModel, not a FluxTransformer2DModel", id="another class",
        ),
        pytest.param(cut("vae"), "vae could not be loaded: .*its header asks for", id="truncated VAE"),
        pytest.param(without_a_weight("vae"), "vae could not be loaded: it lacks 1 weights", id="VAE, a weight less"),
        pytest.param(config("vae", block_out_channels=3), "cannot be read as a FluxPipeline", id="VAE's config"),
        pytest.param(cut("text_encoder_2"), "text_encoder_2/model.safetensors.* its header asks", id="truncated T5"),
        pytest.param(config("text_encoder", model_type="bert"), "text_encoder holds a bert", id="another encoder"),
        *(
            pytest.param(
                index_outside(part), f"{part}/.*index.json names '../../elsewhere.safetensors'; a file in its own",
                id=f"index outside of {part}",
            )
            for part in STEMS
        ),
        *(
            pytest.param(
                tokenizer_config(part, **{key: "../../elsewhere.json"}),
                f"{part} could not be loaded: tokenizer_config.json: {key} is '../../elsewhere.json'",
                id=f"{part}, {key}",
            )
            for part, key in (("tokenizer", "merges_file"), ("tokenizer_2", "tokenizer_file"))
        ),
        pytest.param(
            lambda f: (f / "tokenizer" / "tokenizer.json").unlink(),
            "tokenizer could not be loaded: there is neither tokenizer.json nor merges.txt and vocab", id="no words",
        ),
        pytest.param(
            lambda f: (f / "tokenizer_2" / "tokenizer.json").unlink(),
            "tokenizer_2 could not be loaded: there is neither tokenizer.json nor spiece.model", id="no words of T5",
        ),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_by_name(damage, told, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(PIPELINE, folder)
    damage(folder)
    with pytest.raises(ValueError, match=f"model.path: .*{told}"):
        Policy(SMALL, folder).load(torch.device("cpu"))


def test_a_tokenizer_that_gives_no_length_has_its_encoders(tmp_path, backbone):
    """As many tokens as CLIP has positions for; one that asks for its own code gets the code of its kind."""
    shutil.copytree(PIPELINE, tmp_path / "pipeline")
    for part in ("tokenizer", "tokenizer_2"):
        file = tmp_path / "pipeline" / part / "tokenizer_config.json"
        settings = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
        del settings["model_max_length"]
        file.write_text(json.dumps(settings))
    text = FluxTextEncoder(tmp_path / "pipeline", SMALL)
    assert text.limits == {"T5": 24, "CLIP": 24}
    prompts = [CAPTIONS[0], "a red circle " * 20]
    expected, found = backbone.encode(prompts), text.encode(prompts)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(text.truncated(prompts)) == 2


def test_bad_sizes_and_paths_are_refused_before_loading(tmp_path):
    with pytest.raises(ValueError, match="model.width: 30 is not a multiple of 4"):
        check_folder(PIPELINE, SMALL.model_copy(update={"width": 30}))
    with pytest.raises(ValueError, match="model.path: no folder"):
        check_folder(tmp_path / "absent", SMALL)


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        pytest.param(hub.GatedRepoError("403", response=RESPONSE), "ID is gated: accept .* set HF_TOKEN", id="gated"),
        pytest.param(
            hub.RepositoryNotFoundError("401", response=RESPONSE), "neither a folder nor a hub .* ID", id="absent"
        ),
        pytest.param(hub.LocalEntryNotFoundError("no connection"), "ID .* not be downloaded.*no conn", id="offline"),
        pytest.param(hub.OfflineModeIsEnabled("HF_HUB_OFFLINE"), "ID .* could not be downloaded", id="offline mode"),
        pytest.param(OSError(28, "No space left on device"), "ID .* not be downloaded.*No space left", id="disk full"),
    ],
)  # fmt: skip
def test_a_hub_id_that_cannot_be_had_is_refused_by_name(error, told, monkeypatch):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(folders, "snapshot_download", download)
    with pytest.raises(ValueError, match=f"model.path: .*{told.replace('ID', 'someone/FLUX')}"):
        resolve("someone/FLUX")


COMMIT = "0123456789abcdef0123456789abcdef01234567"
LEFT_OUT = [
    "README.md", "LICENSE.md", "flux1-dev.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "vae/diffusion_pytorch_model.bin",
    "text_encoder_2/model.fp16-00001-of-00002.safetensors", "text_encoder/flax_model.msgpack",
]  # fmt: skip
"""What such a repository holds beside, and diffusers does not download."""


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """someone/FLUX as diffusers leaves it in a cache: its files, and the listing of all that the repository holds."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--FLUX"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(PIPELINE, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    there = [str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()]
    listing = {name: {"size": 1, "blob_id": "0" * 40} for name in there + LEFT_OUT}
    (repository / "trees").mkdir()
    (repository / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": listing}))
    return snapshot


@pytest.mark.skipif(not hasattr(hub, "IncompleteSnapshotError"), reason="this huggingface_hub keeps no listings")
def test_a_cache_as_diffusers_leaves_it_is_enough_without_a_network(hub_cache):
    with pytest.raises(hub.IncompleteSnapshotError, match="README.md|LICENSE"):
        huggingface_hub.snapshot_download("someone/FLUX", allow_patterns=["model_index.json", "README.md", "LICENSE*"])
    fetch_card("someone/FLUX")  # nothing comes of it, and nothing is said
    assert resolve("someone/FLUX") == hub_cache
    check_folder(resolve("someone/FLUX"), SMALL)
    shutil.rmtree(hub_cache / "transformer")
    with pytest.raises(ValueError, match="model.path: someone/FLUX is no folder here.*transformer/"):
        resolve("someone/FLUX")
    assert resolve("someone/FLUX", parts=("text_encoder", "tokenizer")) == hub_cache, "that is all egrpo encode reads"


def test_of_a_hub_id_every_file_that_is_read_is_asked_for():
    """Shards and their index too; nothing that is left out."""
    shards = [f"{part}/{stem}-00002-of-00003.safetensors" for part, stem in STEMS.items()]
    indexes = [f"{part}/{stem}.safetensors.index.json" for part, stem in STEMS.items()]
    whole = [str(file.relative_to(PIPELINE)) for file in PIPELINE.rglob("*") if file.is_file()]
    wanted = [*whole, *shards, *indexes, "tokenizer_2/spiece.model"]
    asked = filter_repo_objects(wanted + LEFT_OUT, allow_patterns=folders.hub_files(FluxBackbone.parts))
    assert sorted(asked) == sorted(wanted)


def adapters(lora=LORA, seed=0):
    """The adapters of the embedded transformer under its parameters' names, B factors not 0."""
    transformer, weights = meta_transformer(PIPELINE, lora, seed)
    named = {name: weights(name) for name, value in transformer.named_parameters() if value.requires_grad}
    return {name: value + 0.01 if ".lora_B." in name else value for name, value in named.items()}


def test_a_lora_file_is_taken_up_where_it_was_left(tmp_path):
    """With alpha as the rank: the scale is in B since it was written."""
    saved = adapters()
    save_lora(tmp_path, saved, LORA, FluxPipeline)
    transformer, weights = meta_transformer(PIPELINE, LoraConfig(path=str(tmp_path)))
    trained = {name for name, value in transformer.named_parameters() if value.requires_grad}
    assert trained == saved.keys() and weights.lora.rank == weights.lora.alpha == 4
    assert all(torch.equal(weights(name), saved[name] * (4 if ".lora_B." in name else 1)) for name in saved)
    base = load_file(weight_file(PIPELINE))
    frozen = {name: weights(name) for name, value in transformer.named_parameters() if not value.requires_grad}
    assert {name.replace(".base_layer", "") for name in frozen} == base.keys()
    assert all(torch.equal(value, base[name.replace(".base_layer", "")]) for name, value in frozen.items())


def test_the_vae_is_the_folders(tmp_path):
    """Loaded strictly: the numbers of the file, in the asked dtype."""
    weights = load_file(weight_file(PIPELINE, "vae"))
    loaded = load_vae(PIPELINE, AutoencoderKL, torch.float32, "cpu").state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[k], weights[k].float()) for k in weights)


class Crossings(TorchDispatchMode):
    """Ops that read or write tensors of two devices: on a GPU the host would wait for each."""

    def __init__(self, seen):
        super().__init__()
        self.seen, self.count = seen, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.count += 1
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.seen.append(str(func))
        return result


class NumbersOfTheHost(TorchFunctionMode):
    """Calls that make a device's tensor of numbers that Python holds, which no dispatched op shows."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        indexed = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        index = args[1] if indexed else ()
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, (list, tuple)) for part in parts) or func in (torch.tensor, torch.as_tensor):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_wavefront_never_waits_for_its_device(monkeypatch):
    """On the meta device, whose values nobody can read: an `item`, a `nonzero` or a branch on a tensor raises, and what
    is copied to or from the host is seen."""
    transformer, _ = meta_transformer(PIPELINE)
    meta = FluxBackbone.hollow(transformer, PIPELINE, SMALL)
    conditioning = meta.encode(CAPTIONS[:2])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # meta tensors have no addresses to compare
    chosen = replace(ops.choose("extension"), device_type="meta")
    plan = e_grpo(make_schedule(6), [4, 2, 3], [1, 1, 2], antithetic=True)
    made = Wavefront(plan, 2, meta.latent_shape, chosen, "meta", micro_batch=5)
    key = NoiseKey(5, 0, torch.empty(2, dtype=torch.int64, device="meta"))
    other, _ = meta_transformer(PIPELINE)
    cache = TailCache(TaylorSeerConfig(name="taylor_seer"), other, FluxBackbone.blocks(other), torch.float32)
    policy, tail = (
        lambda x, t, rows, module=module: meta.velocity(module, x, t, conditioning, rows)
        for module in (transformer, other)
    )
    for options in ({}, {"tail": TailVelocity(tail, cache)}):
        seen = []
        with NumbersOfTheHost(seen), Crossings(seen) as crossings:
            rollout = made.run(policy, key, **options)
        assert rollout.final_latents.shape == (2, 9, *meta.latent_shape)
        assert not seen and crossings.count > 1000
    assert 0 < cache.computed < cache.asked


@pytest.mark.parametrize(
    "wait",
    [
        pytest.param(lambda x: x[[0, 1]], id="index"),
        pytest.param(lambda x: torch.tensor([1.0], device="meta"), id="tensor"),
        pytest.param(lambda x: x.cpu(), id="cpu"),
        pytest.param(lambda x: torch.ones(2).to(x), id="to"),
        pytest.param(lambda x: x.sum().item(), id="item"),
        pytest.param(lambda x: x.nonzero(), id="nonzero"),
        pytest.param(lambda x: 1 if x.all() else 0, id="bool"),
    ],
)
def test_a_wait_is_seen(wait):
    seen = []
    with NumbersOfTheHost(seen), Crossings(seen):
        try:
            wait(torch.empty(2, device="meta"))
        except (RuntimeError, NotImplementedError):
            return
    assert seen


def test_compiled_blocks_are_compiled_once_for_any_number_of_rows(backbone):
    """For one prompt and for several, and give what the eager model gives. Other weights compile nothing either."""
    compiled = CompiledFlux.of(backbone.transformer, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]

    def run(rows, prompts):
        conditioning, rows = backbone.encode(CAPTIONS[:prompts]), torch.arange(rows) % prompts
        x = torch.randn(len(rows), *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
        weights = {name: value.detach().clone() for name, value in backbone.transformer.state_dict().items()}
        compiled.load_state_dict(weights, assign=True)
        with torch.no_grad():
            ours, eager = (backbone.velocity(m, x, 0.7, conditioning, rows) for m in (compiled, backbone.transformer))
        assert ours.shape == eager.shape and torch.allclose(ours, eager, rtol=0, atol=1e-5)
        compiled.to("meta")
        return graphs["unique_graphs"]

    before, one = graphs["unique_graphs"], run(4, prompts=1)
    several = run(4, prompts=3)
    assert before < one < several <= before + 2 * (one - before)
    assert [run(rows, prompts) for rows in (1, 13, 24, 2, 1) for prompts in (1, 3)] == [several] * 10
    assert isinstance(compiled.transformer_blocks[0], type(backbone.transformer.transformer_blocks[0]))


def test_what_rows_of_one_prompt_share_is_computed_once(backbone):
    """Modulation of all rows by one, and the same velocity as where every row has its own."""
    x = torch.randn(5, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    one, two, rows = backbone.encode(CAPTIONS[:1]), backbone.encode(CAPTIONS[:1] * 2), torch.arange(5) % 2
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, given, made: seen.append(len(made)))
        for name, module in backbone.transformer.named_modules()
        if name.startswith("time_text_embed.") or name.endswith(("norm1.linear", "norm.linear", "norm_out.linear"))
    ]
    with torch.no_grad():
        shared = backbone.velocity(backbone.transformer, x, 0.7, one, torch.zeros_like(rows))
        assert set(seen) == {1}
        seen.clear()
        separate = backbone.velocity(backbone.transformer, x, 0.7, two, rows)
    assert set(seen) == {5} and torch.allclose(shared, separate, rtol=0, atol=1e-5)
    for hook in hooks:
        hook.remove()
