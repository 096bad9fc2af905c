"""Each network reward against the code that published it, on shared random weights of a small architecture.

The original packages pin an old environment, so none is installed: `make parity` unpacks them into `.parity/`, from
where the few modules that score are loaded one by one.
"""

import importlib
import json
import shutil
import sys
import types
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.functional import to_pil_image

from egrpo_fast.rewards import make_reward
from egrpo_fast.rewards.image_reward import UNUSED, rename
from egrpo_fast.scoring.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess
from egrpo_fast.shapes import CLIP

pytestmark = pytest.mark.filterwarnings("ignore:Importing from timm:FutureWarning")  # the originals do

ORIGINALS = Path(__file__).parents[2] / ".parity"
SIZES = [(64, 64), (48, 96), (150, 90), (56, 56), (30, 41)]
PROMPTS = ["a red square", "two blue circles above a green star", "a cat"]


def pictures(height, width, count=3, seed=0):
    """[count, 3, H, W], smooth and rough in turn, on the grid of 8 bits: what a PIL image can hold."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=random)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    rough = torch.rand(count, 3, height, width, generator=random) - 0.5
    strength = torch.linspace(0, 0.6, count).reshape(-1, 1, 1, 1)
    return (smooth + strength * rough).clamp(0, 1).mul(255).round().div(255)


def randomise(network, seed=0):
    """Weights that let an image and a prompt move the score: a fresh transformer's hardly do."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5, generator=random)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=random)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def original():
    """`load(folder, module)` from an original package's folder, without running any `__init__` of it."""

    def load(folder, module):
        if not (ORIGINALS / folder).is_dir():
            pytest.skip(f"no {folder} in {ORIGINALS.name}/: run `make parity`")
        parts = folder.split("/")
        for depth in range(1, len(parts) + 1):
            name = ".".join(("originals", *parts[:depth]))
            if name not in sys.modules:
                sys.modules[name] = types.ModuleType(name)
                sys.modules[name].__path__ = [str(ORIGINALS.joinpath(*parts[:depth]))]
        return importlib.import_module(".".join(("originals", *parts, module)))

    sys.modules.setdefault("originals", types.ModuleType("originals")).__path__ = [str(ORIGINALS)]
    yield load
    for name in [name for name in sys.modules if name.split(".")[0] == "originals"]:
        del sys.modules[name]


TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 64, "head_width": 32, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """The reward on a small architecture, and its weights as they are published: half precision, under `state_dict`."""
    folder = tmp_path_factory.mktemp("hps")
    (folder / "tiny-hps.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-hps.json")
    weights = randomise(open_clip.create_model("tiny-hps", load_weights=False)).half().state_dict()
    torch.save({"epoch": 1, "state_dict": weights}, folder / "HPS_v2.1_compressed.pt")
    return make_reward("hps", {"weights": str(folder), "model": "tiny-hps"}), weights


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_hps_is_the_packages_own_score(hps, original, height, width):
    model = original("hpsv2/src/open_clip", "model").CLIP(**TINY, output_dict=True).eval()
    model.load_state_dict(hps[1])
    transform = original("hpsv2/src/open_clip", "transform").image_transform(56, False, resize_longest_max=True)
    images = pictures(height, width)
    pixels = torch.stack([transform(to_pil_image(image)) for image in images])
    with torch.no_grad():
        outputs = model(pixels, open_clip.get_tokenizer("tiny-hps")(PROMPTS))
    theirs = (outputs["image_features"] @ outputs["text_features"].T).diagonal()
    assert torch.allclose(hps[0].preprocess(images), pixels, rtol=0, atol=2e-6)
    assert torch.allclose(hps[0](images, PROMPTS), theirs, rtol=0, atol=2e-6)
    assert theirs.std() > 1e-2, "scores that hardly differ prove nothing"


def test_hps_with_another_transform_is_seen(hps, original):
    """The negative control: CLIP's crop in place of the padding moves the score by far more than the bound."""
    images = pictures(48, 96)
    ours, hps[0].preprocess = hps[0].preprocess, Preprocess(56)
    try:
        cropped = hps[0](images, PROMPTS)
    finally:
        hps[0].preprocess = ours
    assert (cropped - hps[0](images, PROMPTS)).abs().max() > 1e-2


def test_weights_from_safetensors_and_for_a_bare_clip_name(hps, tmp_path):
    """One set of weights in another file format, and as a CLIP: on images of the model's own size all are equal."""
    save_file({name: tensor.float() for name, tensor in hps[1].items()}, tmp_path / "weights.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    path, images = str(tmp_path / "weights.safetensors"), pictures(56, 56)
    for name, options in (("hps", {"weights": path}), ("clip", {"pretrained": path})):
        scores = make_reward(name, {"model": "tiny-hps", **options})(images, PROMPTS)
        assert torch.allclose(scores, hps[0](images, PROMPTS), rtol=0, atol=1e-6)


def test_hps_tokenises_as_the_package(original, monkeypatch):
    """The package ships without its vocabulary, which is OpenAI's: open_clip's copy stands in."""
    gzip, vocabulary = importlib.import_module("gzip"), Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    whole = gzip.open
    monkeypatch.setattr(gzip, "open", lambda *_: whole(vocabulary))
    theirs = original("hpsv2/src/open_clip", "tokenizer").tokenize
    prompts = [*PROMPTS, "", "Ünïcode — «quotes» & 12,345 &amp; emoji 🙂", "word " * 100]
    assert torch.equal(open_clip.get_tokenizer("ViT-H-14")(prompts), theirs(prompts))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clip_score_is_open_clips(height, width):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    images = pictures(height, width)
    pixels = torch.stack([transform(to_pil_image(image)) for image in images])
    reward = make_reward("clip", {"model": "shapes"})
    with torch.no_grad():
        image = F.normalize(model.eval().encode_image(pixels), dim=-1)
        text = F.normalize(model.encode_text(open_clip.get_tokenizer(f"local-dir:{CLIP}")(PROMPTS)), dim=-1)
        assert torch.allclose(reward.compare(pixels, reward.encode(PROMPTS)), (image * text).sum(-1), rtol=0, atol=1e-5)
    assert torch.allclose(reward(images, PROMPTS), (image * text).sum(-1), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [*SIZES, (333, 512), (224, 225)])
@pytest.mark.parametrize("size", [56, 224])
def test_device_preprocess_is_pils_transform_up_to_its_rounding(height, width, size):
    """In steps of 1 / 255, undone normalisation: few roundings fall the other way, and some of them twice."""
    images = pictures(height, width)
    transform = open_clip.transform.image_transform(size, False, mean=OPENAI_MEAN, std=OPENAI_STD)
    theirs = torch.stack([transform(to_pil_image(image)) for image in images])
    difference = (Preprocess(size)(images) - theirs).abs() * 255 * torch.tensor(OPENAI_STD).reshape(3, 1, 1)
    assert difference.max() < 2.01 and difference.mean() < 0.02


CROPS = [(832, 1216), (720, 404), (1216, 832), (404, 720), (720, 720), (1024, 768)]
CROPS += [(32 + 7 * n % 61, 33 + 11 * n % 97) for n in range(200)]


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "CLIPImageProcessorPil"])
def test_pick_scores_transform_is_transformers_own(name):
    """Which pixels are kept, at sizes of every parity; one column to the side would be seen."""
    if not (kind := getattr(transformers, name, None)):
        pytest.skip(f"this transformers has no {name}")
    steps, shifted = 255 * torch.tensor(OPENAI_STD).reshape(3, 1, 1), 0
    sizes = CROPS if name == "CLIPImageProcessor" else CROPS[:40]
    for place, (height, width) in enumerate(sizes):
        size = 224 if min(height, width) > 224 else 32
        image = pictures(height, width, 1)
        processor = kind(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        theirs = processor(images=to_pil_image(image[0]), return_tensors="pt").pixel_values
        difference = (Preprocess(size, crop="floor")(image) - theirs).abs() * steps
        assert difference.max() < 2.01 and difference.mean() < 0.05, (height, width)
        if place < 40:
            shifted += bool(((Preprocess(size)(image) - theirs).abs() * steps).mean() > 0.5)
    assert shifted > 5


@pytest.fixture(scope="module")
def pick_score(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pick_score")
    tokenizer = transformers.AutoTokenizer.from_pretrained(CLIP)
    towers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=towers | {
            "vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.eos_token_id,
        },
        vision_config=towers | {"image_size": 56, "patch_size": 14}, projection_dim=32,
    )  # fmt: skip
    model = randomise(transformers.CLIPModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(4.6052)
    model.save_pretrained(folder)
    return folder, model, tokenizer


@pytest.mark.parametrize("index", [{"weight_map": {"logit_scale": "../model.safetensors"}}, {"weight_map": 3}, []])
def test_an_index_of_shards_elsewhere_is_refused(index, pick_score, tmp_path):
    shutil.copytree(pick_score[0], tmp_path / "weights")
    (tmp_path / "weights" / "model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "weights" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="rewards.pick_score: weights: .*index.json (names '../model|cannot be read)"):
        make_reward("pick_score", {"weights": str(tmp_path / "weights"), "tokenizer": str(CLIP)})


def test_the_paths_of_pick_score_are_expanded(pick_score, monkeypatch):
    monkeypatch.setenv("HOME", str(pick_score[0].parent))
    monkeypatch.setenv("TOKENIZER", str(CLIP))
    make_reward("pick_score", {"weights": f"~/{pick_score[0].name}", "tokenizer": "$TOKENIZER"})


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pick_score_is_the_published_formula(pick_score, height, width):
    """As the model card computes it: processor, features, `logit_scale.exp() * cos`."""
    folder, model, tokenizer = pick_score
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), tokenizer
    )
    images = pictures(height, width)
    inputs = processor(
        images=[to_pil_image(image) for image in images], text=PROMPTS, padding=True, truncation=True, max_length=24,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        theirs = model(**inputs).logits_per_image.diagonal()
    reward = make_reward("pick_score", {"weights": str(folder), "tokenizer": str(CLIP)})
    with torch.no_grad():
        exact = reward.compare(inputs["pixel_values"], reward.encode(PROMPTS))
    assert torch.allclose(exact, theirs, rtol=0, atol=1e-4)
    assert torch.allclose(reward(images, PROMPTS), theirs, rtol=0, atol=0.2) and theirs.std() > 1
    cosine = make_reward("pick_score", {"weights": str(folder), "tokenizer": str(CLIP), "scaled": False})
    assert torch.allclose(cosine(images, PROMPTS) * 100, reward(images, PROMPTS), rtol=1e-3, atol=0)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for prompt in PROMPTS for word in prompt.split()})]


@pytest.fixture(scope="module")
def image_reward(original, tmp_path_factory):
    """The package's own modules, small, with random weights; and a checkpoint in the published layout."""
    patch = pytest.MonkeyPatch()
    # What the package imports and these libraries no longer have; none of it takes part in a score.
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint"):
        patch.setitem(sys.modules, name, types.ModuleType(name))
    wrapper = types.ModuleType("fairscale.nn.checkpoint.checkpoint_activations")
    wrapper.checkpoint_wrapper = lambda module: module
    patch.setitem(sys.modules, wrapper.__name__, wrapper)
    file_utils = types.ModuleType("transformers.file_utils")
    file_utils.ModelOutput = transformers.utils.ModelOutput
    patch.setitem(sys.modules, file_utils.__name__, file_utils)
    for name in ("apply_chunking_to_forward", "prune_linear_layer", "find_pruneable_heads_and_indices"):
        found = getattr(transformers.pytorch_utils, name, None)
        patch.setattr(transformers.modeling_utils, name, found, raising=False)
    try:
        vit, med = (original("ImageReward/models/BLIP", name) for name in ("vit", "med"))
        package = original("ImageReward", "ImageReward")
    finally:
        patch.undo()
    med.BertModel.all_tied_weights_keys = {}
    med.BertModel.get_head_mask = lambda self, mask, layers: [None] * layers
    med.BertModel.invert_attention_mask = lambda self, mask: (1.0 - mask[:, None, None, :]) * -10000.0

    folder = tmp_path_factory.mktemp("image_reward")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 2, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=64, add_cross_attention=True, encoder_width=192,
    )  # fmt: skip
    network = package.ImageReward.__new__(package.ImageReward)
    nn.Module.__init__(network)
    network.blip = nn.Module()
    network.blip.visual_encoder = vit.VisionTransformer(64, 16, embed_dim=192, depth=2, num_heads=3)
    network.blip.text_encoder = med.BertModel(config=config, add_pooling_layer=False)
    network.blip.tokenizer = tokenizer
    network.blip.vision_proj, network.blip.text_proj = nn.Linear(192, 16), nn.Linear(128, 16)
    network.mlp, network.preprocess = package.MLP(128), package._transform(64)
    network.device, network.mean, network.std = "cpu", 0.16717362830052426, 1.0333394966054072
    randomise(network)
    torch.save(network.state_dict(), folder / "ImageReward.pt")
    return network, folder


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_image_reward_is_the_packages_own_score(image_reward, height, width):
    network, folder = image_reward
    reward = make_reward("image_reward", {"weights": str(folder), "tokenizer": str(folder)})
    images = pictures(height, width)
    pil = [to_pil_image(image) for image in images]
    theirs = torch.tensor([network.score(prompt, picture) for prompt, picture in zip(PROMPTS, pil)])
    pixels = torch.stack([network.preprocess(picture) for picture in pil])
    with torch.no_grad():
        exact = reward.compare(pixels, reward.encode(PROMPTS))
    assert torch.allclose(exact, theirs, rtol=0, atol=1e-5 * theirs.abs().max())
    assert torch.allclose(reward(images, PROMPTS), theirs, rtol=0, atol=2e-2 * theirs.std()) and theirs.std() > 0.1


def test_every_published_tensor_has_a_place(image_reward):
    """Names outside the mapping stay as they are, and are then refused as unknown."""
    network, _ = image_reward
    left = {name for name in network.state_dict() if rename(name) == name}
    assert left and all(name.startswith(UNUSED) for name in left)
    assert rename("blip.visual_encoder.blocks.11.attn.proj.bias").endswith("layers.11.self_attn.projection.bias")


def test_image_reward_of_another_layout_is_refused(tmp_path):
    save_file({"visual.proj": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="image_reward: .*not in ImageReward's layout"):
        make_reward("image_reward", {"weights": str(tmp_path / "other.safetensors")})
