"""The text encoder of Qwen-Image 2.1: Qwen3-VL."""

from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn
from transformers import Qwen2TokenizerFast, Qwen3VLForConditionalGeneration

from egrpo_fast.config import ModelConfig
from egrpo_fast.models.language_model import LanguageModel

SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
CHAT = SYSTEM + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""`QwenImage21Pipeline.prompt_template_t2i`."""


class QwenImage21TextEncoder(LanguageModel):
    """As `QwenImage21Pipeline.encode_prompt` without images: the last layer, before the norm behind it."""

    encoders = MappingProxyType({"text_encoder": "qwen3_vl"})
    model_class, tokenizer_class, tokenizers = Qwen3VLForConditionalGeneration, Qwen2TokenizerFast, ("processor",)
    layers, keeps_lengths, left_out = (-1,), True, SYSTEM
    most_tokens = 1024

    def __init__(self, folder: Path, model: ModelConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(folder, model, device)
        self._encoder.model.language_model.norm = nn.Identity()

    def chat(self, prompt: str) -> str:
        return CHAT.format(prompt or " ")
