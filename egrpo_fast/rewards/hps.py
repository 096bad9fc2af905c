"""HPSv2.1 and v2.0: human preference score of a tuned CLIP ViT-H/14 (Wu et al., 2023; the `hpsv2` package)."""

from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from accelerate import init_empty_weights

from egrpo_fast.rewards.clip import OpenClipCosine, tokenizer_of, weights_in
from egrpo_fast.scoring.preprocess import Preprocess
from egrpo_fast.scoring.scorer import Dtype
from egrpo_fast.scoring.weights import find_weights, load_weights, read_weights

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
"""Both versions are one architecture: only the file tells them apart."""


class HpsScore(OpenClipCosine):
    """`cos(image_features, text_features)`, about 0.2 to 0.4, of the HPS weights.

    weights: `.pt` (`{"state_dict": ...}`, as published) or safetensors file, a folder that holds the published file, or
    a hub id. version: which published file to take; a file published as the other version is refused. model: the
    open_clip architecture. micro_batch, dtype, offload: as in `Scorer`; autocast to float16 on a GPU, as the original.

    The image transform is the original's, which resizes float tensors too: longer side to the model's size (bicubic,
    antialiased, not cut to [0, 1]), black padding, normalised after it ("mask-aware" there spares a fourth channel,
    which images do not have). One difference: the original leaves an image whose longer side fits already unpadded,
    and then fails on it; here it is padded.
    ValueError: no weights, or of another model or version.
    """

    @staticmethod
    def parameters(model: str = "ViT-H-14", **options: Any) -> int:
        """Of the architecture. ValueError: it is none of open_clip's."""
        return weights_in(open_clip.get_model_config(model))

    def __init__(
        self,
        weights: str = "xswu/HPSv2",
        version: Literal["v2.0", "v2.1"] = "v2.1",
        model: str = "ViT-H-14",
        micro_batch: int | None = None,
        dtype: Dtype | None = None,
        offload: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if version not in FILES:
            raise ValueError(f"version: {version!r}, allowed: {', '.join(FILES)}")
        published_as = {file: name for name, file in FILES.items()}.get(Path(weights).name, version)
        if published_as != version:
            raise ValueError(f"weights: {weights} is HPS {published_as}, not {version}; set version or the file")
        path = find_weights(weights, FILES[version])
        tensors = read_weights(path)
        config = open_clip.get_model_config(model)
        if config is None:
            raise ValueError(f"model: {model!r} is no open_clip architecture")
        with init_empty_weights(include_buffers=False):  # a billion random numbers, to be replaced, take a minute
            network = open_clip.CLIP(**config)
        load_weights(network, tensors, str(path))
        preprocess = Preprocess(network.visual.image_size[0], mode="longest", resize="float")
        super().__init__(network, tokenizer_of(model), preprocess, device, micro_batch, dtype, offload)


REWARD = HpsScore
