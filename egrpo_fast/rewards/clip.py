"""CLIP score: cosine similarity of picture and prompt in an open_clip model (Radford et al., 2021)."""

from collections.abc import Callable

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egrpo_fast.rewards.preprocess import Preprocess
from egrpo_fast.rewards.scorer import Dtype, Scorer
from egrpo_fast.shapes import CLIP, EMBEDDED


class OpenClipCosine(Scorer):
    """`cos(image_features, text_features)` in [-1, 1], of any open_clip network and picture transform."""

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

    def compare(self, pictures: Tensor, features: Tensor) -> Tensor:
        # A half-precision product would round a score of 0.3 to steps of 2e-4, as wide as a group's differences.
        return (F.normalize(self.network.encode_image(pictures).float(), dim=-1) * features).sum(-1)


def tokenizer_of(model: str) -> Callable[[list[str]], Tensor]:
    """The tokenizer of an open_clip model, which runs no code of the model's folder, though its settings ask for it."""
    text = (open_clip.get_model_config(model) or {}).get("text_cfg", {})
    refused = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    return open_clip.get_tokenizer(model, **refused)


class ClipScore(OpenClipCosine):
    """`cos(image_features, text_features)` in [-1, 1].

    model: an open_clip model name, `local-dir:FOLDER` or `hf-hub:ID`, or `shapes` for the embedded one. pretrained: its
    weights' tag or file, where the model does not name them itself; one of the two must. Pictures: the model's own
    transform, on the device. micro_batch, dtype, offload: as in `Scorer`; autocast to float16 on a GPU.
    ValueError: no weights, or not this model's.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        micro_batch: int | None = None,
        dtype: Dtype | None = None,
        offload: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        name = f"local-dir:{CLIP}" if model == EMBEDDED else model
        home = "cpu" if offload else device
        # Without weights open_clip would hand out a random model, and a run would train on noise.
        network = open_clip.create_model(
            name, pretrained=pretrained, require_pretrained=True, weights_only=True, device=home
        )
        config = open_clip.get_model_preprocess_cfg(network)
        height, width = config["size"] if isinstance(config["size"], (tuple, list)) else (config["size"],) * 2
        if height != width:
            raise ValueError(f"model: {model} reads pictures of {height}x{width}; only square ones are served")
        preprocess = Preprocess(
            height, tuple(config["mean"]), tuple(config["std"]), config["resize_mode"], config["interpolation"]
        )
        super().__init__(network, tokenizer_of(name), preprocess, device, micro_batch, dtype, offload)
