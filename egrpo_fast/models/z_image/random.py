"""Z-Image pipelines of random weights, for `python -m egrpo_fast.models.random`."""

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import nn
from transformers import Qwen3Model

from egrpo_fast.models import random

SIZES = {
    "tiny": {"n_layers": 2, "n_refiner_layers": 1, "dim": 64, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 12, 12]},
    "small": {
        "n_layers": 4, "n_refiner_layers": 2, "dim": 192, "n_heads": 6, "n_kv_heads": 6, "axes_dims": [8, 12, 12]
    },
}  # fmt: skip


def _make(size: str) -> ZImagePipeline:
    tokenizer = random.qwen_tokenizer()
    transformer = ZImageTransformer2DModel(**random.sized(SIZES, size), cap_feat_dim=random.TEXT_WIDTH)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # 0 at their making
        nn.init.normal_(token)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=random.vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(random.qwen3(tokenizer, num_hidden_layers=3)),
        tokenizer=tokenizer,
        transformer=transformer,
    )


KINDS = {"z-image": _make}
