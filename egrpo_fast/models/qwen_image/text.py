"""The text encoder of Qwen-Image: Qwen2.5-VL."""

from types import MappingProxyType

from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

from egrpo_fast.models.language_model import LanguageModel

CHAT = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""`QwenImagePipeline.prompt_template_encode`."""


class QwenImageTextEncoder(LanguageModel):
    """As `QwenImagePipeline.encode_prompt`."""

    encoders = MappingProxyType({"text_encoder": "qwen2_5_vl"})
    model_class, tokenizer_class = Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast
    layers, keeps_lengths, left_out = (-1,), True, CHAT.partition("{}")[0]
    most_tokens = 1024

    def chat(self, prompt: str) -> str:
        return CHAT.format(prompt)
