"""PickScore: preference score of a CLIP ViT-H/14 tuned on Pick-a-Pic (Kirstain et al., 2023)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from egrpo_fast.files import expanded
from egrpo_fast.scoring.preprocess import Preprocess
from egrpo_fast.scoring.scorer import Dtype, Scorer
from egrpo_fast.scoring.weights import check_shards


class PickScore(Scorer):
    """`exp(logit_scale) * cos(image_features, text_features)`: the published formula, about 18 to 24.

    The published logit scale is ln 100, so papers that print 0.2 rather than 20 print the cosine: `scaled: false`.
    weights: hub id, or folder in transformers' layout with safetensors. tokenizer: hub id or folder of the CLIP
    tokenizer that the weights were trained with. Images: shorter side to the model's size, centre crop, as the
    published processor. micro_batch, dtype, offload: as in `Scorer`; float32 as the original.
    ValueError: no safetensors there, or not of a whole CLIP model.
    """

    @staticmethod
    def parameters(**options: Any) -> int:
        """Of the published model."""
        return 986_109_441

    def __init__(
        self,
        weights: str = "yuvalkirstain/PickScore_v1",
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        scaled: bool = True,
        micro_batch: int | None = None,
        dtype: Dtype | None = None,
        offload: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        weights, tokenizer = expanded(weights), expanded(tokenizer)
        check_shards(weights)
        network, report = CLIPModel.from_pretrained(
            weights, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        # transformers fills what a checkpoint lacks with random numbers, and warns.
        lacking = {str(key) for what in ("missing_keys", "mismatched_keys") for key in report[what]}
        if lacking:
            raise ValueError(f"weights: {weights} is no whole CLIP model: {len(lacking)} tensors, as {min(lacking)}")
        preprocess = Preprocess(network.config.vision_config.image_size, crop="floor")
        super().__init__(network, preprocess, device, micro_batch, dtype, offload)
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        self._length = network.config.text_config.max_position_embeddings
        self._scale = network.logit_scale.exp().item() if scaled else 1.0

    def encode(self, prompts: list[str]) -> Tensor:
        # Padded to the full length: features must not depend on which prompts were encoded together.
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        ).to(self.device)
        features = self.network.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
        return F.normalize(features.float(), dim=-1)

    def compare(self, images: Tensor, features: Tensor) -> Tensor:
        image = self.network.get_image_features(images).pooler_output
        return self._scale * (F.normalize(image.float(), dim=-1) * features).sum(-1)


REWARD = PickScore
