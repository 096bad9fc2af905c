"""The text encoder of Z-Image: Qwen3."""

from types import MappingProxyType

from transformers import Qwen2TokenizerFast, Qwen3Model

from egrpo_fast.models.language_model import LanguageModel


class ZImageTextEncoder(LanguageModel):
    """As `ZImagePipeline.encode_prompt`: the last layer but one."""

    encoders = MappingProxyType({"text_encoder": "qwen3"})
    model_class, tokenizer_class = Qwen3Model, Qwen2TokenizerFast
    layers, keeps_lengths = (-2,), True
    most_tokens = 1024

    def chat(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
