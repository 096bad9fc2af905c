"""The text encoders of FLUX.2: Mistral Small of dev, Qwen3 of klein."""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from transformers import Mistral3ForConditionalGeneration, PixtralProcessor, Qwen2TokenizerFast, Qwen3ForCausalLM

from egrpo_fast.models.language_model import LanguageModel


class Flux2KleinTextEncoder(LanguageModel):
    """As `Flux2KleinPipeline.encode_prompt`."""

    encoders = MappingProxyType({"text_encoder": "qwen3"})
    model_class, tokenizer_class = Qwen3ForCausalLM, Qwen2TokenizerFast
    layers, keeps_lengths = (9, 18, 27), False

    def chat(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )


class Flux2TextEncoder(LanguageModel):
    """As `Flux2Pipeline.encode_prompt`, behind the system message that diffusers gives it."""

    encoders = MappingProxyType({"text_encoder": "mistral3"})
    model_class, tokenizer_class = Mistral3ForConditionalGeneration, PixtralProcessor
    layers, keeps_lengths = (10, 20, 30), False

    def chat(self, prompt: str) -> str:
        (messages,) = format_input([prompt])
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=False)

    def tokenized(self, prompts: Sequence[str], **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(
            format_input(list(prompts)), add_generation_prompt=False, tokenize=True, return_dict=True, **options
        )
