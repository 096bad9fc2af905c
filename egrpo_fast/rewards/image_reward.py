"""ImageReward: a BLIP image-grounded text encoder with a linear head (Xu et al., 2023).

BLIP is transformers', not the `image-reward` package's: that one pins timm 0.6 and fairscale and imports names which
transformers dropped years ago, so it cannot live beside this trainer. The published checkpoint keeps its layout and is
renamed on loading (`RENAMED`); `tests/rewards/test_original.py` holds the result against the package's own modules.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from egrpo_fast.files import expanded
from egrpo_fast.scoring.preprocess import Preprocess
from egrpo_fast.scoring.scorer import Dtype, Scorer
from egrpo_fast.scoring.weights import find_weights, load_weights, read_weights

FILE = "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the authors' training set; published as constants of the code."""
TOKENS = 35
HEAD_WIDTH = 64
"""Of an attention head, in every BLIP."""

RENAMED = {
    r"blip\.visual_encoder\.cls_token": "vision.embeddings.class_embedding",
    r"blip\.visual_encoder\.pos_embed": "vision.embeddings.position_embedding",
    r"blip\.visual_encoder\.patch_embed\.proj\.": "vision.embeddings.patch_embedding.",
    r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.": r"vision.encoder.layers.\1.layer_norm\2.",
    r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.": r"vision.encoder.layers.\1.self_attn.qkv.",
    r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.": r"vision.encoder.layers.\1.self_attn.projection.",
    r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.": r"vision.encoder.layers.\1.mlp.",
    r"blip\.visual_encoder\.norm\.": "vision.post_layernorm.",
    r"blip\.text_encoder\.": "text.",
    r"mlp\.layers\.": "head.",
}
"""Start of a name in the published checkpoint -> in transformers' BLIP."""
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "text.embeddings.position_ids")
"""Of BLIP's contrastive pretraining, which no score reads; and a counter that transformers makes itself."""


def rename(name: str) -> str:
    """A tensor's name in the published checkpoint -> its name here; unknown names stay."""
    for pattern, replacement in RENAMED.items():
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    return name


class _Network(nn.Module):
    """Vision and text tower and head, as large as the (renamed) checkpoint's tensors are."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        patch = tensors["vision.embeddings.patch_embedding.weight"]
        words, positions = (tensors[f"text.embeddings.{name}_embeddings.weight"] for name in ("word", "position"))
        grid = round((tensors["vision.embeddings.position_embedding"].shape[1] - 1) ** 0.5)

        def shape(tower: str, layers: str, hidden: str) -> dict[str, int]:
            indices = [int(name.split(".")[3]) for name in tensors if name.startswith(f"{tower}.encoder.{layers}.")]
            inner = tensors[f"{tower}.encoder.{layers}.0.{hidden}.weight"]
            return {
                "num_hidden_layers": max(indices) + 1, "intermediate_size": inner.shape[0],
                "hidden_size": inner.shape[1], "num_attention_heads": inner.shape[1] // HEAD_WIDTH,
            }  # fmt: skip

        self.vision = BlipVisionModel(
            BlipVisionConfig(
                **shape("vision", "layers", "mlp.fc1"), patch_size=patch.shape[-1], image_size=grid * patch.shape[-1],
                layer_norm_eps=1e-6,
            )
        )  # fmt: skip
        # `is_decoder` gives the layers their attention to the image; an argument has the forward read both ways.
        self.text = BlipTextModel(
            BlipTextConfig(
                **shape("text", "layer", "intermediate.dense"), vocab_size=len(words), layer_norm_eps=1e-12,
                max_position_embeddings=len(positions), encoder_hidden_size=patch.shape[0], is_decoder=True,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        linear = [name for name in tensors if re.fullmatch(r"head\.\d+\.weight", name)]
        places = {int(name.split(".")[1]): tensors[name].shape for name in linear}
        # Dropouts stand between the linear layers, and count in their numbers.
        self.head = nn.Sequential(
            *(nn.Linear(*places[n][::-1]) if n in places else nn.Identity() for n in range(max(places) + 1))
        )


class ImageReward(Scorer):
    """`(head(text(prompt, vision(image))[CLS]) - 0.167) / 1.033`, about -2 to 2.

    weights: the published `.pt` or the same tensors as safetensors, a folder that holds `ImageReward.pt`, or a hub id.
    tokenizer: hub id or folder of the BERT tokenizer; prompts are cut to 35 tokens, as the original cuts them.
    Images: shorter side to 224, centre crop. micro_batch, dtype, offload: as in `Scorer`; float32 as the original.
    The prompt attends to the image, so there are no features of a prompt alone: its tokens are what is kept.
    ValueError: no weights, or of another model.
    """

    @staticmethod
    def parameters(**options: Any) -> int:
        """Of the published model."""
        return 446_206_689

    def __init__(
        self,
        weights: str = "THUDM/ImageReward",
        tokenizer: str = "bert-base-uncased",
        micro_batch: int | None = None,
        dtype: Dtype | None = None,
        offload: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        path = find_weights(weights, FILE)
        tensors = {rename(name): tensor for name, tensor in read_weights(path).items()}
        try:
            network = _Network(tensors)
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"weights: {path} is not in ImageReward's layout: lacks {error}") from None
        load_weights(network, tensors, str(path), UNUSED)
        size = network.vision.config.image_size
        super().__init__(network, Preprocess(size), device, micro_batch, dtype, offload)
        self._tokenizer = BertTokenizer.from_pretrained(expanded(tokenizer))
        # As the original: a prompt that spells these out is then one token of them too.
        self._tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})

    def encode(self, prompts: list[str]) -> Tensor:
        tokens = self._tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return torch.stack((tokens.input_ids, tokens.attention_mask), dim=1).to(self.device)

    def compare(self, images: Tensor, features: Tensor) -> Tensor:
        ids, mask = features.unbind(1)
        image = self.network.vision(images).last_hidden_state
        read = self.network.text(ids, mask, encoder_hidden_states=image, is_decoder=False).last_hidden_state
        return (self.network.head(read[:, 0].float()).squeeze(-1).float() - MEAN) / STD


REWARD = ImageReward
