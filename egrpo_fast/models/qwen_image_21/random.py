"""Qwen-Image 2.1 pipelines of random weights, for `python -m egrpo_fast.models.random`."""

from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from torch import nn
from transformers import (
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from egrpo_fast.models import random

SIZES = {
    "tiny": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)},
    "small": {"num_layers": 4, "num_attention_heads": 6, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)},
}
SEEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'][0]['text'] }}<|im_end|>\n"
    "{% endfor %}"
)


def _make(size: str) -> QwenImage21Pipeline:
    tokenizer = random.byte_tokenizer(Qwen2TokenizerFast, (*SEEN, *random.QWEN), "<|endoftext|>", CHAT)
    start, end, image, video = tokenizer.convert_tokens_to_ids(SEEN)
    width = random.TEXT_WIDTH
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        vision_start_token_id=start, vision_end_token_id=end, image_token_id=image, video_token_id=video,
    )  # fmt: skip
    transformer = QwenImage21Transformer2DModel(**random.sized(SIZES, size), context_in_dim=width)
    nn.init.normal_(transformer.modulation[1].weight)  # as they are made, gates are all but shut, and nobody hears text
    nn.init.normal_(transformer.txt_in.text_norm.weight, std=0.2)  # 0 at its making
    return QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage21(base_dim=8, decoder_base_dim=8, num_res_blocks=1),
        text_encoder=Qwen3VLForConditionalGeneration(config),
        processor=Qwen3VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen3VLVideoProcessor(), chat_template=CHAT),
        transformer=transformer,
    )


KINDS = {"qwen-image-2.1": _make}
