"""How a FLUX transformer computes: rounding, attention, compiled blocks, blocks that a cache skips."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from torch import Tensor, nn

from egrpo_fast.config import FirstBlock, Model, TailCache

ATTENTION = {"cudnn": "_native_cudnn", "efficient": "_native_efficient", "flash_3_hub": "_flash_3_hub"}
"""Names of `model.attention` that diffusers spells otherwise."""


def check_attention(name: str) -> None:
    """ValueError where that `model.attention` cannot run here, by what is installed."""
    if name == "native":
        return
    try:
        _check_attention_backend_requirements(AttentionBackendName(ATTENTION.get(name, name)))
    except RuntimeError as error:
        raise ValueError(f"model.attention: {name} is not installed: {' '.join(str(error).split())}") from None
    if not torch.cuda.is_available():
        raise ValueError(f"model.attention: {name} needs a CUDA device; allowed here: native")


def use_arithmetic(model: Model) -> None:
    """For this process: what float32 products may round to (`model.tf32`), and whether attention may be cuDNN's.

    That is so only where it is asked for. PyTorch would choose it by itself on an H100. There cuDNN 9.19 gave NaN
    gradients and illegal memory accesses, in bfloat16 with heads of 24; memory-efficient attention gave neither.
    """
    torch.set_float32_matmul_precision("high" if model.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = model.tf32
    torch.backends.cuda.enable_cudnn_sdp(model.attention == "cudnn")


def use_attention(transformer: FluxTransformer2DModel, name: str) -> None:
    """Have every attention layer computed by that `model.attention`."""
    if name != "native":
        transformer.set_attention_backend(ATTENTION.get(name, name))


def use_same_attention(transformer: FluxTransformer2DModel, as_in: FluxTransformer2DModel) -> None:
    """Have every attention layer of one computed as those of another are."""
    (chosen,) = {processor._attention_backend for processor in as_in.attn_processors.values()}
    for processor in transformer.attn_processors.values():
        processor._attention_backend = chosen


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


def check_cache(settings: TailCache, transformer: FluxTransformer2DModel) -> None:
    """ValueError where that `tail.cache` cannot serve this transformer."""
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    if isinstance(settings, FirstBlock) and blocks < 2:
        raise ValueError(f"tail.cache: first_block needs a transformer of two blocks or more, this one has {blocks}")


class FluxCache:
    """diffusers' caching hooks on a transformer, with a state for every sequence of calls (`rollout.Cache`).

    asked, computed: evaluations of a block for a row since it was made, wanted and really done.
    """

    def __init__(self, settings: TailCache, transformer: FluxTransformer2DModel, dtype: torch.dtype) -> None:
        """dtype: of what is kept."""
        self._transformer, self.asked, self.computed = transformer, 0, 0
        if isinstance(settings, FirstBlock):
            transformer.enable_cache(FirstBlockCacheConfig(threshold=settings.threshold))
        else:
            # Lite: full mode keeps what every attention layer gave, 1.8 GB for a row of FLUX.1-dev at 720x720.
            transformer.enable_cache(
                TaylorSeerCacheConfig(
                    cache_interval=settings.interval, disable_cache_before_step=settings.warm_up,
                    max_order=settings.order, taylor_factors_dtype=dtype, use_lite_mode=True,
                )
            )  # fmt: skip
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.register_forward_pre_hook(self._ask, with_kwargs=True)
            next(block.children()).register_forward_pre_hook(self._compute)

    def sequence(self, family: int, chunk: int) -> AbstractContextManager[None]:
        return self._transformer.cache_context(f"{family}.{chunk}")

    def forget(self) -> None:
        self._transformer._reset_stateful_cache()

    def _ask(self, block: nn.Module, inputs: tuple[()], named: Mapping[str, Tensor]) -> None:
        self.asked += len(named["hidden_states"])

    def _compute(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """The first thing inside a block, so it runs where the block is not skipped."""
        self.computed += len(inputs[0])
