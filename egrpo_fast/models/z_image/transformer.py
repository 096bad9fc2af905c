"""Z-Image's transformer over tensors; diffusers' own takes lists, and goes through their rows one by one."""

from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn


class ZImageTransformer2DModel(diffusers.ZImageTransformer2DModel):
    """The same parameters, and the same function of every row, under the name that configs give it."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """What diffusers' own gives for images [R, C, H, W], a time [1] and texts [R, L, width]: [R, C, H, W].

        mask [R, L]: True at the first tokens of each row, those of its text; None: at all. An image, and a text by its
        own length, is filled up to a multiple of 32 tokens with a learned one, which is read like others; behind that
        nothing is read. The positions of an image begin behind those of its text.
        """
        (patch,), (rows, _, height, width) = self.all_patch_size, hidden_states.shape
        high, wide, device = height // patch, width // patch, text.device
        time = self.t_embedder(timestep * self.t_scale).type_as(hidden_states)

        given = torch.full((rows, 1), text.shape[1], device=device) if mask is None else mask.sum(1, keepdim=True)
        text = nn.functional.pad(text, (0, 0, 0, -text.shape[1] % SEQ_MULTI_OF))
        read = (given + SEQ_MULTI_OF - 1) // SEQ_MULTI_OF * SEQ_MULTI_OF  # tokens of each text, filled up: [R, 1]
        place = torch.arange(text.shape[1], device=device).expand(rows, -1)
        text = torch.where((place < given)[..., None], self.cap_embedder(text), self.cap_pad_token)
        text_turns = self._turns(place + 1, place * 0, place * 0)

        image = hidden_states.unflatten(2, (high, patch)).unflatten(4, (wide, patch)).permute(0, 2, 4, 3, 5, 1)
        image = self.all_x_embedder[f"{patch}-1"](image.flatten(3).flatten(1, 2))
        more = -image.shape[1] % SEQ_MULTI_OF
        image = torch.cat((image, self.x_pad_token.expand(rows, more, -1)), dim=1)
        row, column = torch.meshgrid(
            torch.arange(high, device=device), torch.arange(wide, device=device), indexing="ij"
        )
        behind = (read + 1).expand(-1, high * wide)
        places = (behind, row.flatten().expand(rows, -1), column.flatten().expand(rows, -1))
        image_turns = self._turns(*(nn.functional.pad(axis, (0, more)) for axis in places))

        # Without a mask attention has faster ways.
        text_mask = None if mask is None else place < read
        image = self._through(self.noise_refiner, image, None, image_turns, time)
        text = self._through(self.context_refiner, text, text_mask, text_turns)
        both_mask = None if text_mask is None else nn.functional.pad(text_mask, (image.shape[1], 0), value=True)
        both, turns = torch.cat((image, text), dim=1), torch.cat((image_turns, text_turns), dim=1)
        both = self._through(self.layers, both, both_mask, turns, time)
        image = self.all_final_layer[f"{patch}-1"](both, c=time)[:, : high * wide]
        image = image.unflatten(2, (patch, patch, -1)).unflatten(1, (high, wide))
        return image.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def _turns(self, *axes: Tensor) -> Tensor:
        """The rotary embedding at positions [R, L] of three axes: complex [R, L, head_dim / 2]."""
        places = torch.stack(axes, dim=-1)
        return self.rope_embedder(places.flatten(0, 1)).unflatten(0, places.shape[:2])

    def _through(self, layers: nn.ModuleList, x: Tensor, *more: Any) -> Tensor:
        for layer in layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(layer, x, *more)
            else:
                x = layer(x, *more)
        return x
