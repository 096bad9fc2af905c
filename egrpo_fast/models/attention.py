"""Who computes a transformer's attention, by diffusers' dispatcher, and what float32 products may round to."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

from egrpo_fast.config import ModelConfig

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


def use_arithmetic(model: ModelConfig) -> None:
    """For this process: what float32 products may round to (`model.tf32`), and whether attention may be cuDNN's.

    That is so only where it is asked for. PyTorch would choose it by itself on an H100. There cuDNN 9.19 gave NaN
    gradients and illegal memory accesses, in bfloat16 with heads of 24; memory-efficient attention gave neither.
    """
    torch.set_float32_matmul_precision("high" if model.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = model.tf32
    torch.backends.cuda.enable_cudnn_sdp(model.attention == "cudnn")


def use_attention(transformer: Any, name: str) -> None:
    """Have every attention layer computed by that `model.attention`. ValueError: this model's takes no other."""
    if name != "native":
        if not any(_processors(transformer)):
            message = f"diffusers computes that of a {type(transformer).__name__} by PyTorch alone; use native"
            raise ValueError(f"model.attention: {name}: {message}")
        transformer.set_attention_backend(ATTENTION.get(name, name))


def use_same_attention(transformer: Any, as_in: Any) -> None:
    """Have every attention layer of one computed as those of another are."""
    for chosen in {processor._attention_backend for processor in _processors(as_in)}:
        for processor in _processors(transformer):
            processor._attention_backend = chosen


def _processors(transformer: Any) -> Iterator[Any]:
    for module in transformer.modules():
        if hasattr(processor := getattr(module, "processor", None), "_attention_backend"):
            yield processor
