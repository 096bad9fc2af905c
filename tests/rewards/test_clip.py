"""open_clip weights from files: the image transform and the activation that belong to them, or a refusal."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image

from egrpo_fast.rewards import make_reward
from egrpo_fast.rewards.clip import _of_tags
from egrpo_fast.scoring.preprocess import OPENAI_MEAN
from egrpo_fast.shapes import CLIP, PIPELINE

TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
OPENAI = {"mean": OPENAI_MEAN, "std": (0.3, 0.3, 0.3), "interpolation": "bicubic", "resize_mode": "shortest"}
SIGLIP = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
TAGS = {
    "Alike": {"one": SIGLIP, "two": SIGLIP},
    "Differ": {"gelu": OPENAI, "quick": OPENAI | {"quick_gelu": True}, "other_mean": SIGLIP},
    "Differ-quickgelu": {"quick": OPENAI | {"quick_gelu": True}, "gelu": OPENAI},
    "Unknown": {},
}
PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(autouse=True)
def models(monkeypatch):
    """Small architectures and tags that open_clip then knows."""
    for name, tags in TAGS.items():
        towers = TOWERS | ({"quick_gelu": True} if name.endswith("-quickgelu") else {})
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, towers)
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    network = open_clip.create_model("Alike")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # so that the activation shows
    save_file(network.state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path / "open_clip_model.safetensors"


def pictures():
    """Smooth ones, of which a resize rounds little the other way."""
    coarse = torch.rand(2, 3, 4, 7, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, (40, 70), mode="bicubic").clamp(0, 1)


def score_of(weights, transform, quick_gelu, images):
    """By open_clip itself, told what these weights are."""
    network, _, preprocess = open_clip.create_model_and_transforms(
        "Alike", str(weights), force_quick_gelu=quick_gelu, image_mean=transform["mean"], image_std=transform["std"],
        image_resize_mode=transform["resize_mode"], image_interpolation=transform["interpolation"],
    )  # fmt: skip
    pixels = torch.stack([preprocess(to_pil_image(image)) for image in images])
    with torch.no_grad():
        text = network.eval().encode_text(open_clip.get_tokenizer("Alike")(PROMPTS))
        return F.cosine_similarity(network.encode_image(pixels), text)


@pytest.mark.parametrize(
    ("model", "options", "transform", "quick_gelu"),
    [
        ("Alike", {"pretrained": "FILE"}, SIGLIP, False),
        ("Differ", {"pretrained": "gelu", "weights": "FILE"}, OPENAI, False),
        ("Differ", {"pretrained": "quick", "weights": "FILE"}, OPENAI, True),
        ("Differ", {"pretrained": "other_mean", "weights": "FILE"}, SIGLIP, False),
        ("Differ-quickgelu", {"pretrained": "quick", "weights": "FILE"}, OPENAI, True),
    ],
)
def test_transform_and_activation_are_the_weights_own(model, options, transform, quick_gelu, weights):
    images = pictures()
    options = {name: value.replace("FILE", str(weights)) for name, value in options.items()}
    reward = make_reward("clip", {"model": model, **options})
    assert isinstance(reward.network.transformer.resblocks[0].mlp.gelu, QuickGELU) == quick_gelu
    expected = score_of(weights, transform, quick_gelu, images)
    assert torch.allclose(reward(images, PROMPTS), expected, rtol=0, atol=2e-3)
    other = score_of(weights, SIGLIP if transform is OPENAI else OPENAI, quick_gelu, images)
    assert (other - expected).abs().max() > 1e-2, "the comparison sees another transform"


@pytest.mark.parametrize("model", ["Alike", "Differ", "Unknown"])
def test_the_config_beside_a_file_is_its_own(model, weights):
    config = {"model_cfg": TOWERS | {"quick_gelu": True}, "preprocess_cfg": OPENAI}
    (weights.parent / "open_clip_config.json").write_text(json.dumps(config))
    images = pictures()
    reward = make_reward("clip", {"model": model, "pretrained": str(weights)})
    assert isinstance(reward.network.transformer.resblocks[0].mlp.gelu, QuickGELU)
    expected = score_of(weights, OPENAI, True, images)
    assert torch.allclose(reward(images, PROMPTS), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": "Differ", "pretrained": "FILE"}, "pretrained: .* open_clip's tags of Differ do not tell them; name"),
        (
            {"model": "Differ-quickgelu", "pretrained": "FILE"},
            "name its tag .*weights: .*, or put open_clip_config",
        ),
        ({"model": "Unknown", "pretrained": "FILE"}, "open_clip's tags of Unknown do not tell them"),
        (
            {"model": "Differ-quickgelu", "pretrained": "gelu", "weights": "FILE"},
            "model: Differ-quick.* leave out -quick",
        ),
        (
            {"model": "Differ", "pretrained": "absent", "weights": "FILE"},
            "'absent' is no file and no tag .*: gelu, quick",
        ),
        ({"model": "Differ", "pretrained": "/nowhere.pt"}, "'/nowhere.pt' is no file and no tag of Differ; tags: gelu"),
        ({"model": "Differ", "pretrained": "gelu", "weights": "/nowhere.pt"}, "weights: no file /nowhere.pt"),
        ({"model": "Alike"}, "pretrained: a tag or a file of weights is needed"),
        ({"model": "Absent", "pretrained": "FILE"}, "model: 'Absent' is no open_clip architecture"),
        (
            {"model": f"local-dir:{CLIP}", "pretrained": "FILE"},
            "pretrained: .*, but model: local-dir:.* names its weights",
        ),
        ({"model": "shapes", "weights": "FILE"}, "but model: shapes names its weights itself"),
    ],
)
def test_what_is_not_told_is_refused_by_name(options, told, weights):
    options = {name: value.replace("FILE", str(weights)) for name, value in options.items()}
    with pytest.raises(ValueError, match=f"^rewards.clip: .*{told}"):
        make_reward("clip", options)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            {"model_cfg": TOWERS | {"vision_cfg": TOWERS["vision_cfg"] | {"layers": 3}}},
            "describes .vision_cfg.layers, ",
        ),
        ({"preprocess_cfg": OPENAI}, "open_clip_config.json cannot be read: KeyError"),
        ([], "open_clip_config.json cannot be read"),
    ],
)
def test_another_config_beside_a_file_is_refused(content, told, weights):
    (weights.parent / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=told):
        make_reward("clip", {"model": "Alike", "pretrained": str(weights)})


@pytest.mark.parametrize("change", [{"fill_color": 7}, {"interpolation": "nearest"}, {"resize_mode": "fit"}])
def test_a_transform_that_is_not_served_is_refused(change, weights):
    config = {"model_cfg": TOWERS, "preprocess_cfg": OPENAI | change}
    (weights.parent / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="resizes images by .* not served"):
        make_reward("clip", {"model": "Alike", "pretrained": str(weights)})


def test_what_open_clips_own_tags_tell_of_a_file():
    """SigLIP's tags agree, OpenAI's ResNets are all QuickGELU; of ViT-B-32 or ViT-L-14 a file alone tells nothing."""

    def told(model):
        return _of_tags(model, open_clip.list_pretrained_tags_by_model(model), Path("file"))

    transform, quick_gelu = told("ViT-B-16-SigLIP")
    assert transform["mean"] == (0.5, 0.5, 0.5) and transform["resize_mode"] == "squash" and not quick_gelu
    assert told("RN50")[1] and told("ViT-B-32-quickgelu")[1] and not told("ViT-g-14")[1]
    for model in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14"):
        with pytest.raises(ValueError, match=f"tags of {model} do not tell"):
            told(model)


def asking(folder):
    """A tokenizer's folder that asks for its own code."""
    shutil.copytree(PIPELINE / "tokenizer", folder)
    file = folder / "tokenizer_config.json"
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    (folder / "own.py").write_text("open('executed', 'w')\nclass Own: pass\n")
    return folder


@pytest.mark.parametrize("kwargs", [{}, {"trust_remote_code": True}], ids=["asks", "grants itself"])
def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(kwargs, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("stdin is asked"))
    text = TOWERS["text_cfg"] | {"hf_tokenizer_name": str(asking(tmp_path / "tokenizer")), "tokenizer_kwargs": kwargs}
    config = {"model_cfg": TOWERS | {"text_cfg": text}, "preprocess_cfg": OPENAI}
    (weights.parent / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="^rewards.clip: "):
        make_reward("clip", {"model": f"local-dir:{weights.parent}"})
    assert not (tmp_path / "executed").exists()
