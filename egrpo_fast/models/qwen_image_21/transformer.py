"""Qwen-Image 2.1's transformer for text to image, whose layout is known without asking the device."""

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn


class Attention:
    """An attention layer's processor: a text token attends to those up to itself, an image token to all."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, rotary_emb: Tensor, segments: int, key_valid: Tensor | None,
        **nothing: None,
    ) -> Tensor:  # fmt: skip
        """[R, S, width]. rotary_emb: complex [1 or R, S, head / 2]. segments: so many of S are text. key_valid [R, S]:
        which tokens an image may see; None: all."""
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = _turned(attn.norm_q(query), rotary_emb), _turned(attn.norm_k(key), rotary_emb)
        attend = partial(
            dispatch_attention_fn, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        # Behind a text there is only filling, so its own tokens never see any.
        text = attend(query[:, :segments], key[:, :segments], value[:, :segments], is_causal=True)
        mask = None if key_valid is None else key_valid[:, None, None]
        image = attend(query[:, segments:], key, value, attn_mask=mask)
        return attn.to_out[0](torch.cat((text, image), dim=1).flatten(2))


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """[R, S, heads, head]: by a rotary embedding, complex [1 or R, S, head / 2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, :, None]).flatten(3).type_as(x)


class QwenImage21Transformer2DModel(diffusers.QwenImage21Transformer2DModel):
    """The same parameters, and the same function of a row that is alone, under the name that configs give it.

    In diffusers' own a row depends on its neighbours, for all images of a call lie behind its longest text. Here each
    lies behind its own. The layers' attention is to be `Attention`.
    """

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, text: Tensor, size: tuple[int, int], mask: Tensor | None = None
    ) -> Tensor:
        """What diffusers' own gives for image tokens [R, L, C], a time [1] and texts [R, T, width]: [R, L, C].

        size: rows and columns of the image, L in all. mask [R, T]: True at the first tokens of each row, those of its
        text; None: at all.
        """
        length, device = text.shape[1], text.device
        own = torch.full((1, 1), length, device=device) if mask is None else mask.sum(1, keepdim=True)
        both = torch.cat((self.txt_in(text), self.img_in(hidden_states)), dim=1)
        # Texts are modulated as at t = 0 whatever the time is.
        times = 1000 * torch.cat((timestep, torch.zeros_like(timestep))).float()
        waves = get_timestep_embedding(times, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        time = self.time_text_embed.timestep_embedder(waves.to(both.dtype))
        known = {
            "modulation": self.modulation(time), "rotary_emb": self._turns(length, own, size), "segments": length,
            "target_token_mask": torch.arange(both.shape[1], device=device) >= length,
            "key_valid": None if mask is None else nn.functional.pad(mask, (0, hidden_states.shape[1]), value=True),
        }  # fmt: skip
        for block in self.transformer_blocks:
            layer = partial(block, **known)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                both = self._gradient_checkpointing_func(layer, both)
            else:
                both = layer(hidden_states=both)
        return self.proj_out(self.norm_out(both[:, length:], time[:1]))

    def _turns(self, length: int, own: Tensor, size: tuple[int, int]) -> Tensor:
        """The rotary embedding of texts filled up to `length`, of `own` [R, 1] tokens, each with an image behind it.

        Complex [R, length + rows x columns, head / 2]. Token p of a text is at p on all three axes. An image is behind
        its text on the first axis, and around 0 on the two others.
        """
        device = own.device
        self.pos_embed.freqs = [table.to(device) for table in self.pos_embed.freqs]
        row, column = (torch.arange(number, device=device) - (number - number // 2) for number in size)
        row, column = torch.meshgrid(row, column, indexing="ij")
        words = torch.arange(length, device=device).expand(len(own), -1)
        axes = (own.expand(-1, row.numel()), row.flatten().expand(len(own), -1), column.flatten().expand(len(own), -1))
        return torch.cat(
            [table[torch.cat((words, axis), dim=1)] for table, axis in zip(self.pos_embed.freqs, axes)], dim=-1
        )
