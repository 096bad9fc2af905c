"""The tail's own model and decoder: copies of the policy, other checkpoints, LoRAs, 8 bits; and what is refused."""

import shutil
import sys

import pytest
import torch
from diffusers import AutoencoderTiny, FluxTransformer2DModel
from peft import LoraConfig
from safetensors.torch import save_file

from egrpo_fast.backbones import tail as tail_models
from egrpo_fast.backbones.flux import FluxBackbone, meta_transformer, save_lora
from egrpo_fast.backbones.tail import TailModel, check_tail
from egrpo_fast.config import Lora, Tail, load_config
from egrpo_fast.shapes import PIPELINE

CPU, TIME = torch.device("cpu"), 0.5
ROWS = torch.zeros(2, dtype=torch.int64)


@pytest.fixture(scope="module")
def backbone():
    return FluxBackbone.from_pretrained(str(PIPELINE), 32, 32, max_sequence_length=24)


@pytest.fixture(scope="module")
def conditioning(backbone):
    return backbone.encode(["a red circle"])


@pytest.fixture(scope="module")
def latents(backbone):
    return torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))


ADAPTERS = Lora(rank=3, alpha=6, target_modules=["to_q", "to_out.0"])


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
    return TailModel.of(Tail(**settings), PIPELINE, backbone, torch.float32, CPU)


def velocity(backbone, module, latents, conditioning):
    with torch.no_grad():
        return backbone.velocity(module, latents, TIME, conditioning, ROWS)


def test_without_a_model_of_its_own_there_is_none(backbone):
    assert model_of(backbone, stride=4, solver="ab2", decoder="anywhere") is None


def test_another_checkpoint_never_follows(backbone, conditioning, latents, tmp_path):
    """It is what is in its folder, before and after the policy has moved."""
    other = another(backbone)
    shutil.copytree(PIPELINE, tmp_path / "other")
    weights = {name: value.contiguous() for name, value in other.state_dict().items()}
    save_file(weights, tmp_path / "other" / "transformer" / "diffusion_pytorch_model.safetensors")
    model = model_of(backbone, path=str(tmp_path / "other"))
    expected = velocity(backbone, other, latents, conditioning)
    for policy in (backbone.transformer, another(backbone, 0.9)):
        model.refresh(policy)
        assert torch.equal(model.velocity(latents, TIME, conditioning, ROWS), expected)


def adapted(policy, adapters):
    """The policy with these adapters beside its weights, as peft trains them."""
    policy.add_adapter(LoraConfig(r=ADAPTERS.rank, lora_alpha=ADAPTERS.alpha, target_modules=ADAPTERS.target_modules))
    policy.load_state_dict(adapters, strict=False)
    return policy.eval()


def test_a_lora_is_added_to_the_policy_of_each_rollout(backbone, conditioning, latents, adapters, tmp_path):
    save_lora(tmp_path, adapters, ADAPTERS)
    model = model_of(backbone, lora=str(tmp_path))
    for policy in (another(backbone, 1.0), another(backbone)):
        model.refresh(policy)
        found = model.velocity(latents, TIME, conditioning, ROWS)
        plain = velocity(backbone, policy, latents, conditioning)
        expected = velocity(backbone, adapted(policy, adapters), latents, conditioning)
        assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, plain, atol=1e-2)


def test_a_copy_of_a_policy_that_trains_adapters_has_them_merged(backbone, conditioning, latents, adapters):
    policy = adapted(another(backbone, 1.0), adapters)
    model = TailModel(Tail(), PIPELINE, backbone, torch.float32, CPU)
    model.refresh(policy)
    expected = velocity(backbone, policy, latents, conditioning)
    assert torch.allclose(model.velocity(latents, TIME, conditioning, ROWS), expected, atol=1e-4)


def test_eight_bits_follow_the_policy(backbone, conditioning, latents):
    pytest.importorskip("torchao")
    model = model_of(backbone, weights="int8")
    for policy in (backbone.transformer, another(backbone)):
        model.refresh(policy)
        found = model.velocity(latents, TIME, conditioning, ROWS)
        expected = velocity(backbone, policy, latents, conditioning)
        assert 0 < ((found - expected).norm() / expected.norm()).item() < 0.03


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
        check_tail(load_config("shapes", overrides), str(PIPELINE))
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
    assert refused("tail.weights=int8").startswith("tail.weights: int8 needs torchao; pip install")
    monkeypatch.setattr(tail_models.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "float8 needs a GPU of compute capability 8.9 (Ada, Hopper); there is no" in refused("tail.weights=float8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert refused("tail.weights=float8").endswith("this GPU's is 8.0")


def test_a_lora_of_another_model_is_refused(tmp_path):
    settings = Lora(rank=2, alpha=2, target_modules=["to_q"])
    name = "transformer_blocks.0.attn.to_q.lora_{}.default.weight"
    save_lora(tmp_path, {name.format("A"): torch.zeros(2, 7), name.format("B"): torch.zeros(7, 2)}, settings)
    assert "is for another architecture (transformer_blocks.0.attn.to_q)" in refused(f"tail.lora={tmp_path}")
    save_file({"x": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    assert "tail.lora: " in refused(f"tail.lora={tmp_path}")
