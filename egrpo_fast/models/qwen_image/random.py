"""Qwen-Image pipelines of random weights, for `python -m egrpo_fast.models.random`."""

import re

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from egrpo_fast.models import random
from egrpo_fast.models.qwen_image.text import CHAT

SIZES = {
    "tiny": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)},
    "small": {"num_layers": 4, "num_attention_heads": 6, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)},
}
WORDS = sorted(set(re.findall(r" ?[A-Za-z]+", CHAT.replace("<|im_start|>", "").replace("<|im_end|>", ""))))


def _make(size: str) -> QwenImagePipeline:
    # So that the system message has as many tokens as the model's own tokenizer makes of it.
    tokenizer, width = random.qwen_tokenizer(WORDS), random.TEXT_WIDTH
    places = dict(zip(("vision_start_token_id", "image_token_id", "video_token_id"), range(3)))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width,
        },
        **places,
    )  # fmt: skip
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(**random.sized(SIZES, size), joint_attention_dim=width),
    )


KINDS = {"qwen-image": _make}
