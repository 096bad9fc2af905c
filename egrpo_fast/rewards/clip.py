"""CLIP score: cosine similarity of image and prompt in an open_clip model (Radford et al., 2021)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import dynamic_module_utils

from egrpo_fast.files import expanded, read_json
from egrpo_fast.scoring.preprocess import Interpolation, Preprocess, ResizeMode
from egrpo_fast.scoring.scorer import Dtype, Scorer
from egrpo_fast.shapes import CLIP, EMBEDDED

# open_clip has transformers load text towers of any kind: one that brings its own code is refused, without a question.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


class OpenClipCosine(Scorer):
    """`cos(image_features, text_features)` in [-1, 1], of any open_clip network and image transform."""

    original_dtype: Dtype = "float16"

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        preprocess: Preprocess,
        device: torch.device | str,
        micro_batch: int | None,
        dtype: Dtype | None,
        offload: bool,
    ) -> None:
        super().__init__(network, preprocess, device, micro_batch, dtype, offload)
        self._tokenizer = tokenizer

    def encode(self, prompts: list[str]) -> Tensor:
        return F.normalize(self.network.encode_text(self._tokenizer(prompts).to(self.device)).float(), dim=-1)

    def compare(self, images: Tensor, features: Tensor) -> Tensor:
        # A half-precision product would round a score of 0.3 to steps of 2e-4, as wide as a group's differences.
        return (F.normalize(self.network.encode_image(images).float(), dim=-1) * features).sum(-1)


def tokenizer_of(model: str) -> Callable[[list[str]], Tensor]:
    """The tokenizer of an open_clip model, which runs no code of the model's folder, though its settings ask for it."""
    text = (open_clip.get_model_config(model) or {}).get("text_cfg", {})
    refused = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    return open_clip.get_tokenizer(model, **refused)


def weights_in(architecture: Mapping[str, Any] | None) -> int:
    """How many an open_clip model has. ValueError: it is of a kind that cannot be made without its files."""
    if architecture is None:
        raise ValueError("model: no open_clip architecture")
    with torch.device("meta"):
        network = open_clip.CLIP(**architecture)
    return sum(parameter.numel() for parameter in network.parameters())


def _spelled(model: str) -> str:
    """As open_clip names it: the embedded one is in a folder; variables in a path are filled in."""
    name = f"local-dir:{CLIP}" if model == EMBEDDED else model
    prefix, found, path = name.partition("local-dir:")
    return f"local-dir:{expanded(path)}" if found and not prefix else name


class ClipScore(OpenClipCosine):
    """`cos(image_features, text_features)` in [-1, 1].

    model: an open_clip model name, `local-dir:FOLDER` or `hf-hub:ID`, or `shapes` for the embedded one. pretrained,
    with a name alone: open_clip's tag of its weights, or a file of weights. weights: a file that holds those of the
    tag. Image transform and activation belong to the weights: they are the tag's; of a file without one, those in
    `open_clip_config.json` beside it, or those that all of the model's tags share. Images: that transform, on the
    device. micro_batch, dtype, offload: as in `Scorer`; autocast to float16 on a GPU.
    ValueError: no weights, or not this model's; or nothing tells the transform and the activation.
    """

    @staticmethod
    def parameters(model: str, **options: Any) -> int:
        """Of the architecture, whose config alone is read, from a folder or the hub if need be."""
        return weights_in(open_clip.get_model_config(_spelled(model)))

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        weights: str | None = None,
        micro_batch: int | None = None,
        dtype: Dtype | None = None,
        offload: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        network, tokenizer = _load(model, pretrained, weights, "cpu" if offload else device)
        config = open_clip.get_model_preprocess_cfg(network)
        height, width = config["size"] if isinstance(config["size"], (tuple, list)) else (config["size"],) * 2
        if height != width:
            raise ValueError(f"model: {model} reads images of {height}x{width}; only square ones are served")
        how = config["resize_mode"], config["interpolation"], config.get("fill_color", 0)
        if how[0] not in get_args(ResizeMode) or how[1] not in get_args(Interpolation) or how[2]:
            raise ValueError(f"model: {model} resizes images by {how}, which is not served")
        preprocess = Preprocess(height, tuple(config["mean"]), tuple(config["std"]), *how[:2])
        super().__init__(network, tokenizer, preprocess, device, micro_batch, dtype, offload)


def _load(
    model: str, pretrained: str | None, weights: str | None, device: torch.device | str
) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    """The network, which knows its image transform, and its tokenizer."""
    # Without weights open_clip would hand out a random model, and a run would train on noise.
    make = partial(open_clip.create_model, device=device, weights_only=True)
    name = _spelled(model)
    if name.startswith(("local-dir:", "hf-hub:")):
        if pretrained or weights:
            raise ValueError(f"pretrained: {pretrained or weights}, but model: {model} names its weights itself")
        return make(name, require_pretrained=True), tokenizer_of(name)
    architecture = open_clip.get_model_config(name)
    if architecture is None:
        raise ValueError(f"model: {model!r} is no open_clip architecture")
    if pretrained is None:
        raise ValueError(f"pretrained: a tag or a file of weights is needed for model: {model}")
    file, tags = Path(expanded(weights or pretrained)), open_clip.list_pretrained_tags_by_model(name)
    if weights is not None and not file.is_file():
        raise ValueError(f"weights: no file {weights}")
    if weights is not None or not file.is_file():
        if not open_clip.get_pretrained_cfg(name, pretrained):
            raise ValueError(f"pretrained: {pretrained!r} is no file and no tag of {model}; tags: {', '.join(tags)}")
        tags = [pretrained]
    elif (beside := file.parent / "open_clip_config.json").is_file():
        _check_same(model, architecture, beside)
        network = make(f"local-dir:{file.parent}", load_weights=False, pretrained_text=False)
        open_clip.load_checkpoint(network, str(file), strict=True, weights_only=True)
        return network, tokenizer_of(f"local-dir:{file.parent}")
    transform, quick_gelu = _of_tags(name, tags, file)
    if architecture.get("quick_gelu", False) and not quick_gelu:
        raise ValueError(f"model: {model} computes QuickGELU, the weights {pretrained} do not; leave out -quickgelu")
    network = make(
        name, pretrained=str(file) if file.is_file() else pretrained, require_pretrained=True,
        force_quick_gelu=quick_gelu, force_preprocess_cfg=transform,
    )  # fmt: skip
    return network, tokenizer_of(name)


def _of_tags(model: str, tags: Sequence[str], file: Path) -> tuple[dict[str, Any], bool]:
    """The image transform of open_clip's tags, and whether they compute QuickGELU. ValueError: they do not agree."""
    known = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    found = [
        ({key: of_tag[key] for key in ("mean", "std", "interpolation", "resize_mode")}, of_tag.get("quick_gelu", False))
        for of_tag in known
    ]
    if not found or found.count(found[0]) != len(found):
        raise ValueError(
            f"pretrained: {file} does not say its image transform and activation, and open_clip's tags of {model} do "
            f"not tell them; name its tag (pretrained: TAG, weights: {file}), or put open_clip_config.json beside it"
        )
    return found[0]


def _check_same(model: str, architecture: Mapping[str, Any], file: Path) -> None:
    """ValueError where an `open_clip_config.json` describes other towers than the named model's."""
    try:
        found = read_json(file)["model_cfg"]
        differ = [
            f"{part}.{key}"
            for part in ("vision_cfg", "text_cfg")
            for key, value in architecture[part].items()
            if found[part].get(key, value) != value
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"pretrained: {file} cannot be read: {error!r}") from None
    if differ:
        raise ValueError(f"model: {model} is not what {file} describes ({differ[0]}, ...)")


REWARD = ClipScore
