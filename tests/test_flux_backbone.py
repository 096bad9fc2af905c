"""Our FLUX room against diffusers' own FluxPipeline on the embedded pipeline."""

import shutil

import pytest
import torch
from diffusers import FluxPipeline

from egrpo_fast import noise, ops
from egrpo_fast.backbones.flux import FluxBackbone, check_folder
from egrpo_fast.objective import Objective, policy_mismatch
from egrpo_fast.plan import e_grpo_plan, ode_plan
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.schedule import make_schedule
from egrpo_fast.shapes import PIPELINE, PROMPTS

CAPTIONS = PROMPTS["held_out"].read_text().splitlines()[:3]
KEY = NoiseKey(5, 0, torch.arange(3))


@pytest.fixture(scope="module")
def backbone():
    return FluxBackbone.from_pretrained(str(PIPELINE), 32, 32, max_sequence_length=24)


def sample(backbone, num_steps=16, micro_batch=None):
    wavefront = Wavefront(
        ode_plan(make_schedule(num_steps)), 3, backbone.latent_shape, ops.choose("reference"), micro_batch=micro_batch
    )
    conditioning = backbone.encode(CAPTIONS)
    return wavefront.run(
        lambda latents, t, rows: backbone.velocity(backbone.transformer, latents, t, conditioning, rows), KEY
    ).anchor_latents


def test_the_ode_sampler_reproduces_the_pipeline_step_for_step(backbone):
    """Packing, ids, time, guidance and shift: the pipeline's latents after every step, and its pictures."""
    start = noise.initial_noise(5, 0, KEY.prompts, backbone.latent_shape)
    steps = []
    pipeline = FluxPipeline.from_pretrained(PIPELINE)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        CAPTIONS, height=32, width=32, num_inference_steps=16, guidance_scale=3.5, max_sequence_length=24,
        latents=start, output_type="pt",
        callback_on_step_end=lambda pipe, i, t, values: steps.append(values["latents"].clone()) or {},
    ).images  # fmt: skip
    schedule, conditioning, x = make_schedule(16), backbone.encode(CAPTIONS), start
    with torch.no_grad():
        for i, theirs in enumerate(steps):
            v = backbone.velocity(backbone.transformer, x, schedule.times[i], conditioning, torch.arange(3))
            x = x + schedule.ode(i, i + 1).c_v * v
            assert torch.allclose(x, theirs, rtol=0, atol=2e-4), f"step {i}"
    latents = sample(backbone)
    assert torch.allclose(latents, steps[-1], rtol=0, atol=2e-4)
    assert torch.allclose(backbone.decode(latents), pictures, rtol=0, atol=1e-3)


@pytest.mark.parametrize("micro_batch", [1, 7, None], ids=["1", "7", "all"])
def test_the_ratio_is_exactly_one_before_the_first_update(backbone, micro_batch):
    """The rollout at any micro-batch; old policy: a forward without gradient, new: one with. The real transformer."""
    plan = e_grpo_plan(make_schedule(4, active_steps=[0, 1]), [4, 3], [1, 1])
    chosen, conditioning, rows = ops.choose("reference"), backbone.encode(CAPTIONS), torch.arange(3)

    def velocity(latents, t, rows):
        return backbone.velocity(backbone.transformer, latents, t, conditioning, rows)

    rollout = Wavefront(plan, 3, backbone.latent_shape, chosen, micro_batch=micro_batch).run(velocity, KEY)
    for n, group in enumerate(plan.groups):
        with torch.no_grad():
            old = velocity(rollout.states[n], group.time, rows)
        new = velocity(rollout.states[n], group.time, rows)
        rewards = torch.rand(1, 3, len(group.rows))
        ratio = Objective(chosen, (1.0,))(group, KEY, new, old, rewards).log_ratio.exp()
        assert torch.equal(ratio, torch.ones(3, len(group.rows)))
        moved = Objective(chosen, (1.0,))(group, KEY, new + 1e-3, old, rewards).log_ratio
        assert (moved != 0).all() and policy_mismatch(group, old, rollout.velocities[n]) < 1e-5


def test_micro_batches_agree(backbone):
    assert torch.allclose(sample(backbone, 4, micro_batch=1), sample(backbone, 4), rtol=0, atol=1e-4)


def test_saved_weights_load_back(backbone, tmp_path):
    changed = {name: value + 0.01 for name, value in backbone.transformer.state_dict().items()}
    backbone.save(tmp_path / "saved", changed)
    again = FluxPipeline.from_pretrained(tmp_path / "saved").transformer.state_dict()
    assert again.keys() == changed.keys()
    assert all(torch.equal(again[name], changed[name]) for name in changed)


def damaged(tmp_path, damage):
    folder = tmp_path / "pipeline"
    shutil.copytree(PIPELINE, folder)
    damage(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        pytest.param(lambda f: (f / "model_index.json").unlink(), "no model_index.json", id="no index"),
        pytest.param(lambda f: (f / "model_index.json").write_text("{"), "cannot be read", id="broken index"),
        pytest.param(lambda f: (f / "model_index.json").write_text('{"_class_name": "X"}'), "holds a X", id="class"),
        pytest.param(lambda f: shutil.rmtree(f / "transformer"), "lacks transformer", id="no transformer"),
        pytest.param(
            lambda f: next((f / "transformer").glob("*.safetensors")).write_bytes(b"\0" * 100), "could not be loaded",
            id="corrupt weights",
        ),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_by_name(damage, told, tmp_path):
    with pytest.raises(ValueError, match=f"model.path: .*{told}"):
        FluxBackbone.from_pretrained(damaged(tmp_path, damage), 32, 32)


def test_bad_sizes_and_paths_are_refused_before_loading(tmp_path):
    with pytest.raises(ValueError, match="model.width: 30 is not a multiple of 4"):
        check_folder(str(PIPELINE), 32, 30)
    with pytest.raises(ValueError, match="model.path: no folder"):
        check_folder(str(tmp_path / "absent"), 32, 32)
