"""LoRA files: every layout at the scale at which diffusers runs it, or refused; and ours, read by anyone."""

import json
import math

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from egrpo_fast.config import ConfigError, LoraConfig, ModelConfig
from egrpo_fast.models.flux.backbone import FluxBackbone
from egrpo_fast.models.lora import FILE, describe, follow_lora, linear_layers, read_lora, save_lora
from egrpo_fast.models.random import make_pipeline
from egrpo_fast.models.sizes import Sizes
from egrpo_fast.models.transformer import meta_transformer

RANK = 4


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline("flux-dev")


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    pipeline.save_pretrained(folder := tmp_path_factory.mktemp("pipeline"))
    return folder


@pytest.fixture(scope="module")
def architecture(pipeline):
    """The transformer without its weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(pipeline.transformer.config)


def factors(pipeline, layer, seed, rank=RANK):
    outputs, inputs = pipeline.transformer.get_submodule(layer).weight.shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


IMAGE, SINGLE = "transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.1.attn.to_k"
LAYERS = (IMAGE, SINGLE)


def of_diffusers(pipeline, layers=LAYERS, ranks=RANK, names=("lora_A", "lora_B"), prefix="transformer."):
    ranks = dict.fromkeys(layers, ranks) if isinstance(ranks, int) else ranks
    return {
        f"{prefix}{layer}.{name}.weight": factor
        for seed, layer in enumerate(layers)
        for name, factor in zip(names, factors(pipeline, layer, seed, ranks[layer]))
    }


def alphas(values, prefix="transformer."):
    return {f"{prefix}{layer}.alpha": torch.tensor(value) for layer, value in values.items()}


def header(**settings):
    settings = {"r": RANK, "target_modules": ["to_out.0", "to_k"]} | settings
    return {LORA_ADAPTER_METADATA_KEY: json.dumps({f"transformer.{key}": value for key, value in settings.items()})}


def kohya(pipeline, alpha):
    """sd-scripts' names, and q, k and v of a double block in one."""
    down, up = factors(pipeline, IMAGE, 0)
    fused = torch.cat([factors(pipeline, f"transformer_blocks.0.attn.to_{x}", 7)[1] for x in "qkv"])
    named = {
        "lora_unet_double_blocks_0_img_attn_proj": (down, up),
        "lora_unet_double_blocks_0_img_attn_qkv": (2 * down, fused),
    }
    return {
        f"{name}.{which}": value
        for name, (a, b) in named.items()
        for which, value in (("lora_down.weight", a), ("lora_up.weight", b), ("alpha", torch.tensor(alpha)))
    }


def xlabs(pipeline):
    down, up = factors(pipeline, IMAGE, 0)
    fused = torch.cat([factors(pipeline, f"transformer_blocks.0.attn.to_{x}", 7)[1] for x in "qkv"])
    names = {"proj_lora1": (down, up), "qkv_lora1": (2 * down, fused)}
    return {
        f"double_blocks.0.processor.{name}.{which}.weight": value
        for name, pair in names.items()
        for which, value in zip(("down", "up"), pair)
    }


FILES = {
    "nothing but factors": (lambda p: of_diffusers(p), None, 1.0),
    ".alpha tensors": (lambda p: of_diffusers(p) | alphas(dict.fromkeys(LAYERS, 16.0)), None, 4.0),
    ".alpha tensors, bfloat16": (
        lambda p: {n: v.bfloat16() for n, v in (of_diffusers(p) | alphas(dict.fromkeys(LAYERS, 2.0))).items()},
        None, 0.5,
    ),
    "alpha in the header": (lambda p: of_diffusers(p), header(lora_alpha=16), 4.0),
    "rsLoRA in the header": (lambda p: of_diffusers(p), header(lora_alpha=16, use_rslora=True), 16 / math.sqrt(RANK)),
    "kohya": (lambda p: kohya(p, 16.0), None, 1.0),
    "kohya, diffusers' names": (
        lambda p: {
            name.replace(".", "_", name.count(".") - 2 if "weight" in name else name.count(".") - 1): value
            for name, value in (
                of_diffusers(p, [IMAGE], names=("lora_down", "lora_up"), prefix="lora_transformer_")
                | alphas({IMAGE: 8.0}, "lora_transformer_")
            ).items()
        }, None, 1.0,
    ),
    "ComfyUI": (
        lambda p: {
            name.replace("lora_unet_double_blocks_0_img_attn_", "diffusion_model.double_blocks.0.img_attn."): value
            for name, value in kohya(p, 1.0).items()
        }, None, 1.0,
    ),
    "xlabs": (xlabs, None, 1.0),
    "several ranks": (lambda p: of_diffusers(p, ranks={IMAGE: 4, SINGLE: 8}), None, None),
    "several alphas": (lambda p: of_diffusers(p) | alphas({IMAGE: 4.0, SINGLE: 16.0}), None, None),
}  # fmt: skip
"""Tensors, header, and the scale of every layer; None: they differ."""


def change_by_diffusers(pipeline, path):
    """What FluxPipeline.load_lora_weights adds to every weight."""
    transformer = FluxTransformer2DModel.from_config(pipeline.transformer.config)
    transformer.load_state_dict(pipeline.transformer.state_dict())
    loaded = FluxPipeline(**{**pipeline.components, "transformer": transformer})
    loaded.load_lora_weights(str(path))
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    before = pipeline.transformer.state_dict()
    return {
        name: value - before[name] for name, value in transformer.state_dict().items() if (value != before[name]).any()
    }


@pytest.mark.parametrize("name", FILES)
def test_a_lora_has_the_scale_that_diffusers_gives_it(name, pipeline, architecture, tmp_path):
    tensors, metadata, scale = FILES[name]
    save_file(tensors(pipeline), tmp_path / FILE, metadata=metadata)
    found = read_lora("tail.lora", str(tmp_path), architecture, FluxBackbone)
    expected = change_by_diffusers(pipeline, tmp_path)
    assert expected.keys() == {f"{layer}.weight" for layer in found}
    for layer, (down, up, at) in found.items():
        change = expected[f"{layer}.weight"]
        assert torch.allclose(at * up.float() @ down.float(), change, rtol=1e-4, atol=1e-5) and change.abs().max() > 1
        assert scale is None or at == pytest.approx(scale)


@pytest.mark.parametrize("name", [name for name, (*_, scale) in FILES.items() if scale is not None])
def test_training_goes_on_from_a_file_at_its_strength(name, pipeline, folder, tmp_path):
    """The transformer to be trained is the pipeline with that LoRA; rank, alpha and layers are the file's."""
    tensors, metadata, scale = FILES[name]
    save_file(tensors(pipeline), tmp_path / FILE, metadata=metadata)
    transformer, weights = meta_transformer(folder, LoraConfig(path=str(tmp_path)))
    transformer.to_empty(device="cpu")
    transformer.load_state_dict(
        {name: weights(name).float() for name, _ in transformer.named_parameters()}, strict=False
    )
    assert weights.lora.rank == RANK and weights.lora.alpha == pytest.approx(scale * RANK) and not weights.lora.follows
    expected = change_by_diffusers(pipeline, tmp_path)
    adapted = {n: m for n, m in transformer.named_modules() if hasattr(m, "lora_A")}
    assert {f"{name}.weight" for name in adapted} == expected.keys()
    for name, module in adapted.items():
        assert torch.allclose(module.get_delta_weight("default"), expected[f"{name}.weight"], rtol=1e-4, atol=1e-5)


def refused(tensors, architecture, tmp_path, metadata=None):
    save_file(tensors, tmp_path / FILE, metadata=metadata)
    with pytest.raises(ValueError, match=r"^tail\.lora: ") as error:
        read_lora("tail.lora", str(tmp_path), architecture, FluxBackbone)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ("transformer.x.dora_scale", "is a DoRA (transformer.x.dora_scale"),
        (f"transformer.{IMAGE}.lora_magnitude_vector", "is a DoRA"),
        ("transformer.x.lokr_w1", "is a LoKr"),
        (
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            "changes a text encoder (text_encoder.text_",
        ),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "changes a text encoder"),
        ("text_encoders.t5xxl.transformer.x.lora_down.weight", "changes a text encoder"),
        (f"transformer.{IMAGE}.lora_B.bias", "changes more than linear layers of the transformer"),
        (f"transformer.{IMAGE}.diff_b", "changes more than linear layers of the transformer"),
        ("transformer.transformer_blocks.0.attn.norm_q.weight", "changes more than linear layers"),
        ("lora_unet_double_blocks_0_img_mlp_0.lora_down.weight", "mixes layouts"),
        ("transformer.x.lora_A.weight", "changes more than linear layers of the transformer (transformer.x.lora_A"),
        ("x_embedder.lora_A.weight", "mixes layouts"),
    ],
)
def test_what_diffusers_would_leave_out_is_refused_by_name(extra, told, pipeline, architecture, tmp_path):
    assert told in refused(of_diffusers(pipeline) | {extra: torch.ones(4, 4)}, architecture, tmp_path)


def test_a_scale_that_readers_differ_about_is_refused(pipeline, architecture, tmp_path):
    """diffusers gives a layer without .alpha the others'."""
    some = of_diffusers(pipeline) | alphas({IMAGE: 16.0})
    assert f"diffusers runs {SINGLE} at scale 4, by its alpha it is 1" in refused(some, architecture, tmp_path)
    zero = of_diffusers(pipeline) | alphas(dict.fromkeys(LAYERS, 0.0))
    assert "at scale 0" in refused(zero, architecture, tmp_path)
    assert "not read whole" in refused(
        of_diffusers(pipeline), architecture, tmp_path, header(lora_alpha=4, use_dora=True)
    )


def test_another_architecture_is_refused_by_layer(pipeline, architecture, tmp_path):
    wider = {name: value.repeat(1, 2) if "lora_A" in name else value for name, value in of_diffusers(pipeline).items()}
    assert "it is for another architecture (single_transformer_blocks.1.attn.to_k)" in refused(
        wider, architecture, tmp_path
    )
    more = {name.replace("blocks.1.", "blocks.7."): value for name, value in of_diffusers(pipeline).items()}
    assert "another architecture (single_transformer_blocks.7.attn.to_k)" in refused(more, architecture, tmp_path)
    single = "lora_unet_single_blocks_0_linear1"  # its parts are as wide as FLUX.1's, whatever this model is
    odd = {f"{single}.lora_down.weight": torch.ones(4, 64), f"{single}.lora_up.weight": torch.ones(448, 4)}
    assert "cannot be read as a LoRA of this transformer" in refused(odd, architecture, tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not a LoRA"], ids=["empty", "zeros", "text"])
def test_an_unreadable_file_is_refused_by_name(content, architecture, tmp_path):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"model.lora.path: {tmp_path / FILE} cannot be read as safetensors"):
        follow_lora(LoraConfig(path=str(tmp_path)), architecture, FluxBackbone)


def test_which_file_is_never_guessed(pipeline, architecture, tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("one", "two"):
        save_file(of_diffusers(pipeline), tmp_path / "a" / f"{name}.safetensors")
    with pytest.raises(ValueError, match="holds 2 safetensors files and no pytorch_lora_weights.safetensors; name"):
        read_lora("tail.lora", str(tmp_path / "a"), architecture, FluxBackbone)
    (tmp_path / "a" / "one.safetensors").unlink()
    assert read_lora("tail.lora", str(tmp_path / "a"), architecture, FluxBackbone).keys() == set(LAYERS)
    (tmp_path / "lora.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tail.lora: .*lora.pt is no \.safetensors file; other formats can run code"):
        read_lora("tail.lora", str(tmp_path / "lora.pt"), architecture, FluxBackbone)
    with pytest.raises(ValueError, match="tail.lora: no file or folder /nowhere"):
        read_lora("tail.lora", "/nowhere", architecture, FluxBackbone)


SAID = {"rank": RANK, "alpha": 16, "target_modules": ["to_out.0", "0.attn.to_k", "1.attn.to_k"]}


def test_settings_follow_the_file_or_agree_with_it(pipeline, architecture, tmp_path):
    layers = [layer for layer in linear_layers(pipeline.transformer) if layer.endswith((".to_out.0", ".to_k"))]
    save_file(of_diffusers(pipeline, layers) | alphas(dict.fromkeys(layers, 16.0)), tmp_path / FILE)
    lora = LoraConfig(path=str(tmp_path))
    assert lora.follows == {"rank", "alpha", "target_modules"} and LoraConfig().follows == {"target_modules"}
    followed, adapters = follow_lora(lora, architecture, FluxBackbone)
    assert dict(followed) == {"rank": 4, "alpha": 16, "target_modules": ["to_k", "to_out.0"], "path": str(tmp_path)}
    assert adapters.keys() == set(layers) and not followed.follows
    for name, value in SAID.items():
        assert getattr(follow_lora(lora.model_copy(update={name: value}), architecture, FluxBackbone)[0], name) == value


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 8}, "model.lora.rank: 8, but .* is of rank 4; leave it out"),
        ({"alpha": 4}, "model.lora.alpha: 4, but that of .* is 16; leave it out"),
        ({"target_modules": ["to_k"]}, r"model.lora.target_modules: not the layers that .* adapts \(.*to_out.0"),
        ({"target_modules": ["to_k", "to_out.0", "to_q"]}, "model.lora.target_modules: not the layers .*to_q"),
    ],
)
def test_another_lora_than_the_settings_say_is_refused(changes, told, pipeline, architecture, tmp_path):
    layers = [layer for layer in linear_layers(pipeline.transformer) if layer.endswith((".to_out.0", ".to_k"))]
    save_file(of_diffusers(pipeline, layers) | alphas(dict.fromkeys(layers, 16.0)), tmp_path / FILE)
    with pytest.raises(ValueError, match=told):
        follow_lora(LoraConfig(path=str(tmp_path), **changes), architecture, FluxBackbone)


def test_what_cannot_be_trained_as_it_is_is_refused(pipeline, architecture, tmp_path):
    def told(tensors):
        save_file(tensors, tmp_path / FILE)
        with pytest.raises(ValueError, match="^model.lora.path: ") as error:
            follow_lora(LoraConfig(path=str(tmp_path)), architecture, FluxBackbone)
        return str(error.value)

    assert "adapters of ranks 4, 8; one rank for all" in told(of_diffusers(pipeline, ranks={IMAGE: 4, SINGLE: 8}))
    several = of_diffusers(pipeline) | alphas({IMAGE: 4.0, SINGLE: 16.0})
    assert "adapters of scales 1, 4; one scale for all" in told(several)
    assert "adapts proj_out and not every other layer whose name ends so" in told(of_diffusers(pipeline, ["proj_out"]))


def test_ends_of_names_take_the_files_layers_and_no_other(pipeline, architecture, tmp_path):
    layers = ["single_transformer_blocks.0.proj_out", "single_transformer_blocks.1.proj_out", IMAGE, "x_embedder"]
    save_file(of_diffusers(pipeline, layers), tmp_path / FILE)
    followed, _ = follow_lora(LoraConfig(path=str(tmp_path)), architecture, FluxBackbone)
    assert set(followed.target_modules) == {"0.proj_out", "1.proj_out", "to_out.0", "x_embedder"}
    taken = followed.layers(linear_layers(pipeline.transformer))
    assert sorted(layer for some in taken.values() for layer in some) == sorted(layers)


@pytest.mark.parametrize("entry", ["to_x", "attn", "o_q", "blocks.0.attn.to_q", "TO_Q", "norm1", ""])
def test_every_entry_takes_a_layer(entry, pipeline, folder):
    """Before training and in a plan; beside one that does."""
    lora = LoraConfig(target_modules=["to_q", entry])
    told = f"^model.lora.target_modules: '{entry}' is neither the name of a linear layer nor ends one"
    with pytest.raises(ConfigError, match=told):
        meta_transformer(folder, lora)
    with pytest.raises(ConfigError, match=told):
        Sizes(ModelConfig(path=str(folder))).adapters(lora)


def test_it_is_said_what_was_adapted(folder):
    """As `proj_out` ends the names of the single blocks' layers, it takes them and the output layer."""
    lora = LoraConfig(rank=2, alpha=3, target_modules=["to_q", "proj_out", "single_transformer_blocks.0.proj_out"])
    transformer, weights = meta_transformer(folder, lora)
    assert describe(weights.lora, transformer) == (
        "model.lora: rank 2, alpha 3, on 6 linear layers: to_q 3, proj_out 3, single_transformer_blocks.0.proj_out 1"
    )
    assert hasattr(transformer.proj_out, "lora_A")
    adapted = [name for name, module in transformer.named_modules() if hasattr(module, "lora_A")]
    assert sorted(adapted) == sorted(
        {name for names in lora.layers(linear_layers(transformer)).values() for name in names}
    )


@pytest.mark.parametrize("alpha", [16, 3], ids=["power of two", "another"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_reader_runs_what_is_exported_at_the_runs_scale(alpha, dtype, pipeline, architecture, tmp_path):
    """diffusers, which reads the header; one that reads .alpha tensors; one that knows no alpha at all."""
    lora = LoraConfig(rank=RANK, alpha=alpha, target_modules=["to_out.0", "1.attn.to_k"])
    named = {layer: factors(pipeline, layer, seed) for seed, layer in enumerate(LAYERS)}
    adapters = {
        f"{layer}.lora_{which}.default.weight": factor
        for layer, pair in named.items()
        for which, factor in zip("AB", pair)
    }
    save_lora(tmp_path, adapters, lora, FluxPipeline, dtype)
    tensors = load_file(tmp_path / FILE)
    assert {value.dtype for value in tensors.values()} == {dtype}
    assert tensors.keys() == {f"transformer.{layer}.lora_{which}.weight" for layer in LAYERS for which in "AB"}
    with safe_open(tmp_path / FILE, "pt") as file:
        assert json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])["transformer.lora_alpha"] == RANK
    by_diffusers = change_by_diffusers(pipeline, tmp_path)
    for layer, (down, up) in named.items():
        ours = alpha / RANK * up.to(dtype).float() @ down.to(dtype).float()
        a, b = (tensors[f"transformer.{layer}.lora_{which}.weight"].float() for which in "AB")
        scale = float(tensors.get(f"transformer.{layer}.alpha", len(a))) / len(a)
        scaled = [b @ a, scale * b @ a, by_diffusers[f"{layer}.weight"]]
        assert all(
            (change - ours).norm() / ours.norm() < (1e-5 if dtype == torch.float32 else 4e-3) for change in scaled
        )
    again, found = follow_lora(LoraConfig(path=str(tmp_path)), architecture, FluxBackbone)
    assert again.rank == again.alpha == RANK and all(adapter.scale == 1 for adapter in found.values())
