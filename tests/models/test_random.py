"""The script that makes folders with random weights: whole, loadable, the same for the same seed."""

import json
import sys

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

from egrpo_fast.models import random
from egrpo_fast.models.flux.random import SIZES

PROMPTS = ["a café at night, watercolour — by nobody", "two dogs in the snow"]


def make(monkeypatch, folder, *options):
    monkeypatch.setattr(sys, "argv", ["random", str(folder), "--size", "tiny", *options])
    random.main()
    return folder


def test_a_folder_draws_images_that_hear_prompt_and_noise(monkeypatch, tmp_path):
    pipeline = FluxPipeline.from_pretrained(make(monkeypatch, tmp_path / "tiny"))
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))

    def draw(prompt, noise):
        return pipeline(
            prompt, height=64, width=48, num_inference_steps=2, max_sequence_length=32, latents=noise, output_type="pt"
        ).images

    here, other_prompt, other_noise = draw(PROMPTS[0], noise), draw(PROMPTS[1], noise), draw(PROMPTS[0], noise.flip(1))
    assert here.shape == (1, 3, 64, 48) and here.isfinite().all() and here.std() > 0.02
    assert (here - other_prompt).abs().mean() > 1e-4 and (here - other_noise).abs().mean() > 1e-2


def test_shards_dtype_and_no_guidance(monkeypatch, tmp_path):
    options = ("--family", "flux-schnell", "--shard-size", "400KB", "--dtype", "bfloat16")
    folder = make(monkeypatch, tmp_path / "tiny", *options)
    transformer = folder / "transformer"
    index = json.loads((transformer / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(transformer.glob("*.safetensors"))
    assert len(shards) > 1 and {path.name for path in shards} == set(index["weight_map"].values())
    weights = {name: value for path in shards for name, value in load_file(path).items()}
    assert set(weights) == set(index["weight_map"])
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert not any("guidance" in name for name in weights)
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert not pipeline.transformer.config.guidance_embeds


def test_the_seed_makes_the_weights():
    def weights(seed):
        pipeline = random.make_pipeline("flux-dev", "tiny", seed)
        parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
        return [tensor for part in parts for tensor in part.state_dict().values()]

    before = torch.get_rng_state()
    first, again, other = weights(0), weights(0), weights(1)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("size", "millions"), [("tiny", 0.3), ("small", 5), ("medium", 491)])
def test_sizes(size, millions):
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            **SIZES[size], in_channels=64, joint_attention_dim=64, pooled_projection_dim=64,
            guidance_embeds=True,
        )  # fmt: skip
    assert transformer.num_parameters() / 1e6 == pytest.approx(millions, abs=0.5)
