"""Language models as text encoders: the hidden states of some of their layers, for a prompt in a chat."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from egrpo_fast.config import ModelConfig
from egrpo_fast.host_to_device import to_device
from egrpo_fast.models.text import Conditioning, TextEncoder, Truncation, filled_up, load_tokenizer


class LanguageModel(TextEncoder):
    """Prompts to `text` [P, tokens, layers x width]: hidden states side by side.

    Where `keeps_lengths`, each prompt has its own tokens alone, and `mask` [P, tokens] says which; else all have
    `model.max_sequence_length`, and the transformer reads what fills them up as well.
    """

    model_class: ClassVar[Any]
    tokenizer_class: ClassVar[Any]
    tokenizers = ("tokenizer",)
    layers: ClassVar[tuple[int, ...]]
    """Places in transformers' `hidden_states`."""
    keeps_lengths: ClassVar[bool]
    left_out: ClassVar[str] = ""
    """How the chat begins: what the transformer does not read and `max_sequence_length` does not count."""

    def __init__(self, folder: Path, model: ModelConfig, device: torch.device | str = "cpu") -> None:
        self._tokenizer = load_tokenizer(self.tokenizer_class, folder, self.tokenizers[0])
        self._encoder = self.load(self.model_class, folder, "text_encoder", model, device, quantized=True)
        self._dtype, self.room = getattr(torch, model.dtype), model.max_sequence_length
        self._skipped = len(self._tokenizer(self.left_out)["input_ids"]) if self.left_out else 0
        self.limits = {"the text encoder": self.room + self._skipped}

    @classmethod
    def shapes(cls, folder: Path, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        width = len(cls.layers) * cls.width(folder)
        text = {"text" if cls.keeps_lengths else "tokens": (model.max_sequence_length, width)}
        return text | ({"mask": (model.max_sequence_length,)} if cls.keeps_lengths else {})

    @classmethod
    def width(cls, folder: Path) -> int:
        """Of the hidden states; a model that also sees has the config of its language part within its own."""
        if "text_config" in cls.config(folder, "text_encoder"):
            return cls.size(folder, "text_encoder", "hidden_size", "text_config")
        return cls.size(folder, "text_encoder", "hidden_size")

    @classmethod
    def weight_bytes(cls, folder: Path, model: ModelConfig) -> float:
        return cls.quantized_bytes(cls.hollow(cls.model_class, folder, "text_encoder"), model)

    @abstractmethod
    def chat(self, prompt: str) -> str:
        """What the model reads of a prompt, as text."""

    def tokenized(self, prompts: Sequence[str], **options: Any) -> Any:
        """Their `input_ids` and `attention_mask`, on the CPU."""
        return self._tokenizer([self.chat(prompt) for prompt in prompts], **options)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        (limit,) = self.limits.values()
        padding = "longest" if self.keeps_lengths else "max_length"
        found = self.tokenized(prompts, max_length=limit, padding=padding, truncation=True, return_tensors="pt")
        ids, mask = found["input_ids"], found["attention_mask"]
        device = self._encoder.device
        # The model without its head: of the next word's probabilities nothing is read.
        states = getattr(self._encoder, "model", self._encoder)(
            input_ids=to_device(ids, device), attention_mask=to_device(mask, device), output_hidden_states=True,
            use_cache=False,
        ).hidden_states  # fmt: skip
        text = torch.cat([states[layer] for layer in self.layers], dim=-1).to(self._dtype)
        if not self.keeps_lengths:
            return {"tokens": text}
        return filled_up([self._own(row, of_row) for row, of_row in zip(text, mask)])

    def _own(self, text: Tensor, mask: Tensor) -> Tensor:
        """Of a row the tokens of its prompt. mask: on the CPU, so that nobody waits for the device."""
        first, count = int(mask.argmax()), int(mask.sum())
        return text[first + self._skipped : first + count]

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        found = []
        for name, limit in self.limits.items():
            for prompt in prompts:
                offsets = self.tokenized([prompt], return_offsets_mapping=True)["offset_mapping"][0]
                if len(offsets) > limit:
                    cut = self.chat(prompt)[offsets[limit][0] :]
                    found.append(Truncation(prompt, name, len(offsets), limit, cut))
        return found
