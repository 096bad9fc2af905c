"""Every model family against its own diffusers pipeline, on small random models of its real classes."""

import inspect
import json
import shutil
from dataclasses import dataclass, field

import diffusers
import pytest
import torch

from egrpo_fast import noise
from egrpo_fast.commands.fidelity import fidelity
from egrpo_fast.config import LoraConfig, ModelConfig, TailConfig, TaylorSeerConfig
from egrpo_fast.models.attention import use_attention
from egrpo_fast.models.lora import save_lora
from egrpo_fast.models.random import make_pipeline
from egrpo_fast.models.transformer import meta_transformer
from egrpo_fast.policy import Policy
from egrpo_fast.schedule import make_schedule

PROMPTS = ["a café at night", "two dogs that chase a red kite over the sea in the snow", "rain"]


@dataclass(frozen=True)
class Family:
    """guidance: scales that are tried, the first of them without guidance. called: what the pipeline is called with,
    for each prompt."""

    guidance: tuple[float, ...] = (1.0, 4.5)
    called: dict = field(default_factory=dict)
    argument: str = "guidance_scale"
    max_sequence_length: int = 40
    """The pipeline is told, if it truncates prompts at all."""
    packs: bool = False
    """Its pipeline takes latents [B, C, h, w] that it packs itself."""
    unit: int = 16
    """Sides of an image are so many times larger than SIZES says."""
    alone: bool = False
    """Its pipeline is called for one prompt after the other, for what it makes of a row depends on its neighbours."""


FAMILIES = {
    "sd3": Family(),
    "flux2-dev": Family((1.0, 4.0), packs=True, max_sequence_length=320),
    "flux2-klein": Family((1.0, 1.0), packs=True),
    "flux2-klein-base": Family((1.0, 4.0), packs=True),
    "qwen-image": Family(argument="true_cfg_scale", called={"negative_prompt": ""}),
    "qwen-image-2.1": Family(
        argument="true_cfg_scale", called={"negative_prompt": ""}, max_sequence_length=80, unit=32, alone=True
    ),
    "z-image": Family((0.0, 4.0)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """(name, folder)"""
    folder = tmp_path_factory.mktemp(request.param)
    make_pipeline(request.param).save_pretrained(folder)
    return request.param, folder


def open_model(made, **settings):
    name, folder = made
    model = {"dtype": "float32", "max_sequence_length": FAMILIES[name].max_sequence_length} | settings
    return Policy(ModelConfig(path=str(folder), **model), folder).load(torch.device("cpu"))


def open_pipeline(folder, dtype=torch.float32):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sides(name, rows=5, columns=6):
    unit = FAMILIES[name].unit
    return {"height": rows * unit, "width": columns * unit}


def their_latents(name, latents, height, width):
    """Our [B, L, C] as the pipeline takes them."""
    if FAMILIES[name].packs:
        return latents.transpose(1, 2).unflatten(2, (height // 16, width // 16))
    return latents.unflatten(2, (height // 8, width // 8)) if latents.shape[1] == 16 else latents


def their_run(name, pipeline, start, steps, scale, height, width):
    """Of PROMPTS by the pipeline: latents after every step, and images."""
    family = FAMILIES[name]
    called = {family.argument: scale, "height": height, "width": width, "num_inference_steps": steps}
    if "max_sequence_length" in inspect.signature(pipeline.__call__).parameters:
        called["max_sequence_length"] = family.max_sequence_length
    found = []
    for rows in [slice(row, row + 1) for row in range(len(PROMPTS))] if family.alone else [slice(None)]:
        prompts, latents, after = PROMPTS[rows], start[rows], []
        images = pipeline(
            prompt=prompts, latents=their_latents(name, latents, height, width), output_type="pt",
            callback_on_step_end=lambda pipe, i, t, values, after=after: after.append(values["latents"].clone()) or {},
            **called, **{key: [value] * len(prompts) for key, value in family.called.items()},
        ).images  # fmt: skip
        found.append((*after, images))
    *after, images = (torch.cat(parts) for parts in zip(*found))
    return after, over_white(images)


def over_white(images):
    colour, alpha = images.tensor_split((3,), dim=1)
    return colour * alpha + 1 - alpha if alpha.shape[1] else colour


SIZES = [(5, 9), (6, 6), (11, 7)]


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_ode_sampler_reproduces_the_pipeline(made, rows, columns, dtype, guided, steps=3):
    """Latents after every step, each from the pipeline's own before it, and the images: prompts of mixed length."""
    name, folder = made
    family = FAMILIES[name]
    scale = family.guidance[guided]
    size = sides(name, rows, columns)
    policy = open_model(made, **size, dtype=dtype, guidance_scale=scale)
    start = noise.initial_noise(5, 0, torch.arange(len(PROMPTS)), policy.latent_shape).to(policy.dtype)
    after, images = their_run(name, open_pipeline(folder, policy.dtype), start, steps, scale, **size)
    schedule = make_schedule(steps, policy.times(steps, "auto"))
    velocity, rows, x = policy.velocity(policy.encode(PROMPTS)), torch.arange(len(PROMPTS)), start.float()
    bound = 1e-5 if dtype == "float32" else 0.02 * (1 + scale)
    with torch.no_grad():
        for i, theirs in enumerate(after):
            v = velocity(x.to(policy.dtype), schedule.times[i], rows)
            ours = x + schedule.ode(i, i + 1).c_v * v.float()
            theirs = theirs.float().reshape(ours.shape)
            assert v.std() > 0.05
            torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound, msg=lambda m, i=i: f"step {i}: {m}")
            x = theirs
    assert len(after) == steps
    ours, theirs = policy.decode(x.to(policy.dtype)), images.float()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if dtype == "float32" else 0.15)
    assert (ours - theirs).abs().mean() < 0.01


def test_a_row_hears_its_own_prompt_and_no_other(made):
    """Alone, or beside shorter and longer prompts in any order: the same but for rounding. 1e-5, in float32."""
    policy = open_model(made, **sides(made[0]), guidance_scale=FAMILIES[made[0]].guidance[1])
    x = noise.initial_noise(5, 0, torch.arange(len(PROMPTS)), policy.latent_shape)
    with torch.no_grad():
        together = policy.velocity(policy.encode(PROMPTS))
        rows = torch.tensor([2, 0, 1, 1])
        beside = together(x[rows], 0.7, rows)
        for row, found in zip(rows.tolist(), beside):
            (alone,) = policy.velocity(policy.encode([PROMPTS[row]]))(x[row : row + 1], 0.7, torch.zeros(1).long())
            (another,) = policy.velocity(policy.encode(["a red cat"]))(x[row : row + 1], 0.7, torch.zeros(1).long())
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
            assert (found - another).abs().max() > 1e-3


@pytest.mark.parametrize("train", ["both", "conditional"])
def test_guidance_in_one_call_and_in_two(made, train):
    """The same velocity; the gradient of both is that of the formula, of one that of the prompt's velocity alone."""
    family = FAMILIES[made[0]]
    if family.guidance[0] == family.guidance[1] or made[0] == "flux2-dev":
        pytest.skip("without classifier-free guidance")
    found = []
    for calls in (1, 2):
        policy = open_model(made, **sides(made[0]), guidance_scale=3.0, guidance={"train": train, "calls": calls})
        weight = next(policy.transformer.parameters()).requires_grad_(True)
        x = noise.initial_noise(5, 0, torch.arange(len(PROMPTS)), policy.latent_shape)
        v = policy.velocity(policy.encode(PROMPTS))(x, 0.7, torch.arange(len(PROMPTS)))
        (gradient,) = torch.autograd.grad(v.square().sum(), weight)
        found.append((v.detach(), gradient))
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * one.abs().max().item())
    plain = open_model(made, **sides(made[0]), guidance_scale=family.guidance[0])
    rows = torch.arange(len(PROMPTS))
    conditional = plain.velocity(plain.encode(PROMPTS))(x, 0.7, rows)
    unconditional = plain.velocity(plain.encode([""] * len(PROMPTS)))(x, 0.7, rows)
    assert (conditional - unconditional).abs().max() > 1e-3
    expected = policy.backbone.guided(conditional, unconditional)
    torch.testing.assert_close(expected, found[0][0], rtol=1e-4, atol=1e-4)


def test_the_system_message_of_qwen_image_is_left_out(tmp_path):
    from egrpo_fast.models.qwen_image.text import QwenImageTextEncoder

    pipeline = make_pipeline("qwen-image")
    tokens = pipeline.tokenizer(QwenImageTextEncoder.left_out)["input_ids"]
    assert len(tokens) == pipeline.prompt_template_encode_start_idx


def test_a_lora_of_a_family_is_read_at_its_scale_and_another_familys_is_refused(made, tmp_path):
    """As the family's own pipeline runs it."""
    name, folder = made
    lora = {"rank": 3, "alpha": 6.0}
    policy = open_model(made, **sides(made[0]), guidance_scale=FAMILIES[name].guidance[1], lora=lora)
    generator = torch.Generator().manual_seed(0)
    adapters = {key: torch.randn(value.shape, generator=generator) * 0.2
                for key, value in policy.transformer.named_parameters() if ".lora_" in key}  # fmt: skip
    save_lora(tmp_path, adapters, policy.lora, policy.backbone.pipeline)
    with torch.no_grad():
        for key, value in adapters.items():
            policy.transformer.get_parameter(key).copy_(value)
    pipeline = open_pipeline(folder)
    pipeline.load_lora_weights(tmp_path)
    theirs = dict(pipeline.transformer.named_modules())
    for layer, module in policy.transformer.named_modules():
        if hasattr(module, "lora_A"):
            delta = theirs[layer].get_delta_weight("default_0")
            torch.testing.assert_close(delta, module.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
    settings = sides(name) | {"guidance_scale": FAMILIES[name].guidance[1]}
    read = open_model(made, **settings, lora={"path": str(tmp_path)})
    assert set(read.lora.target_modules) <= set(policy.backbone.lora_targets) and read.lora.rank == 3
    other = "z-image" if name != "z-image" else "sd3"  # some of the others are alike when they are so small
    make_pipeline(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"model.lora.path: .* cannot be read as a LoRA of this transformer"):
        meta_transformer(tmp_path / "other", LoraConfig(path=str(tmp_path)))


def tail_velocity(policy, latents, prompts, **settings):
    """The tail's model beside the policy, and its velocity while it follows."""
    policy.use_tail(TailConfig(**settings))
    policy.load_tail(torch.device("cpu"))
    conditioning, rows = policy.encode(prompts), torch.arange(len(prompts))
    with torch.no_grad(), policy.tail_follows(policy.transformer):
        return policy.tail, policy.tail_velocity(conditioning).velocity(latents, 0.5, rows)


def test_tails_in_8_bits_and_with_a_lora_of_their_own(made, tmp_path):
    """Every linear layer of the blocks is quantised but those of modulation; a LoRA is added at its scale."""
    pytest.importorskip("torchao")
    name, _ = made
    settings = {"height": 96, "width": 64, "guidance_scale": FAMILIES[name].guidance[1]}
    policy = open_model(made, **settings)
    x = noise.initial_noise(5, 0, torch.arange(len(PROMPTS)), policy.latent_shape)
    with torch.no_grad():
        exact = policy.velocity(policy.encode(PROMPTS))(x, 0.5, torch.arange(len(PROMPTS)))
    policy.use_tail(TailConfig(quantization="int8"))
    policy.load_tail(torch.device("cpu"))
    with policy.tail_follows(policy.transformer):
        in_8_bits = {key.removesuffix(".weight") for key, value in policy.tail.transformer.named_parameters()
                     if type(value) is not torch.nn.Parameter}  # fmt: skip
        counted = sum(policy.transformer.get_submodule(layer).weight.numel() for layer in in_8_bits)
    blocks = sum(p.numel() for block in policy.backbone.blocks(policy.transformer) for p in block.parameters())
    assert in_8_bits and not any("norm" in layer or "mod" in layer for layer in in_8_bits) and counted > 0.5 * blocks
    _, found = tail_velocity(policy, x, PROMPTS, quantization="int8")
    assert 0 < (found - exact).norm() / exact.norm() < 0.05
    trained = open_model(made, **settings, lora={"rank": 3, "alpha": 6.0})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        adapters = {key: value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
                    for key, value in trained.transformer.named_parameters() if ".lora_" in key}  # fmt: skip
        expected = trained.velocity(trained.encode(PROMPTS))(x, 0.5, torch.arange(len(PROMPTS)))
    save_lora(tmp_path, adapters, trained.lora, trained.backbone.pipeline)
    _, found = tail_velocity(policy, x, PROMPTS, lora=str(tmp_path))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert (found - exact).norm() / exact.norm() > 0.01


def test_a_cache_that_warms_up_for_all_steps_skips_nothing(made):
    """Of those families whose blocks diffusers' hooks can skip; the others refuse it by name."""
    name, _ = made
    policy = open_model(made, height=96, width=64, guidance_scale=FAMILIES[name].guidance[1])
    x = noise.initial_noise(5, 0, torch.arange(len(PROMPTS)), policy.latent_shape)
    cache = TaylorSeerConfig(name="taylor_seer", warm_up=100)
    if not hasattr(policy.transformer, "enable_cache"):
        with pytest.raises(ValueError, match="tail.cache: taylor_seer is diffusers', which has none for a "):
            policy.use_tail(TailConfig(cache=cache))
        return
    with torch.no_grad():
        exact = policy.velocity(policy.encode(PROMPTS))(x, 0.5, torch.arange(len(PROMPTS)))
    policy.use_tail(TailConfig(cache=cache))
    policy.load_tail(torch.device("cpu"))
    tail, rows = policy.tail, torch.arange(len(PROMPTS))
    with torch.no_grad(), policy.tail_follows(policy.transformer), tail.cache.sequence(0, 0):
        found = policy.tail_velocity(policy.encode(PROMPTS)).velocity(x, 0.5, rows)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    evaluations = len(PROMPTS) * policy.backbone.rows_per_velocity * len(policy.backbone.blocks(policy.transformer))
    assert tail.cache.asked == tail.cache.computed == evaluations


def test_another_attention_is_refused_where_diffusers_has_none():
    with pytest.raises(ValueError, match="model.attention: efficient: .* SD3Transformer2DModel by PyTorch alone"):
        use_attention(make_pipeline("sd3").transformer, "efficient")


SD3, KLEIN, DEV = "sd3", "flux2-klein", "flux2-dev"


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        (KLEIN, {"guidance_scale": 3.0}, "model.guidance_scale: 3, but .* is distilled to work without guidance"),
        (KLEIN, {"guidance": {"negative_prompt": "blurry"}}, "model.guidance.negative_prompt: .* is distilled"),
        (DEV, {"guidance": {"negative_prompt": "blurry"}}, "model.guidance.negative_prompt: .* embeds its guidance"),
        (DEV, {"guidance": {"train": "conditional"}}, "model.guidance.train: it is for classifier-free guidance"),
        (SD3, {"guidance_scale": 1.0, "guidance": {"negative_prompt": "blurry"}}, "model.guidance.negative_prompt: "),
        (SD3, {"height": 88}, "model.height: 88 is not a multiple of 16"),
        (SD3, {"width": 1600}, "model.width: 1600; .* knows positions up to 1536"),
        (SD3, {"max_sequence_length": 513}, "model.max_sequence_length: 513; a StableDiffusion3Pipeline reads at"),
    ],
)
def test_settings_that_a_family_does_not_take_are_refused_before_weights_are_read(kind, settings, told, tmp_path):
    make_pipeline(kind).save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        if file.parent.name != "transformer":
            file.unlink()
    with pytest.raises(ValueError, match=told):
        Policy(ModelConfig(path=str(tmp_path), **({"height": 96, "width": 96} | settings)), tmp_path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"_class_name": "WanPipeline"}, "holds a WanPipeline; .*ZImagePipeline is expected"),
        ({"_class_name": "ZImagePipeline"}, "the transformer of .* is a SD3Transformer2DModel, not a ZImage"),
        ("text_encoder_3", "lacks text_encoder_3"),
        ("text_encoder_2", "holds a qwen3; clip_text_model is expected"),
        ("scheduler", "schedule.shift: auto reads a FlowMatchEuler.*; .* is of a DDIMScheduler"),
    ],
)
def test_missing_and_foreign_parts_are_refused_by_name(damage, told, tmp_path):
    make_pipeline("sd3").save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path), height=96, width=96)
    if isinstance(damage, dict):
        (tmp_path / "model_index.json").write_text(json.dumps(damage))
    elif damage == "text_encoder_3":
        shutil.rmtree(tmp_path / damage)
    else:
        name, foreign = {
            "text_encoder_2": ("config.json", {"model_type": "qwen3"}),
            "scheduler": ("scheduler_config.json", {"_class_name": "DDIMScheduler"}),
        }[damage]
        (tmp_path / damage / name).write_text(json.dumps(foreign))
    with pytest.raises(ValueError, match=told):
        policy = Policy(model, tmp_path)
        policy.times(4, "auto") if damage == "scheduler" else policy.load(torch.device("cpu"))


def test_guidance_is_bounded_and_ends_where_it_is_asked_to(tmp_path):
    """Z-Image's two settings, by its own pipeline; they mean the same for every family that is guided so."""
    make_pipeline("z-image").save_pretrained(tmp_path)
    guidance = {"normalization": 0.9, "truncation": 0.3}
    policy = open_model(("z-image", tmp_path), height=80, width=96, guidance_scale=5.0, guidance=guidance)
    start, after = noise.initial_noise(5, 0, torch.arange(3), policy.latent_shape), []
    open_pipeline(tmp_path)(
        prompt=list(PROMPTS), height=80, width=96, num_inference_steps=4, guidance_scale=5.0, cfg_normalization=0.9,
        cfg_truncation=0.3, max_sequence_length=40, latents=start.unflatten(2, (10, 12)), output_type="latent",
        callback_on_step_end=lambda pipe, i, t, values: after.append(values["latents"].clone()) or {},
    )  # fmt: skip
    schedule, x, rows = make_schedule(4, policy.times(4, "auto")), start, torch.arange(3)
    assert schedule.times[1] > 0.7 > schedule.times[3]
    with torch.no_grad():
        velocity = policy.velocity(policy.encode(PROMPTS))
        for i, theirs in enumerate(after):
            x = x + schedule.ode(i, i + 1).c_v * velocity(x, schedule.times[i], rows)
            torch.testing.assert_close(x, theirs.flatten(2), rtol=1e-4, atol=1e-4)


def test_fidelity_measures_what_a_family_can_have(made, tmp_path):
    """Without tails of the user's own: strides and solvers, and a cache where diffusers has one for the family."""
    name, folder = made
    settings = [
        f"model.path={folder}", "model.height=32", "model.width=64", "model.guidance_scale=null",
        f"model.max_sequence_length={FAMILIES[name].max_sequence_length}", "schedule.num_steps=5",
        "schedule.shift=auto", "schedule.active_steps=[0]", "rollout.group_size=3", "rewards=[{name: jpeg}]",
        f"prompts.train={json.dumps(PROMPTS)}",
    ]  # fmt: skip
    told = fidelity("shapes", settings, num_prompts=1)
    cached = hasattr(make_pipeline(name).transformer, "enable_cache")
    assert "tail.stride=2 tail.solver=dpm2m" in told and ("tail.cache=taylor_seer" in told) == cached
