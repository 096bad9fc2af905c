"""FLUX.1 pipelines of random weights, for `python -m egrpo_fast.models.random`."""

from functools import partial

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from egrpo_fast.models import random

SIZES = {
    "tiny": {
        "num_layers": 1, "num_single_layers": 2,
        "num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12),
    },
    "small": {
        "num_layers": 2, "num_single_layers": 4,
        "num_attention_heads": 6, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12),
    },
    "30m": {
        "num_layers": 2, "num_single_layers": 3,
        "num_attention_heads": 8, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24),
    },
    "medium": {
        "num_layers": 4, "num_single_layers": 10,
        "num_attention_heads": 10, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56),
    },
}  # fmt: skip
"""Transformers of 0.3, 5, 30 and 491 million parameters."""


def _make(size: str, guidance_embeds: bool) -> FluxPipeline:
    tokenizer, tokenizer_2 = random.clip_tokenizer(), random.t5_tokenizer()
    return FluxPipeline(
        # The fixed shift of the training rollout, so that both draw the same image from the same noise.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=random.vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        tokenizer=tokenizer,
        text_encoder=random.clip(CLIPTextModel, tokenizer),
        tokenizer_2=tokenizer_2,
        text_encoder_2=random.t5(tokenizer_2),
        transformer=FluxTransformer2DModel(
            **random.sized(SIZES, size),
            in_channels=64,
            joint_attention_dim=random.TEXT_WIDTH,
            pooled_projection_dim=random.TEXT_WIDTH,
            guidance_embeds=guidance_embeds,
        ),
    )


KINDS = {
    "flux-dev": partial(_make, guidance_embeds=True),
    "flux-schnell": partial(_make, guidance_embeds=False),
}
