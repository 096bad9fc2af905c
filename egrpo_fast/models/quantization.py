"""The frozen weights under LoRA in 8 or 4 bits, by diffusers' quantizers: nf4 by bitsandbytes, the others by torchao.

Weights alone are quantized, and a layer computes in the model's dtype with what its bits stand for: a linear map, of
which the gradient is exact, the same on a CPU and on a GPU. bitsandbytes' int8 is not that on a GPU: it rounds
activations too, through float16, and looks for outliers among all rows of a call, so a row would know its neighbours.
torchao has no nf4 that diffusers reads.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from torch import Tensor, nn

PACKAGES = {"int8": "torchao", "float8": "torchao", "nf4": "bitsandbytes"}
NF4_BLOCK, NF4_CODE = 64, 16
"""Weights that share a scale, and levels of a weight: bitsandbytes keeps both as float32."""


def check_quantization(quantization: str) -> None:
    """ValueError where the package that `model.quantization` needs is not installed."""
    package = PACKAGES.get(quantization)
    if package and importlib.util.find_spec(package) is None:
        message = f"{quantization} needs {package}; pip install 'egrpo_fast[quantized]'"
        raise ValueError(f"model.quantization: {message}")


def quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    """What diffusers' `from_pretrained(quantization_config=...)` takes for the same weights; None for "none".

    ValueError: a package is not installed.
    """
    if quantization == "none":
        return None
    check_quantization(quantization)
    if quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2) if quantization == "int8" else Float8WeightOnlyConfig())


def quantized_bytes(quantization: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(weights, scales) of a linear layer's weight [out, in]. Scales: float32, of a row, or of a block in nf4."""
    numel = prod(shape)
    if quantization == "nf4":
        return -(-numel // 2), 4 * (-(-numel // NF4_BLOCK) + NF4_CODE)
    return numel, 4 * shape[0]


class _Times(torch.autograd.Function):
    """`x W^T + b` with a quantized W, which is kept as it is for the backward. torchao's own keeps it dequantized."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient @ ctx.weight.dequantize(gradient.dtype), None, None


class FrozenLinear(nn.Linear):
    """A linear layer whose weight torchao has quantized."""

    def forward(self, x: Tensor) -> Tensor:
        return _Times.apply(x, self.weight, self.bias)


def quantize_layers(transformer: Any, config: Any) -> None:
    """Prepare the linear layers of a transformer on the meta device for quantized weights. Adapters are added later.

    config: a `quantization_config`. Which layers it takes is diffusers' choice: all of them.
    """
    quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(transformer, device_map=None, keep_in_fp32_modules=[])
    for name, layer in list(transformer.named_modules()):
        if type(layer) is nn.Linear:
            bias = layer.bias is not None
            transformer.set_submodule(name, FrozenLinear(layer.in_features, layer.out_features, bias, device="meta"))
        elif isinstance(layer, nn.Linear):
            # Some CPUs have a faster layout, for forwards without gradient alone: once there, no gradient comes back.
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    transformer.hf_quantizer = quantizer


def weight_takers(transformer: Any, device: torch.device | str) -> dict[str, Callable[[Tensor], int]]:
    """By parameter name, what quantizes its value on the device, into its layer, and returns the bytes that it takes.

    Of the layers that `quantize_layers` has prepared; they may have adapters by now.
    """
    quantizer = getattr(transformer, "hf_quantizer", None)
    if quantizer is None:
        return {}
    return {
        f"{name}.weight": partial(_take, transformer, quantizer, torch.device(device), f"{name}.weight")
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    }


@torch.no_grad()
def _take(transformer: Any, quantizer: Any, device: torch.device, name: str, value: Tensor) -> int:
    quantizer.create_quantized_param(transformer, value, name, device, {}, [])
    layer = transformer.get_submodule(name.removesuffix(".weight"))
    # No parameter any more: nobody trains it, and DeepSpeed, which would cast, move and broadcast it, leaves it alone.
    layer.__dict__["weight"] = layer._parameters.pop("weight")
    return nbytes(layer.weight)


def nbytes(weight: Any) -> int:
    """What a quantized weight and its scales take."""
    state = getattr(weight, "quant_state", None)
    parts = (weight.data, state.absmax, state.code) if state is not None else (weight.qdata, weight.scale)
    return sum(part.nbytes for part in parts)
