"""FLUX's two text encoders: CLIP, whose pooled embedding is read, and T5, whose embedding of every token is."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from egrpo_fast.config import ModelConfig
from egrpo_fast.host_to_device import to_device
from egrpo_fast.models.text import Conditioning, TextEncoder, load_tokenizer


class FluxTextEncoder(TextEncoder):
    """Prompts to `t5` [P, tokens, width] and `pooled` [P, width], as `FluxPipeline.encode_prompt` gives them."""

    encoders = MappingProxyType({"text_encoder": "clip_text_model", "text_encoder_2": "t5"})
    tokenizers = ("tokenizer", "tokenizer_2")

    def __init__(self, folder: Path, model: ModelConfig, device: torch.device | str = "cpu") -> None:
        self._tokenizers = {
            "T5": load_tokenizer(T5TokenizerFast, folder, "tokenizer_2"),
            "CLIP": load_tokenizer(CLIPTokenizer, folder, "tokenizer"),
        }
        self._clip = self.load(CLIPTextModel, folder, "text_encoder", model, device)
        self._t5 = self.load(T5EncoderModel, folder, "text_encoder_2", model, device, quantized=True)
        self._dtype = getattr(torch, model.dtype)
        # A tokenizer that does not say how long prompts may be has 1e30 there.
        most = min(self._tokenizers["CLIP"].model_max_length, self._clip.config.max_position_embeddings)
        self.limits = {"T5": model.max_sequence_length, "CLIP": most}

    @classmethod
    def shapes(cls, folder: Path, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        t5, clip = cls.size(folder, "text_encoder_2", "d_model"), cls.size(folder, "text_encoder", "hidden_size")
        return {"t5": (model.max_sequence_length, t5), "pooled": (clip,)}

    @classmethod
    def weight_bytes(cls, folder: Path, model: ModelConfig) -> float:
        clip = cls.hollow(CLIPTextModel, folder, "text_encoder").num_parameters()
        t5 = cls.quantized_bytes(cls.hollow(T5EncoderModel, folder, "text_encoder_2"), model)
        return clip * getattr(torch, model.dtype).itemsize + t5

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        ids = self.token_ids(prompts)
        t5 = self._t5(to_device(ids["T5"], self._t5.device))[0]
        pooled = self._clip(to_device(ids["CLIP"], self._clip.device)).pooler_output
        return {"t5": t5.to(self._dtype), "pooled": pooled.to(self._dtype)}
