"""What is Qwen-Image 2.1's alone: its cache of the text, the grid of its Turbo, its clock, what it refuses.

The rest is tests/models/test_families.py.
"""

import json

import diffusers
import pytest
import torch

from egrpo_fast import noise
from egrpo_fast.config import ModelConfig, TailConfig
from egrpo_fast.models.folder import configs_of, family_of
from egrpo_fast.models.random import make_pipeline
from egrpo_fast.models.tail import TailModel
from egrpo_fast.policy import Policy
from egrpo_fast.schedule import make_schedule

CPU = torch.device("cpu")
TURBO = [1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568]
ROW = torch.zeros(1, dtype=torch.int64)


@pytest.fixture
def folder(tmp_path):
    make_pipeline("qwen-image-2.1").save_pretrained(tmp_path)
    return tmp_path


def open_policy(folder, **settings):
    sizes = {"height": 64, "width": 96, "max_sequence_length": 60, "dtype": "float32"}
    return Policy(ModelConfig(path=str(folder), **(sizes | settings)), folder)


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("prompt", ["a café at night", ""])
@pytest.mark.parametrize("sigmas", [None, TURBO], ids=["uniform", "turbo"])
def test_the_pipeline_with_and_without_its_cache_of_the_text_ends_at_the_same_latents(folder, prompt, sigmas):
    """Ours after the whole grid, which for Turbo is that of its index, whatever number of steps is asked for."""
    change(folder / "model_index.json", sample_sigmas=sigmas)
    policy, steps = open_policy(folder).load(CPU), 8
    start = noise.initial_noise(5, 0, ROW, policy.latent_shape)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    schedule, velocity = make_schedule(steps, policy.times(steps, "auto")), policy.velocity(policy.encode([prompt]))
    x = start
    with torch.no_grad():
        for i in range(steps):
            x = x + schedule.ode(i, i + 1).c_v * velocity(x, schedule.times[i], ROW)
    for cached in (False, True):
        theirs = pipeline(
            prompt=prompt, height=64, width=96, latents=start, num_inference_steps=8 if sigmas is None else 3,
            output_type="latent", use_kv_cache=cached,
        ).images  # fmt: skip
        torch.testing.assert_close(x, theirs, rtol=1e-5, atol=1e-5)


def test_turbo_has_one_grid(folder):
    change(folder / "model_index.json", sample_sigmas=TURBO)
    with pytest.raises(ValueError, match=r"^schedule.shift: auto is the grid of 8 steps in .*, not of 4;"):
        open_policy(folder).times(4, "auto")


def test_a_cache_of_the_tail_skips_blocks(folder):
    policy, found = open_policy(folder).load(CPU), []
    conditioning = policy.encode(["a café at night"])
    x = noise.initial_noise(5, 0, ROW, policy.latent_shape)
    for warm_up in (100, 1):
        model = TailModel(TailConfig(cache={"name": "taylor_seer", "warm_up": warm_up}), policy.transformer, folder,
                          torch.float32)  # fmt: skip
        model.load(policy.backbone, CPU)
        with model.following(policy.transformer), model.cache.sequence(0, 0), torch.no_grad():
            found.append([model.velocity(x, t, conditioning, ROW) for t in (0.9, 0.7, 0.5)])
        assert (model.cache.computed == model.cache.asked) == (warm_up == 100)
    exact = [policy.velocity(conditioning)(x, t, ROW) for t in (0.9, 0.7, 0.5)]
    whole, skipping = map(torch.cat, found)
    torch.testing.assert_close(whole, torch.cat(exact), rtol=0, atol=1e-5)
    assert (skipping - whole).abs().max() > 1e-4


def test_its_clock_is_not_rounded_with_the_weights(folder):
    """Who casts a model casts its buffers, too. A table of frequencies would be far off, so there is none."""
    assert not list(open_policy(folder).transformer.buffers())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"height": 48}, "^model.height: 48 is not a multiple of 32$"),
        ({"width": 88}, "^model.width: 88 is not a multiple of 32$"),
        ({"causal_condition": False}, "^model.path: the transformer of .* has causal_condition false"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(settings, told, folder):
    if "causal_condition" in settings:
        change(folder / "transformer" / "config.json", **settings)
        settings = {}
    with pytest.raises(ValueError, match=told):
        open_policy(folder, **settings)


def test_the_known_model_is_sampled_without_guidance_on_a_grid_that_ends_early():
    folder, model = configs_of("Qwen/Qwen-Image-2.1"), ModelConfig(path="Qwen/Qwen-Image-2.1", height=1024, width=1024)
    family = family_of(folder)
    assert not family.guidance(folder, model).two
    assert family.times(folder, model, 40)[-2] == pytest.approx(0.02)
