"""The rewards' common contract: what is found, what is refused by name, what is dropped, batches, caches, dtypes."""

import colorsys
import contextlib
import json
import os
import re
import shutil
import sys
import types
import warnings
from asyncio import CancelledError
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import get_args

import numpy as np
import open_clip
import pytest
import scipy.ndimage
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from egrpo_fast.config import load_config
from egrpo_fast.kernels.reference.group_advantage_clip_loss import group_advantage_ref
from egrpo_fast.rewards import RewardError, check_reward, fill_dropped, make_reward, score, score_or_nan, try_reward
from egrpo_fast.scoring.call import LARGEST
from egrpo_fast.scoring.preprocess import Preprocess, ResizeMode
from egrpo_fast.shapes import CLIP, PROMPTS
from egrpo_fast.shapes.world import parse, render
from egrpo_fast.terminal import error_lines

CAPTIONS = PROMPTS["held_out"].read_text().splitlines()[:6]
NAN = float("nan")


@pytest.fixture(scope="module")
def pictures():
    return torch.stack([render(parse(caption), None) for caption in CAPTIONS])


@pytest.fixture(scope="module")
def clip():
    return make_reward("clip", {"model": "shapes"})


def test_shapes_rewards_know_their_own_pictures(pictures):
    right = score("shapes_soft", make_reward("shapes_soft", {}), pictures, CAPTIONS)
    wrong = score("shapes_soft", make_reward("shapes_soft", {}), pictures, CAPTIONS[::-1])
    assert (right > 0.8).all() and wrong.mean() < right.mean() - 0.4
    strict = make_reward("shapes_strict", {})
    assert score("shapes_strict", strict, pictures, CAPTIONS).tolist() == [1.0] * 6


def test_a_reward_of_ones_own_lies_beside_the_command(tmp_path, monkeypatch):
    """A module in the working directory is found, also where Python was not started there."""
    (tmp_path / "rewards_of_my_own.py").write_text("def score(images, prompts): return images.mean((1, 2, 3))")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with pytest.raises(ValueError, match="rewards_of_my_own is not installed"):
        check_reward("rewards_of_my_own:score", {}, CAPTIONS, 32, 32)
    monkeypatch.chdir(tmp_path)
    check_reward("rewards_of_my_own:score", {}, CAPTIONS, 32, 32)
    assert sys.path[-1] == str(tmp_path)  # so it comes before nothing that is installed


def test_clip_prefers_the_right_caption(pictures, clip):
    assert clip(pictures, CAPTIONS).mean() > clip(pictures, CAPTIONS[::-1]).mean() + 0.1


def test_the_folder_of_a_clip_model_is_expanded(pictures, clip, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").symlink_to(CLIP)
    ours = make_reward("clip", {"model": "local-dir:~/mine"})
    assert torch.equal(ours(pictures, CAPTIONS), clip(pictures, CAPTIONS))


def test_saturation_and_sharpness_are_what_other_libraries_say():
    """Of HSV by colorsys, of the Laplacian by scipy; grey has no colour, and a blurred image is less sharp."""
    images = torch.rand(3, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    images[2] = images[2].mean(0)
    saturation = [
        np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.flatten(1).T.tolist()]) for image in images
    ]
    found = make_reward("saturation", {})(images, CAPTIONS)
    torch.testing.assert_close(found, torch.tensor(saturation, dtype=torch.float32), rtol=0, atol=1e-6)
    assert found[2] == 0 and found[0] > 0.3
    luma = (images.double() * torch.tensor([0.299, 0.587, 0.114]).double().view(3, 1, 1)).sum(1).numpy()
    laplacian = [scipy.ndimage.laplace(image)[1:-1, 1:-1].var() for image in luma]
    sharpness = make_reward("sharpness", {})
    torch.testing.assert_close(sharpness(images, CAPTIONS).double(), torch.tensor(laplacian), rtol=1e-5, atol=0)
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert (sharpness(blurred, CAPTIONS) < sharpness(images, CAPTIONS)).all()


def test_jpeg_prefers_what_compresses(pictures):
    noise = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    jpeg = make_reward("jpeg", {})
    assert (jpeg(pictures, CAPTIONS) > jpeg(noise, CAPTIONS)).all()
    assert torch.equal(make_reward("jpeg", {"incompressible": True})(noise, CAPTIONS), -jpeg(noise, CAPTIONS))
    with pytest.raises(ValueError, match="rewards.jpeg: quality: 0"):
        make_reward("jpeg", {"quality": 0})


# Batches, caches, dtypes, offload


def test_a_label_tells_two_of_a_kind_apart(pictures):
    one, other = (make_reward(f"jpeg/{quality}", {"quality": quality}) for quality in (95, 20))
    assert (one(pictures, CAPTIONS) < other(pictures, CAPTIONS)).all()


def test_batched_equals_one_by_one(pictures, clip):
    repeated, prompts = pictures.repeat_interleave(2, 0), [c for c in CAPTIONS for _ in range(2)]
    alone = torch.cat([clip(picture[None], [prompt]) for picture, prompt in zip(repeated, prompts)])
    assert torch.allclose(clip(repeated, prompts), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": 4}, {"micro_batch": 99}, {"offload": True}])
def test_micro_batches_and_offload_change_nothing(options, pictures, clip):
    reward = make_reward("clip", {"model": "shapes", **options})
    for _ in range(2):
        assert torch.allclose(reward(pictures, CAPTIONS), clip(pictures, CAPTIONS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision_stays_near(dtype, bound, pictures, clip):
    half = make_reward("clip", {"model": "shapes", "dtype": dtype})(pictures, CAPTIONS)
    assert half.dtype == torch.float32 and (half != clip(pictures, CAPTIONS)).any()
    assert torch.allclose(half, clip(pictures, CAPTIONS), rtol=0, atol=bound)


def test_a_prompt_is_encoded_once(pictures, monkeypatch):
    reward = make_reward("clip", {"model": "shapes"})
    encoded = []
    whole = reward.encode
    monkeypatch.setattr(reward, "encode", lambda prompts: encoded.extend(prompts) or whole(prompts))
    first = reward(pictures.repeat(2, 1, 1, 1), CAPTIONS * 2)
    assert encoded == list(dict.fromkeys(CAPTIONS))
    assert torch.equal(reward(pictures.repeat(2, 1, 1, 1), CAPTIONS * 2), first) and len(encoded) == 6
    monkeypatch.setattr("egrpo_fast.scoring.scorer.CACHED_PROMPTS", 2)
    reward(pictures, CAPTIONS)
    reward(pictures, CAPTIONS)
    assert len(encoded) == 6 + 4, "the oldest four were let go"


# What is found, and what is refused before a run


def brightness(images, prompts, gain=1.0):
    return images.mean((1, 2, 3)) * gain


class Length:
    def __init__(self, scale, device="cpu"):
        self.scale = scale

    def __call__(self, images, prompts):
        return torch.tensor([len(prompt) * self.scale for prompt in prompts])


@pytest.fixture
def mine(monkeypatch):
    module = types.ModuleType("my_rewards")
    module.brightness, module.Length, module.number = brightness, Length, 3
    monkeypatch.setitem(sys.modules, "my_rewards", module)


def test_any_callable_by_dotted_path(mine, pictures):
    check_reward("my_rewards:brightness", {"gain": 2.0}, CAPTIONS, 32, 32)
    function = make_reward("my_rewards:brightness", {"gain": 2.0})
    assert torch.allclose(score("b", function, pictures, CAPTIONS), 2 * pictures.mean((1, 2, 3)))
    check_reward("my_rewards:Length", {"scale": 2}, CAPTIONS, 32, 32)
    made = make_reward("my_rewards:Length", {"scale": 2})
    assert score("l", made, pictures, CAPTIONS).tolist() == [2.0 * len(caption) for caption in CAPTIONS]


BAD = [
    ("beauty", {}, "no reward 'beauty'; there are: clip.*module:attribute"),
    ("nowhere.at_all:it", {}, "nowhere.at_all:it: nowhere is not installed; it is neither in this folder"),
    ("my_rewards:beauty", {}, "my_rewards:beauty: .*no attribute 'beauty'"),
    ("my_rewards:number", {}, "my_rewards:number: int is no class and no function"),
    ("my_rewards:brightness", {"gan": 2}, "my_rewards:brightness: .*'gan'"),
    ("shapes_soft", {"sharpness": 2}, "shapes_soft: .*sharpness"),
    ("clip", {"model": "local-dir:/nowhere"}, "rewards.clip"),
    ("clip", {"model": "ViT-S-32-alt"}, "rewards.clip: .*[Pp]retrained"),
    ("clip", {"model": "shapes", "dtype": "float8"}, "clip: dtype: 'float8', allowed: float32"),
    ("clip", {"model": "shapes", "micro_batch": 0}, "clip: micro_batch: 0, allowed: 1"),
    ("hps", {"weights": "/nowhere/HPS.pt"}, "hps: weights: no file /nowhere/HPS.pt"),
    ("hps", {"version": "v3"}, "hps: version: 'v3', allowed: v2.0, v2.1"),
    ("hps", {"weights": "/x/HPS_v2_compressed.pt"}, "hps: weights: .* is HPS v2.0, not v2.1"),
    ("image_reward", {"weights": "/nowhere/ImageReward.pt"}, "image_reward: weights: no file"),
    ("pick_score", {"weights": "/nowhere/pick"}, "rewards.pick_score: .*/nowhere/pick"),
]


@pytest.mark.parametrize(("name", "options", "told"), BAD)
def test_bad_rewards_are_refused_by_name(mine, name, options, told):
    with pytest.raises(ValueError, match=told):
        make_reward(name, options)


# Weights


class Malicious:
    """Unpickled, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    ("reward", "options", "file"),
    [
        ("hps", {}, "HPS_v2.1_compressed.pt"),
        ("image_reward", {}, "ImageReward.pt"),
        ("clip", {"model": "ViT-S-32-alt"}, "clip.pt"),
        ("pick_score", {}, "pytorch_model.bin"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_executes_nothing(reward, options, file, zipped, tmp_path):
    created = tmp_path / "created"
    torch.save({"state_dict": Malicious(created)}, tmp_path / file, _use_new_zipfile_serialization=zipped)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')  # else the pickle is never looked at
    if reward == "clip":
        config = {"model_cfg": open_clip.get_model_config(options["model"])}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    argument = {"clip": "pretrained"}.get(reward, "weights")
    path = tmp_path if reward == "pick_score" else tmp_path / file
    with pytest.raises(ValueError, match=f"rewards.{reward}: .*(not executed|safetensors)"):
        make_reward(reward, {**options, argument: str(path)})
    assert not created.exists()


def test_the_malicious_pickle_is_one(tmp_path):
    """The negative control: executed, it does create the file."""
    torch.save(Malicious(tmp_path / "created"), tmp_path / "it.pt")
    torch.load(tmp_path / "it.pt", weights_only=False).close()
    assert (tmp_path / "created").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 nor an archive"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_is_no_checkpoint(content, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="rewards.hps: weights: .*weights"):
        make_reward("hps", {"weights": str(path)})


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"state_dict": 3}, {"epoch": 1}])
def test_a_checkpoint_without_a_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="odd.pt holds no state_dict"):
        make_reward("hps", {"weights": str(tmp_path / "odd.pt")})


def test_weights_of_another_model_are_refused(tmp_path):
    from safetensors.torch import load_file

    weights = load_file(CLIP / "open_clip_model.safetensors")
    save_file(weights, tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match="rewards.hps: .*another model or version: .* missing .* of another shape"):
        make_reward("hps", {"weights": str(tmp_path / "tiny.safetensors"), "model": "ViT-S-32-alt"})


def test_a_models_tokenizer_runs_no_code(tmp_path):
    """Though its own settings ask for it, twice over."""
    folder, ran = tmp_path / "model", tmp_path / "it_ran"
    shutil.copytree(CLIP, folder)
    (folder / "strange.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Strange\n"
    )
    for name, place, more in (
        (
            "tokenizer_config.json",
            (),
            {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["strange.Strange"] * 2}},
        ),
        ("open_clip_config.json", ("model_cfg", "text_cfg"), {"tokenizer_kwargs": {"trust_remote_code": True}}),
    ):
        settings = json.loads((folder / name).read_text())
        found = settings
        for key in place:
            found = found[key]
        found |= more
        (folder / name).write_text(json.dumps(settings))
    with contextlib.suppress(ValueError):
        make_reward("clip", {"model": f"local-dir:{folder}"})
    assert not ran.exists()


# Images and scores during a run


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (lambda images, prompts: torch.zeros(1), "broken: scores of shape \\(1,\\)"),
        (lambda images, prompts: torch.tensor([0.0] * 5 + [NAN]), "broken: not finite for 1 images, the first of"),
        (lambda images, prompts: 1 / 0, "broken: ZeroDivisionError: division by zero"),
    ],
    ids=["wrong length", "NaN", "raises"],
)
def test_a_lying_reward_is_named(reward, told, pictures):
    with pytest.raises(RewardError, match=f"rewards.{told}"):
        score("broken", reward, pictures, CAPTIONS)


def zeros(**options):
    return lambda images, prompts: torch.zeros(len(images), **options)


def filled(value):
    return lambda images, prompts: torch.full((len(images),), value, dtype=torch.float64)


class Silent(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def raises(error):
    def reward(images, prompts):
        raise error

    return reward


def deep(images, prompts):
    return deep(images, prompts)


REFUSED = {
    "a list": (lambda images, prompts: [0.0] * 6, "returned list, expected a tensor"),
    "numpy": (lambda images, prompts: torch.zeros(6).numpy(), "returned ndarray"),
    "None": (lambda images, prompts: None, "returned NoneType"),
    "a number": (lambda images, prompts: 1.0, "returned float"),
    "a dict": (lambda images, prompts: {"scores": torch.zeros(6)}, "returned dict"),
    "a generator": (lambda images, prompts: (0.0 for _ in prompts), "returned generator"),
    "[B, 1]": (lambda images, prompts: torch.zeros(6, 1), r"scores of shape \(6, 1\) for 6"),
    "[1]": (lambda images, prompts: torch.zeros(1), r"scores of shape \(1,\) for 6"),
    "[]": (lambda images, prompts: torch.zeros(()), r"scores of shape \(\) for 6"),
    "nothing": (lambda images, prompts: torch.zeros(0), r"scores of shape \(0,\) for 6"),
    "nested": (lambda images, prompts: torch.nested.nested_tensor([torch.zeros(1)] * 6), "RuntimeError"),
    "sparse": (lambda images, prompts: torch.zeros(6).to_sparse(), "scores of torch.sparse_coo"),
    "complex": (zeros(dtype=torch.complex64), "scores of torch.strided, torch.complex64"),
    "without storage": (zeros(device="meta"), "NotImplementedError"),
    "infinite": (filled(float("inf")), "not finite for 6"),
    "minus infinity": (filled(float("-inf")), "not finite for 6"),
    "NaN": (filled(NAN), "not finite for 6"),
    "beyond float32": (filled(1e300), "not finite for 6"),
    "huge": (filled(3.4e38), r"scores beyond 1e\+15 for 6"),
    "hugely negative": (filled(-1e16), r"scores beyond 1e\+15 for 6"),
    "sys.exit": (lambda images, prompts: sys.exit(), "SystemExit"),
    "sys.exit(3)": (lambda images, prompts: sys.exit(3), "SystemExit: 3"),
    "StopIteration": (lambda images, prompts: next(iter(())), "StopIteration"),
    "GeneratorExit": (raises(GeneratorExit()), "GeneratorExit"),
    "cancelled": (raises(CancelledError()), "CancelledError"),
    "an error that cannot be told": (raises(Silent()), r"Silent: \(says nothing\)"),
    "recursion": (deep, "RecursionError"),
    "out of memory": (raises(MemoryError()), "MemoryError"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_hostile_reward_is_named_and_skipped(kind, pictures):
    reward, told = REFUSED[kind]
    with pytest.raises(RewardError, match=f"^rewards.broken: .*{told}|^rewards.broken: {told}"):
        score("broken", reward, pictures, CAPTIONS)
    with pytest.warns(UserWarning, match="rewards.broken: .*no score for 6 images"):
        assert score_or_nan("broken", reward, pictures, CAPTIONS).isnan().all()


def with_inference(images, prompts):
    with torch.inference_mode():
        return images.mean((1, 2, 3))


def with_gradient(images, prompts):
    with torch.enable_grad():
        return (images.mean((1, 2, 3)) * torch.ones(1, requires_grad=True)).contiguous()


TAKEN = {
    "float64": lambda images, prompts: images.mean((1, 2, 3)).double(),
    "float16": lambda images, prompts: images.mean((1, 2, 3)).half(),
    "bool": lambda images, prompts: images.mean((1, 2, 3)) > 0.5,
    "int8": lambda images, prompts: torch.arange(len(images), dtype=torch.int8),
    "a stride": lambda images, prompts: images[:, 0, 0, 0],
    "one number for all": lambda images, prompts: torch.zeros(1).expand(len(images)),
    "a parameter": lambda images, prompts: torch.nn.Parameter(torch.zeros(len(images))),
    "with a gradient": with_gradient,
    "of inference mode": with_inference,
}


@pytest.mark.parametrize("kind", TAKEN)
def test_an_odd_score_becomes_a_plain_one(kind, pictures):
    scores = score("odd", TAKEN[kind], pictures, CAPTIONS)
    assert scores.shape == (6,) and scores.dtype == torch.float32 and scores.is_contiguous()
    assert not scores.requires_grad and not scores.is_inference()
    assert torch.allclose(scores, TAKEN[kind](pictures, CAPTIONS).float())


def test_a_reward_cannot_change_what_the_next_one_sees(pictures):
    """In place, through numpy, and later: in a buffer that it returned."""
    before, captions, buffer = pictures.clone(), CAPTIONS.copy(), torch.zeros(6)

    def vandal(images, prompts):
        images.mul_(0.5)
        images.numpy()[:] = 0
        prompts.reverse()
        return buffer[: len(images)]

    first = score("vandal", vandal, pictures, captions)
    buffer.fill_(7.0)
    assert torch.equal(pictures, before) and captions == CAPTIONS and (first == 0).all()
    with pytest.warns(UserWarning, match="dropped 1"):
        score("vandal", vandal, spoiled(pictures, 2.0), captions, drop=True)
    assert torch.equal(pictures, before) and captions == CAPTIONS


BUILT_IN = {
    "shapes_soft": {}, "shapes_strict": {}, "jpeg": {}, "saturation": {}, "sharpness": {}, "clip": {"model": "shapes"}
}  # fmt: skip


class Seen(TorchDispatchMode):
    """What the host waits for on a GPU (`waits`), and how often images of this shape are copied."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.waits, self.copies = shape, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        self.waits += op in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
        copy = op in (torch.ops.aten.clone.default, torch.ops.aten.index.Tensor)
        self.copies += copy and made.shape[1:] == self.shape
        return made


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_rewards_get_the_pictures_themselves_and_leave_them_as_they_are(name, pictures, monkeypatch):
    reward, before, given = make_reward(name, BUILT_IN[name]), pictures.clone(), []
    of_class = type(reward).__call__
    monkeypatch.setattr(type(reward), "__call__", lambda *call: given.append(call[1].data_ptr()) or of_class(*call))
    for drop in (False, True):
        score(name, reward, pictures, CAPTIONS, drop)
    assert given == [pictures.data_ptr()] * 2 and torch.equal(pictures, before)


@pytest.mark.parametrize("mode", get_args(ResizeMode))
@pytest.mark.parametrize("size", [16, 32, 48])
def test_the_picture_transforms_leave_their_pictures_as_they_are(mode, size, pictures):
    before = pictures.clone()
    for resize in ("pil", "float"):
        Preprocess(size, mode=mode, resize=resize)(pictures)
    assert torch.equal(pictures, before)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("value", [0.5, 2.0])
def test_a_reward_of_ones_own_gets_one_copy(drop, value, pictures):
    given = spoiled(pictures, value)
    with Seen(pictures.shape[1:]) as seen, contextlib.suppress(RewardError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score("odd", TAKEN["a stride"], given, CAPTIONS, drop)
    assert seen.copies == 1


def test_the_host_waits_once_for_scores_that_are_right(pictures):
    with Seen(pictures.shape[1:]) as seen:
        score("odd", TAKEN["a stride"], pictures, CAPTIONS)
    assert seen.waits == 1


def test_a_picture_that_is_none_is_named_though_the_reward_fails_on_it(pictures):
    with pytest.raises(RewardError, match=r"given images that are not in \[0, 1\] for 1 images"):
        score("broken", lambda images, prompts: 1 / 0, spoiled(pictures, NAN), CAPTIONS)


CHANGES = {
    "working directory": (os.getcwd, lambda: os.chdir("/")),
    "gradient mode": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(False)),
    "default dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "default device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "number of threads": (torch.get_num_threads, lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "deterministic mode": (
        torch.are_deterministic_algorithms_enabled, lambda: torch.use_deterministic_algorithms(True)
    ),
    "precision of float32 products": (
        lambda: torch.backends.cuda.matmul.fp32_precision, lambda: torch.set_float32_matmul_precision("medium")
    ),
    "precision of float32 convolutions": (
        lambda: torch.backends.cudnn.conv.fp32_precision,
        lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_settings_of_the_process_are_put_back(kind, tmp_path, monkeypatch):
    """Whether a reward changes them where it is imported or where it is made (a call is made in no_grad anyway)."""
    get, change = CHANGES[kind]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    monkeypatch.chdir(tmp_path)
    before = get()

    class Changes:
        def __init__(self, device):
            change()

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3))

    module = types.ModuleType("changes_things")
    module.Changes = Changes
    monkeypatch.setitem(sys.modules, "changes_things", module)
    with pytest.warns(UserWarning, match=f"rewards.changes_things:Changes: changed .*{kind}, which is put back"):
        make_reward("changes_things:Changes", {})
    assert get() == before


def test_settings_are_put_back_after_a_call_that_fails(pictures):
    def reward(images, prompts):
        torch.set_default_dtype(torch.float64)
        raise KeyError("x")

    with pytest.warns(UserWarning, match="changed torch's default dtype"), pytest.raises(RewardError, match="KeyError"):
        score("broken", reward, pictures, CAPTIONS)
    assert torch.get_default_dtype() == torch.float32


MODULES = {
    "def color(images, prompts):\n    table = {}\n    return table['red']\n": ("KeyError: 'red'", 3),
    "import torch\ndef color(images, prompts):\n    return torch.zeros(2) @ torch.zeros(3)\n": ("RuntimeError: .*", 3),
    "import json\ndef color(images, prompts):\n    return json.loads('{')\n": ("JSONDecodeError: .*", 3),
    "def color(images, prompts):\n    def inner():\n        1 / 0\n    inner()\n": ("ZeroDivisionError: .*", 3),
    "import sys\ndef color(images, prompts):\n    sys.exit('enough')\n": ("SystemExit: enough", 3),
    "table = {}\ntable['red']\n": ("KeyError: 'red'", 2),
    "import sys\nsys.exit()\n": ("SystemExit: ", 2),
    "def color(images, prompts)\n    pass\n": ("SyntaxError: .*", 1),
    "class color:\n    def __init__(self, device):\n        {}['red']\n": ("KeyError: 'red'", 3),
}


@pytest.mark.parametrize("text", MODULES)
def test_an_error_in_a_users_reward_comes_with_file_and_line(text, tmp_path, monkeypatch, pictures):
    """Imported, made or called; and with the traceback of that code, without the trainer's own frames."""
    told, line = MODULES[text]
    (tmp_path / "users_rewards.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_rewards", raising=False)
    with pytest.raises(RewardError) as error:
        reward = make_reward("users_rewards:color", {})
        try_reward("users_rewards:color", reward, "a red circle", 8, 8, "cpu")
    monkeypatch.delitem(sys.modules, "users_rewards", raising=False)
    named = rf"rewards.users_rewards:color: {told} \(users_rewards.py, line {line}\)"
    assert re.fullmatch(named, str(error.value))
    assert f'users_rewards.py", line {line}' in error.value.trace and "scoring.py" not in error.value.trace
    printed = error_lines(error.value).splitlines()
    assert printed[-1] == f"error: {error.value}" and printed[:-1] == error.value.trace.splitlines()


def test_a_reward_is_tried_without_touching_the_random_state():
    def draws(images, prompts):
        return torch.rand(len(images)) + torch.nan

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    try_reward("draws", draws, "a red circle", 8, 8, "cpu")  # that its score is no number is no matter here
    assert torch.equal(torch.rand(4), expected)


def spoiled(pictures, value):
    pictures = pictures.clone()
    pictures[2, 1, 5, 7] = value
    return pictures


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: (p[:, :1], CAPTIONS), r"images of shape \(6, 1, 32, 32\), expected \[B, 3, H, W\]"),
        (lambda p: (p[0], CAPTIONS), r"images of shape \(3, 32, 32\)"),
        (lambda p: (p[:5], CAPTIONS), "5 images for 6 prompts"),
        (lambda p: (p.mul(255).to(torch.uint8), CAPTIONS), "images of torch.uint8"),
    ],
    ids=["channels", "one image", "count", "bytes"],
)
def test_what_is_no_picture_is_named(change, told, drop, pictures):
    with pytest.raises(RewardError, match=f"rewards.jpeg: {told}"):
        score("jpeg", make_reward("jpeg", {}), *change(pictures), drop=drop)


@pytest.mark.parametrize("value", [NAN, float("inf"), -0.01, 1.01])
def test_pictures_out_of_range_are_named_or_dropped(value, pictures):
    jpeg = make_reward("jpeg", {})
    with pytest.raises(RewardError, match="rewards.jpeg: .*not in \\[0, 1\\] for 1 images, the first of"):
        score("jpeg", jpeg, spoiled(pictures, value), CAPTIONS)
    with pytest.warns(UserWarning, match="rewards.jpeg: dropped 1 of 6 images"):
        scores = score("jpeg", jpeg, spoiled(pictures, value), CAPTIONS, drop=True)
    whole = jpeg(pictures, CAPTIONS)
    whole[2] = NAN
    assert torch.equal(scores.nan_to_num(7.0), whole.nan_to_num(7.0))


def failing(error, at):
    def reward(images, prompts):
        if CAPTIONS[at] in prompts:
            raise error
        return images.mean((1, 2, 3))

    return reward


def test_a_picture_that_makes_the_call_fail_is_found(pictures):
    with pytest.warns(UserWarning, match="rewards.picky: dropped 1 of 6"):
        scores = score("picky", failing(RuntimeError("no"), 4), pictures, CAPTIONS, drop=True)
    assert scores.isnan().tolist() == [False] * 4 + [True, False]


def test_what_is_no_pictures_fault_is_never_dropped(pictures):
    with pytest.raises(RewardError, match="rewards.away: ConnectionError: gone"):
        score("away", failing(ConnectionError("gone"), 4), pictures, CAPTIONS, drop=True)
    with pytest.raises(RewardError, match="rewards.broken: ZeroDivisionError"):
        score("broken", lambda images, prompts: 1 / 0, pictures, CAPTIONS, drop=True)
    with pytest.raises(RewardError, match="rewards.broken: scores of shape"):
        score("broken", lambda images, prompts: torch.zeros(1), pictures, CAPTIONS, drop=True)


@pytest.mark.parametrize("mix", ["reward", "advantage"])
def test_the_largest_scores_and_weights_stay_finite(mix):
    """What is accepted as a score and as a weight can be mixed, standardised and logged in float32."""
    rewards = LARGEST * torch.tensor([1.0, -1.0]).repeat(2, 1, 1, 512)
    weights = torch.tensor([1e6, 1e6])
    advantages = group_advantage_ref(rewards, weights, mix, 5.0)
    assert advantages.isfinite().all() and advantages.std() > 0.9 and rewards.std().isfinite()


# What a dropped sample leaves


@pytest.mark.parametrize("mix", ["reward", "advantage"])
def test_a_dropped_sample_has_no_advantage(mix):
    random = torch.Generator().manual_seed(0)
    rewards = [torch.randn(2, 3, 12, generator=random) * 3 + 20, torch.rand(2, 3, 5, generator=random)]
    weights = torch.tensor([1.0, 0.5])
    rewards[0][1, 2, 7] = NAN
    rewards[1][0, 0, 1:] = NAN  # one left: nothing to compare it with
    filled, share = fill_dropped(rewards)
    first, second = (
        group_advantage_ref(group[:, :, None], weights, mix, 5.0)[:, 0] for group in filled.split([12, 5], -1)
    )
    assert share.item() == pytest.approx(5 / 51)
    assert first[2, 7].abs() < 1e-6 and (second[0] == 0).all()
    kept = [i for i in range(12) if i != 7]
    smaller = group_advantage_ref(rewards[0][:, 2:, None, kept], weights, mix, 5.0)[0, 0]
    assert torch.allclose(first[2, kept], smaller * (11 / 10) ** 0.5, rtol=1e-4)
    whole = group_advantage_ref(rewards[0][:, :2, None], weights, mix, 5.0)[:, 0]
    assert torch.equal(first[:2], whole), "groups that lost nothing are as they were"


def test_equal_rewards_stay_equal_beside_a_dropped_one():
    """The mean of equal numbers must be that number, or rounding would be standardised to advantages of 1."""
    rewards = torch.full((1, 1, 12), 0.1)
    rewards[0, 0, 3] = NAN
    filled, _ = fill_dropped([rewards])
    assert (filled == rewards[0, 0, 0]).all()


def test_a_group_that_is_lost_and_a_rollout_that_is_lost():
    rewards = torch.tensor([[[1.0, 3.0], [NAN, NAN]]])
    filled, share = fill_dropped([rewards])
    assert filled.tolist() == [[[1.0, 3.0], [2.0, 2.0]]] and share == 0.5
    with pytest.raises(RewardError, match="every image of a rollout was dropped"):
        fill_dropped([torch.full((1, 1, 4), NAN)])


def test_the_recipe_says_stop_or_drop():
    assert load_config("shapes", ["output_dir=x"]).objective.on_error == "skip"
    assert load_config("shapes", ["output_dir=x", "objective.on_error=drop"]).objective.on_error == "drop"
    with pytest.raises(ValueError, match="objective.on_error: 'zero'"):
        load_config("shapes", ["output_dir=x", "objective.on_error=zero"])


@pytest.mark.slow
def test_full_size_hps(tmp_path):
    """ViT-H-14 on random weights in the published layout: a batch of 8, at once and one by one. Times are printed."""
    from time import perf_counter

    import open_clip

    with torch.device("meta"):
        shapes = open_clip.create_model("ViT-H-14", load_weights=False, device="meta").state_dict()
    random = torch.Generator().manual_seed(0)
    numbers = torch.randn(max(tensor.numel() for tensor in shapes.values()), generator=random)
    weights = {
        name: (numbers[: tensor.numel()].reshape(tensor.shape) / max(tensor[:1].numel(), 16) ** 0.5).half()
        if tensor.ndim
        else torch.tensor(4.6)
        for name, tensor in shapes.items()
    }
    torch.save({"state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
    del weights, numbers
    reward = make_reward("hps", {"weights": str(tmp_path)})
    images, prompts = torch.rand(8, 3, 96, 64, generator=random), [f"a cat, {n}" for n in range(8)]
    together = score("hps", reward, images, prompts)  # the prompts are encoded here, once, and not in what is timed

    def seconds(images, prompts):
        started = perf_counter()
        scores = score("hps", reward, images, prompts)
        return perf_counter() - started, scores

    # The least of several: a machine that does something else too makes no time shorter.
    batched = min(seconds(images, prompts)[0] for _ in range(2)) / 8
    times, scores = zip(*(seconds(image[None], [prompt]) for image, prompt in zip(images, prompts)))
    single, alone = min(times), torch.cat(scores)
    print(f"\nViT-H-14: {batched:.2f} s per picture in a batch of 8, {single:.2f} s alone: {single / batched:.2f} x")
    assert torch.allclose(together, alone, rtol=0, atol=1e-5)


def test_a_reward_is_called_without_gradient_in_whichever_thread():
    """Its parameters may well ask for one: the update is no place for them, and activations would wait for it."""
    layer = torch.nn.Linear(3, 1)

    def judge(images, prompts):
        return layer(images.mean((2, 3))).flatten()

    with ThreadPoolExecutor(1) as beside:
        for call in (score, partial(beside.submit, score)):
            scores = call("mine", judge, torch.rand(2, 3, 8, 8), ["a", "b"])
            assert not (scores if isinstance(scores, torch.Tensor) else scores.result()).requires_grad
