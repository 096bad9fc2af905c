"""A FLUX transformer whose blocks are compiled."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from egrpo_fast.models.attention import use_same_attention


class CompiledFlux(FluxTransformer2DModel):
    """A transformer whose repeated blocks are compiled, once for any number of rows; for forwards without gradient."""

    @classmethod
    def of(cls, transformer: FluxTransformer2DModel, backend: str = "inductor") -> "CompiledFlux":
        """One of the same parameters, adapters and attention, on the meta device: weights are lent to it.

        backend: torch.compile's.
        """
        with torch.device("meta"):
            made = cls.from_config(transformer.config)
        for adapter in getattr(transformer, "peft_config", {}).values():
            made.add_adapter(adapter)
        use_same_attention(made, transformer)
        for block in (*made.transformer_blocks, *made.single_transformer_blocks):
            block._compiled_call_impl = partial(_any_rows, torch.compile(block._call_impl, backend=backend))
        return made.requires_grad_(False).eval()

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        """A lone row is computed twice: the compiler takes 1 for a number of its own, and would compile for it.

        Of one prompt or of several, the modulation is of one row or of all: that makes two graphs of a block.
        """
        rows = len(inputs["hidden_states"])
        if rows == 1:
            inputs |= {name: inputs[name].expand(2, -1, -1) for name in ("hidden_states", "encoder_hidden_states")}
        return (super().forward(**inputs)[0][:rows],)


def _any_rows(block: Callable[..., Any], **inputs: Any) -> Any:
    """One call of a compiled block, whose inputs [rows, ...] may have another number of rows next time."""
    for name in ("hidden_states", "encoder_hidden_states", "temb"):
        if len(inputs[name]) > 1:
            torch._dynamo.mark_dynamic(inputs[name], 0)
    return block(**inputs)
