"""Stable Diffusion 3.5 pipelines of random weights, for `python -m egrpo_fast.models.random`."""

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from egrpo_fast.models import random

SIZES = {
    "tiny": {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 32},
    "small": {"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 32},
}


def _make(size: str) -> StableDiffusion3Pipeline:
    sizes = random.sized(SIZES, size)
    first, second, third = random.clip_tokenizer(), random.clip_tokenizer(), random.t5_tokenizer()
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=random.vae(16, scaling_factor=1.5305, shift_factor=0.0609),
        tokenizer=first,
        text_encoder=random.clip(CLIPTextModelWithProjection, first),
        tokenizer_2=second,
        text_encoder_2=random.clip(CLIPTextModelWithProjection, second, 2 * random.TEXT_WIDTH),
        tokenizer_3=third,
        text_encoder_3=random.t5(third, 4 * random.TEXT_WIDTH),
        transformer=SD3Transformer2DModel(
            **sizes,
            joint_attention_dim=4 * random.TEXT_WIDTH,
            pooled_projection_dim=3 * random.TEXT_WIDTH,
            caption_projection_dim=sizes["num_attention_heads"] * sizes["attention_head_dim"],
            pos_embed_max_size=96,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
    )


KINDS = {"sd3": _make}
