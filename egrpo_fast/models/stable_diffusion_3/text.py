"""The three text encoders of Stable Diffusion 3: two CLIPs, whose tokens and pooled embeddings are read, and T5."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from egrpo_fast.config import ModelConfig
from egrpo_fast.host_to_device import to_device
from egrpo_fast.models.text import Conditioning, TextEncoder, load_tokenizer

CLIPS = ("text_encoder", "text_encoder_2")
CLIP_TOKENS = 77


class StableDiffusion3TextEncoder(TextEncoder):
    """Prompts to `tokens` [P, 77 + T5's, width] and `pooled` [P, width of both CLIPs].

    As `StableDiffusion3Pipeline.encode_prompt` gives them: the CLIPs' tokens side by side, filled up to T5's width with
    zeros, then T5's.
    """

    encoders = MappingProxyType({**dict.fromkeys(CLIPS, "clip_text_model"), "text_encoder_3": "t5"})
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")

    def __init__(self, folder: Path, model: ModelConfig, device: torch.device | str = "cpu") -> None:
        self._tokenizers = {
            "CLIP L": load_tokenizer(CLIPTokenizer, folder, "tokenizer"),
            "CLIP G": load_tokenizer(CLIPTokenizer, folder, "tokenizer_2"),
            "T5": load_tokenizer(T5TokenizerFast, folder, "tokenizer_3"),
        }
        self._clips = [self.load(CLIPTextModelWithProjection, folder, name, model, device) for name in CLIPS]
        self._t5 = self.load(T5EncoderModel, folder, "text_encoder_3", model, device, quantized=True)
        self._dtype = getattr(torch, model.dtype)
        self.limits = {"CLIP L": CLIP_TOKENS, "CLIP G": CLIP_TOKENS, "T5": model.max_sequence_length}

    @classmethod
    def shapes(cls, folder: Path, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        pooled = sum(cls.size(folder, name, "projection_dim") for name in CLIPS)
        width = cls.size(folder, "text_encoder_3", "d_model")
        return {"tokens": (CLIP_TOKENS + model.max_sequence_length, width), "pooled": (pooled,)}

    @classmethod
    def weight_bytes(cls, folder: Path, model: ModelConfig) -> float:
        clips = sum(cls.hollow(CLIPTextModelWithProjection, folder, name).num_parameters() for name in CLIPS)
        t5 = cls.quantized_bytes(cls.hollow(T5EncoderModel, folder, "text_encoder_3"), model)
        return clips * getattr(torch, model.dtype).itemsize + t5

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        ids = self.token_ids(prompts)
        found = [
            clip(to_device(ids[name], clip.device), output_hidden_states=True)
            for clip, name in zip(self._clips, ("CLIP L", "CLIP G"))
        ]
        clips = torch.cat([one.hidden_states[-2] for one in found], dim=-1)
        t5 = self._t5(to_device(ids["T5"], self._t5.device))[0]
        tokens = torch.cat((nn.functional.pad(clips, (0, t5.shape[-1] - clips.shape[-1])), t5), dim=1)
        pooled = torch.cat([one.text_embeds for one in found], dim=-1)
        return {"tokens": tokens.to(self._dtype), "pooled": pooled.to(self._dtype)}
