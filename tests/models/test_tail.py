"""The tail's own model and decoder: the policy's weights, other checkpoints, LoRAs, 8 bits, caches; what is refused."""

import copy
import re
import shutil
import sys
from functools import partial

import peft
import pytest
import torch
from diffusers import AutoencoderTiny, FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves

from egrpo_fast import ops
from egrpo_fast.commands.cluster import Cluster
from egrpo_fast.commands.cost import Cost
from egrpo_fast.config import LoraConfig, ModelConfig, TailConfig, TaylorSeerConfig, load_config
from egrpo_fast.methods.e_grpo import e_grpo
from egrpo_fast.models import folder as folders
from egrpo_fast.models import tail as tail_models
from egrpo_fast.models.flux.backbone import FluxBackbone
from egrpo_fast.models.flux.compiled import CompiledFlux
from egrpo_fast.models.lora import save_lora
from egrpo_fast.models.tail import TailModel, slow_tail, with_local_tail
from egrpo_fast.models.transformer import meta_transformer
from egrpo_fast.policy import Policy
from egrpo_fast.rollout import NoiseKey, TailVelocity, Wavefront
from egrpo_fast.schedule import make_schedule
from egrpo_fast.shapes import PIPELINE

CPU, TIME = torch.device("cpu"), 0.5
ROWS = torch.zeros(2, dtype=torch.int64)
SMALL = ModelConfig(path=str(PIPELINE), height=32, width=32, max_sequence_length=24, dtype="float32")


CACHE = TaylorSeerConfig(name="taylor_seer", warm_up=1)


@pytest.fixture(scope="module")
def backbone():
    return Policy(SMALL, PIPELINE).load(torch.device("cpu")).backbone


@pytest.fixture(scope="module")
def conditioning(backbone):
    return backbone.encode(["a red circle"])


@pytest.fixture(scope="module")
def latents(backbone):
    return torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))


ADAPTERS = LoraConfig(rank=3, alpha=6, target_modules=["to_q", "to_out.0"])


@pytest.fixture(scope="module")
def adapters():
    transformer, _ = meta_transformer(PIPELINE, ADAPTERS)
    generator = torch.Generator().manual_seed(1)
    shapes = {name: parameter.shape for name, parameter in transformer.named_parameters() if ".lora_" in name}
    return {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}


def another(backbone, scale=1.1):
    """A policy with other weights."""
    policy = FluxTransformer2DModel.from_config(backbone.transformer.config).eval()
    policy.load_state_dict({name: scale * value for name, value in backbone.transformer.state_dict().items()})
    return policy


def model_of(backbone, **settings):
    return loaded(TailConfig(**settings), backbone)


def loaded(settings, backbone, compiled=False):
    model = TailModel(settings, backbone.transformer, PIPELINE, torch.float32, compiled)
    model.load(backbone, CPU)
    return model


def velocity(backbone, module, latents, conditioning):
    with torch.no_grad():
        return backbone.velocity(module, latents, TIME, conditioning, ROWS)


def test_without_a_model_of_its_own_there_is_none():
    policy = Policy(SMALL, PIPELINE)
    policy.use_tail(TailConfig(cache=CACHE))
    assert policy.tail is not None
    policy.use_tail(TailConfig(stride=4, solver="ab2"))
    assert policy.tail is None and policy.tail_velocity(None) is None


def test_attention_is_computed_as_the_policys(backbone):
    policy = another(backbone)
    for processor in policy.attn_processors.values():  # the setter would change the default of this process, too
        processor._attention_backend = AttentionBackendName._NATIVE_MATH
    chosen = copy.copy(backbone)
    chosen.transformer = policy
    processors = model_of(chosen, cache=CACHE).transformer.attn_processors.values()
    assert {processor._attention_backend.value for processor in processors} == {"_native_math"}


def test_another_checkpoint_never_follows(backbone, conditioning, latents, tmp_path):
    """It is what is in its folder, before and after the policy has moved."""
    other = another(backbone)
    shutil.copytree(PIPELINE, tmp_path / "other")
    weights = {name: value.contiguous() for name, value in other.state_dict().items()}
    save_file(weights, tmp_path / "other" / "transformer" / "diffusion_pytorch_model.safetensors")
    model = model_of(backbone, path=str(tmp_path / "other"))
    expected = velocity(backbone, other, latents, conditioning)
    for policy in (backbone.transformer, another(backbone, 0.9)):
        with model.following(policy):
            assert torch.equal(model.velocity(latents, TIME, conditioning, ROWS), expected)


def adapted(policy, adapters):
    """The policy with these adapters beside its weights, as peft trains them."""
    rank, alpha, targets = ADAPTERS.rank, ADAPTERS.alpha, ADAPTERS.target_modules
    policy.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    policy.load_state_dict(adapters, strict=False)
    return policy.eval()


def test_a_lora_is_added_to_the_policy_of_each_rollout(backbone, conditioning, latents, adapters, tmp_path):
    save_lora(tmp_path, adapters, ADAPTERS, FluxPipeline)
    model = model_of(backbone, lora=str(tmp_path))
    for policy in (another(backbone, 1.0), another(backbone)):
        with model.following(policy):
            found = model.velocity(latents, TIME, conditioning, ROWS)
        plain = velocity(backbone, policy, latents, conditioning)
        expected = velocity(backbone, adapted(policy, adapters), latents, conditioning)
        assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, plain, atol=1e-2)


def test_a_copy_of_a_policy_that_trains_adapters_has_them_merged(backbone, conditioning, latents, adapters):
    policy = adapted(another(backbone, 1.0), adapters)
    model = loaded(TailConfig(), backbone)
    expected = velocity(backbone, policy, latents, conditioning)
    with model.following(policy):
        assert torch.allclose(model.velocity(latents, TIME, conditioning, ROWS), expected, atol=1e-4)


def test_eight_bits_follow_the_policy(backbone, conditioning, latents):
    pytest.importorskip("torchao")
    model = model_of(backbone, quantization="int8")
    for policy in (backbone.transformer, another(backbone)):
        with model.following(policy):
            found = model.velocity(latents, TIME, conditioning, ROWS)
        expected = velocity(backbone, policy, latents, conditioning)
        assert 0 < ((found - expected).norm() / expected.norm()).item() < 0.03


@pytest.mark.parametrize("quantization", ["none", pytest.param("int8", marks=pytest.mark.slow)])
def test_compiled_it_is_the_same_and_compiled_once(quantization, backbone, conditioning, latents, monkeypatch):
    """Whatever the policy's weights, and for any number of rows; in 8 bits too."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(FluxBackbone, "compiled", partial(CompiledFlux.of, backend="aot_eager"))
    settings = TailConfig(quantization=quantization), backbone
    model, eager = loaded(*settings, compiled=True), loaded(*settings)
    graphs, made = torch._dynamo.utils.counters["stats"], []
    for policy in (backbone.transformer, another(backbone)):
        for rows in (2, 1):
            arguments = latents[:rows], TIME, conditioning, ROWS[:rows]
            with model.following(policy), eager.following(policy):
                assert torch.allclose(model.velocity(*arguments), eager.velocity(*arguments), atol=1e-4)
            made.append(graphs["unique_graphs"])
    assert len(set(made)) == 1 and made[0] > 0
    assert isinstance(model.transformer, CompiledFlux) and not isinstance(eager.transformer, CompiledFlux)


def addresses(module):
    return {name: parameter.data_ptr() for name, parameter in module.named_parameters()}


def test_a_weight_that_stays_as_it_is_is_the_policys_own(backbone, adapters, tmp_path):
    """For the length of a rollout, be it one that fails; then there is none. A LoRA copies the layers it changes."""
    save_lora(tmp_path, adapters, ADAPTERS, FluxPipeline)
    policy, changed = backbone.transformer, {name.partition(".lora_")[0] + ".weight" for name in adapters}
    for settings, own in (({"cache": CACHE}, set()), ({"lora": str(tmp_path)}, changed)):
        model = model_of(backbone, **settings)
        with pytest.raises(torch.OutOfMemoryError), model.following(policy):
            theirs, ours = addresses(policy), addresses(model.transformer)
            assert {name for name in theirs if ours[name] != theirs[name]} == own
            raise torch.OutOfMemoryError
        assert all(parameter.is_meta for parameter in model.transformer.parameters())


PLAN = e_grpo(make_schedule(6, merge_lengths=1, active_steps=[0, 2]), [2, 2], [1, 1])
BLOCKS = 6


def roll_out(backbone, model, prompts=("a red circle",), micro_batch=None, cache=None, plan=PLAN):
    """Images [P, 4, L, C] of prompts whose tails are the model's; those of the policy where there is none."""
    conditioning = backbone.encode(list(prompts))
    made = Wavefront(plan, len(prompts), backbone.latent_shape, ops.choose("reference"), micro_batch=micro_batch)
    key = NoiseKey(7, 3, torch.tensor([sum(map(ord, prompt)) for prompt in prompts]))

    def policy(x, t, rows):
        return backbone.velocity(backbone.transformer, x, t, conditioning, rows)

    if model is None:
        return made.run(policy, key).final_latents
    with model.following(backbone.transformer):
        tail = TailVelocity(lambda x, t, rows: model.velocity(x, t, conditioning, rows), cache or model.cache)
        return made.run(policy, key, tail=tail).final_latents


def test_a_cache_that_warms_up_for_all_steps_skips_nothing(backbone):
    model = model_of(backbone, cache=CACHE.model_copy(update={"warm_up": 100}))
    assert torch.allclose(roll_out(backbone, model), roll_out(backbone, None), rtol=0, atol=1e-4)
    assert model.cache.computed == model.cache.asked == BLOCKS * PLAN.tail_evaluations


@pytest.mark.parametrize("other", ["lora", "quantization"])
def test_a_cache_combines_with_what_else_is_the_tails(backbone, adapters, other, tmp_path):
    if other == "quantization":
        pytest.importorskip("torchao")
    save_lora(tmp_path, adapters, ADAPTERS, FluxPipeline)
    settings = {other: {"lora": str(tmp_path), "quantization": "int8"}[other]}
    plain, skipping = model_of(backbone, **settings), model_of(backbone, **settings, cache=CACHE)
    nothing = model_of(backbone, **settings, cache=CACHE.model_copy(update={"warm_up": 100}))
    exact, fast, slow = (roll_out(backbone, model) for model in (plain, skipping, nothing))
    assert torch.allclose(slow, exact, rtol=0, atol=1e-4) and not torch.allclose(slow, fast, rtol=0, atol=1e-3)
    assert skipping.cache.computed < skipping.cache.asked


class OneForAll:
    """A cache whose families share one state."""

    def __init__(self, cache):
        self.cache = cache
        self.forget = cache.forget

    def sequence(self, family, chunk):
        return self.cache.sequence(0, 0)


def test_every_family_of_every_prompt_keeps_its_own(backbone):
    """Two prompts in a wavefront are as they are alone, whose rows are as they are in a plan of one family; a state
    that all share gives something else, and no rollout finds what another left."""
    prompts, model = ("a red circle", "two blue squares"), model_of(backbone, cache=CACHE)
    both, again = roll_out(backbone, model, prompts), roll_out(backbone, model, prompts)
    assert 0.2 < model.cache.computed / model.cache.asked < 0.9
    assert torch.equal(both, again)
    for prompt, images in zip(prompts, both):
        assert torch.allclose(roll_out(backbone, model, [prompt])[0], images, rtol=0, atol=1e-4)
    for active, some in zip((0, 2), both[0].split(2)):
        plan = e_grpo(make_schedule(6, merge_lengths=1, active_steps=[active]), [2], [1])
        assert torch.allclose(roll_out(backbone, model, plan=plan)[0], some, rtol=0, atol=1e-4)
    shared = roll_out(backbone, model, prompts, cache=OneForAll(model.cache))
    assert not torch.allclose(shared, both, rtol=0, atol=1e-2)


def kept(model):
    """Bytes that the hooks hold."""
    registries = [getattr(module, "_diffusers_hook", None) for module in model.transformer.modules()]
    managers = {hook.state_manager for one in registries if one for hook in one.hooks.values()}
    assert managers
    leaves = tree_leaves([vars(state) for manager in managers for state in manager._state_cache.values()])
    return sum(leaf.numel() * leaf.itemsize for leaf in leaves if isinstance(leaf, torch.Tensor))


def test_a_rollout_out_of_memory_begins_again_with_nothing(backbone):
    """As if it had been asked to split the families' rows at once."""
    model = model_of(backbone, cache=CACHE)
    expected, plain, seen = roll_out(backbone, model, micro_batch=1), model.velocity, []

    def fails(latents, *rest):
        seen.append(kept(model))
        if len(seen) == 6:
            raise torch.OutOfMemoryError
        return plain(latents, *rest)

    model.velocity = fails
    with pytest.raises(torch.OutOfMemoryError):
        roll_out(backbone, model)
    assert max(seen) > 0 == kept(model)
    assert torch.equal(roll_out(backbone, model, micro_batch=1), expected) and kept(model) == 0


def test_the_cost_knows_what_a_cache_keeps(backbone):
    model, held = model_of(backbone, cache=CACHE), []
    forget = model.cache.forget
    model.cache.forget = lambda: (held.append(kept(model)), forget())
    roll_out(backbone, model)
    plan = ["schedule.num_steps=6", "schedule.merge_lengths=1", "schedule.active_steps=[0,2]", "rollout.group_size=2"]
    config = load_config("shapes", [*plan, f"tail.cache={CACHE.model_dump_json()}"])
    assert held == [Cost(config, Cluster(1, 1, "cpu")).memory.phases["rollout"]["the tail's cache"]]


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_seer_is_the_series_in_steps(backbone, order):
    """Steps 0, 1, 3 and 6 of a tail are computed; f_0 is the velocity, f_n the last change of f_(n-1) per step, and
    between them the velocity is the sum of k^n f_n / n!."""
    cache = TaylorSeerConfig(name="taylor_seer", interval=3, warm_up=2, order=order)
    model, conditioning = model_of(backbone, cache=cache), backbone.encode(["a red circle"])
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    factors, last = [], None
    with model.following(backbone.transformer):
        for step in range(8):
            t = 1 - step / 10
            with model.cache.sequence(0, 0), torch.no_grad():
                found = model.velocity(x, t, conditioning, ROWS)
            if step in (0, 1, 3, 6):
                with torch.no_grad():
                    before, factors = factors, [backbone.velocity(backbone.transformer, x, t, conditioning, ROWS)]
                factors += [(factors[0] - before[0]) / (step - last)] if before else []
                factors += [(factors[1] - before[1]) / (step - last)] if len(before) > 1 and order > 1 else []
                last = step
            k = step - last
            expected = sum(k**n * factor / max(1, n) for n, factor in enumerate(factors))
            assert torch.allclose(found, expected, rtol=0, atol=1e-4), step
            x = x - 0.1 * found
    assert model.cache.computed * 2 == model.cache.asked


def decoder(folder, **changes):
    channels = {"latent_channels": 4, "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    settings = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), **channels, **changes}
    torch.manual_seed(0)
    made = AutoencoderTiny(**settings)
    made.save_pretrained(folder)
    return made.eval()


def test_the_tiny_decoder_serves_whom_it_is_asked_by(backbone, latents, tmp_path):
    tiny = decoder(tmp_path)
    exact = backbone.decode(latents)
    assert torch.equal(backbone.decode(latents, tiny=True), exact), "there is none yet"
    backbone.use_tiny_decoder(str(tmp_path))
    found = backbone.decode(latents, tiny=True)
    maps = latents.reshape(2, 8, 8, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 16, 16)
    with torch.no_grad():
        expected = tiny.decode(maps / tiny.config.scaling_factor + tiny.config.shift_factor).sample / 2 + 0.5
    assert torch.allclose(found, expected.clamp(0, 1), atol=1e-6) and found.std() > 0
    assert torch.equal(backbone.decode(latents), exact), "evaluations see the whole VAE"


def refused(*overrides):
    with pytest.raises(ValueError) as error:
        Policy.of(load_config("shapes", overrides), PIPELINE)
    return str(error.value)


def test_what_is_not_there_is_refused_by_name(tmp_path, monkeypatch):
    assert refused("tail.path=/nowhere") == "tail.path: no folder /nowhere"
    assert refused("tail.lora=/nowhere") == "tail.lora: no file or folder /nowhere"
    assert refused("tail.decoder=/nowhere").startswith("tail.decoder: /nowhere cannot be used: ")
    decoder(tmp_path / "deep", latent_channels=16)
    assert "16 latent channels, that of model.path has 4" in refused(f"tail.decoder={tmp_path / 'deep'}")
    assert "it is a AutoencoderKL; AutoencoderTiny is" in refused(f"tail.decoder={PIPELINE / 'vae'}")
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(tail_models.importlib.util, "find_spec", lambda name: None)
    assert refused("tail.quantization=int8").startswith("tail.quantization: int8 needs torchao; pip install")
    monkeypatch.setattr(tail_models.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = refused("tail.quantization=float8")
    assert "float8 needs compute capability 8.9 (Ada, Hopper); there is no" in told
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert refused("tail.quantization=float8").endswith("this GPU's is 8.0")


def test_a_hub_id_is_found_before_it_is_looked_at(monkeypatch):
    """By its own setting's name where it is not; a folder is left as it is."""
    config = load_config("shapes", ["tail.path=owner/name"])
    monkeypatch.setattr(folders, "snapshot_download", lambda path, **options: str(PIPELINE))
    assert with_local_tail(config).tail.path == str(PIPELINE)
    assert config.tail.path == "owner/name" and with_local_tail(load_config("shapes")).tail.path is None

    def absent(path, **options):
        raise OSError("no network")

    monkeypatch.setattr(folders, "snapshot_download", absent)
    with pytest.raises(ValueError, match=r"^tail.path: owner/name is no folder here and could not be downloaded"):
        with_local_tail(config)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], None),
        (["tail.stride=3", "rollout.compile=true"], None),
        (["tail.cache=taylor_seer"], None),
        (["tail.quantization=int8", "rollout.compile=true"], None),
        (["tail.quantization=int8"], "tail.quantization: int8 .* compiled: with rollout.compile$"),
        (["tail.quantization=int8", "rollout.compile=true", "tail.cache=taylor_seer"], "compiled: without tail.cache$"),
        (["rollout.compile=true", "tail.cache=taylor_seer"], "^rollout.compile: .* because of tail.cache$"),
    ],
)
def test_what_is_slower_than_it_seems_is_said(overrides, told):
    found = slow_tail(load_config("shapes", overrides))
    assert found is None if told is None else re.search(told, found)


def test_a_lora_of_another_model_is_refused(tmp_path):
    settings = LoraConfig(rank=2, alpha=2, target_modules=["to_q"])
    name = "transformer_blocks.0.attn.to_q.lora_{}.default.weight"
    save_lora(
        tmp_path, {name.format("A"): torch.zeros(2, 7), name.format("B"): torch.zeros(7, 2)}, settings, FluxPipeline
    )
    assert "is for another architecture (transformer_blocks.0.attn.to_q)" in refused(f"tail.lora={tmp_path}")
    save_file({"x": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    assert "tail.lora: " in refused(f"tail.lora={tmp_path}")
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    encoder = {f"{layer}.lora_A.weight": torch.zeros(2, 7), f"{layer}.lora_B.weight": torch.zeros(7, 2)}
    save_file(encoder, tmp_path / "pytorch_lora_weights.safetensors")
    assert "changes a text encoder (text_encoder." in refused(f"tail.lora={tmp_path}")
