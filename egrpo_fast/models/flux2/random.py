"""FLUX.2 pipelines of random weights, for `python -m egrpo_fast.models.random`."""

from functools import partial

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

from egrpo_fast.models import random

SIZES = {
    "tiny": {
        "num_layers": 1, "num_single_layers": 2,
        "num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 8, 8, 8),
    },
    "small": {
        "num_layers": 2, "num_single_layers": 4,
        "num_attention_heads": 6, "attention_head_dim": 32, "axes_dims_rope": (8, 8, 8, 8),
    },
}  # fmt: skip
MISTRAL = ("<unk>", "<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]",
           "[IMG_END]", "<pad>", "</s>")  # fmt: skip
TEMPLATE = (
    "<s>{% for message in messages %}{% set text = message['content'][0]['text'] %}{% if message['role'] == 'system' %}"
    "[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)


def _parts(size: str, guidance_embeds: bool, text_width: int) -> dict[str, object]:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32), norm_num_groups=8,
    )  # fmt: skip
    vae.bn.running_mean.uniform_(-0.1, 0.1)
    vae.bn.running_var.uniform_(0.5, 1.5)
    transformer = Flux2Transformer2DModel(
        **random.sized(SIZES, size), joint_attention_dim=text_width, guidance_embeds=guidance_embeds
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), "vae": vae,
        "transformer": transformer,
    }  # fmt: skip


def _klein(size: str, is_distilled: bool) -> Flux2KleinPipeline:
    tokenizer = random.qwen_tokenizer()
    parts = _parts(size, False, 3 * random.TEXT_WIDTH)
    encoder = Qwen3ForCausalLM(random.qwen3(tokenizer, num_hidden_layers=28))
    return Flux2KleinPipeline(**parts, text_encoder=encoder, tokenizer=tokenizer, is_distilled=is_distilled)


def _dev(size: str) -> Flux2Pipeline:
    options = {"bos_token": "<s>", "padding_side": "left"}
    tokenizer = random.byte_tokenizer(PreTrainedTokenizerFast, MISTRAL, "<pad>", TEMPLATE, **options)
    processor = PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=TEMPLATE)
    text = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=random.TEXT_WIDTH, intermediate_size=2 * random.TEXT_WIDTH,
        num_hidden_layers=31, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=None,
    )  # fmt: skip
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(vision_config=vision, text_config=text))
    parts = _parts(size, True, 3 * random.TEXT_WIDTH)
    return Flux2Pipeline(**parts, text_encoder=encoder, tokenizer=processor)


KINDS = {
    "flux2-dev": _dev,
    "flux2-klein": partial(_klein, is_distilled=True),
    "flux2-klein-base": partial(_klein, is_distilled=False),
}
