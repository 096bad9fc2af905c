"""The model of the tail where it is not the policy itself: another checkpoint, a LoRA of its own, 8 bits, a cache."""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from egrpo_fast.config import Config, Tail
from egrpo_fast.models.flux.backbone import FluxBackbone
from egrpo_fast.models.flux.folder import check_decoder, check_folder, is_hub_id, meta_transformer, resolve
from egrpo_fast.models.flux.forward import CompiledFlux, FluxCache, check_cache, use_same_attention
from egrpo_fast.models.flux.text import Conditioning
from egrpo_fast.models.lora import read_lora
from egrpo_fast.models.weight_files import fused

FLOAT8_CAPABILITY = (8, 9)
"""CUDA compute capability from which on a GPU multiplies float8."""


def check_tail(config: Config, policy: str) -> None:
    """ValueError, before any weight is read, where `tail` names what is not there or cannot be used here.

    policy: the pipeline folder whose transformer is trained. Hub ids are looked at once they are downloaded.
    """
    tail, model = config.tail, config.model
    if tail.weights != "exact" and importlib.util.find_spec("torchao") is None:
        raise ValueError(f"tail.weights: {tail.weights} needs torchao; pip install 'egrpo_fast[quantized]'")
    if tail.weights == "float8":
        found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        if found is None or found < FLOAT8_CAPABILITY:
            told = f"this GPU's is {found[0]}.{found[1]}" if found else "there is no GPU"
            raise ValueError(f"tail.weights: float8 needs a GPU of compute capability 8.9 (Ada, Hopper); {told}")
    if tail.path is not None:
        try:
            check_folder(tail.path, model.height, model.width)
        except ValueError as error:
            raise ValueError(f"tail.path: {str(error).partition(': ')[2]}") from None
    folder = tail.path or policy
    if is_hub_id(folder):
        return
    if tail.path is not None or tail.lora is not None or tail.cache is not None:
        transformer, weights = meta_transformer(Path(folder))
        weights.files.close()
        if tail.lora is not None:
            read_lora("tail.lora", tail.lora, transformer.config)
        if tail.cache is not None:
            check_cache(tail.cache, transformer)
        if tail.path is not None and not is_hub_id(policy):
            other, weights = meta_transformer(Path(policy))
            weights.files.close()
            theirs, ours = transformer.config, other.config
            for name in ("in_channels", "joint_attention_dim", "pooled_projection_dim"):
                if theirs[name] != ours[name]:
                    told = f"its {name} is {theirs[name]}, that of model.path {ours[name]}"
                    raise ValueError(f"tail.path: {folder} is another kind of model: {told}")
    if tail.decoder is not None and not is_hub_id(policy):
        check_decoder(tail.decoder, Path(policy))


def with_local_tail(config: Config) -> Config:
    """The same with a folder for `tail.path`, which is downloaded if it is a hub id. ValueError: it cannot be."""
    if config.tail.path is None:
        return config
    tail = config.tail.model_copy(update={"path": str(resolve(config.tail.path, "tail.path"))})
    return config.model_copy(update={"tail": tail})


def slow_tail(config: Config) -> str | None:
    """What of a tail's settings is slower than it seems: blocks that hooks skip cannot be compiled."""
    tail, compiled = config.tail, config.rollout.compile
    if tail.weights != "exact" and (tail.cache is not None or not compiled):
        less = "without tail.cache" if compiled else "with rollout.compile"
        return f"tail.weights: {tail.weights} saves memory, but is fast only where it is compiled: {less}"
    if compiled and tail.cache is not None:
        return "rollout.compile: calls of the tail, nearly all of a rollout, are not compiled because of tail.cache"
    return None


class TailModel:
    """A transformer for the tail alone, whole on the device, without gradient.

    Without `tail.path` it follows the policy: within `following` it has the policy's weights, with the LoRA and in the
    precision that `tail` asks for, and otherwise none. The Linear layers of the blocks are quantised (torchao), but
    those of modulation. Memory: 2 bytes a weight in bfloat16, 1 in 8 bits; nothing for a weight that is the policy's.

    compiled: its blocks are, unless hooks skip some of them. cache: of those hooks; None: there are none.
    """

    def __init__(
        self,
        settings: Tail,
        policy: Path,
        backbone: FluxBackbone,
        dtype: torch.dtype,
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        transformer, weights = meta_transformer(Path(settings.path) if settings.path else policy)
        use_same_attention(transformer, backbone.transformer)
        if compiled and settings.cache is None:
            transformer = CompiledFlux.of(transformer)
        self._backbone = copy.copy(backbone)
        self._backbone.transformer = transformer.requires_grad_(False).eval()
        self._dtype, self._device = dtype, device
        self._hollow = dict(transformer.named_parameters())
        self._lora = read_lora("tail.lora", settings.lora, transformer.config) if settings.lora else {}
        self._quantization = _quantization(settings.weights)
        self._follows = settings.path is None
        if not self._follows:
            self._fill(weights)
        weights.files.close()
        self.cache = FluxCache(settings.cache, transformer, dtype) if settings.cache else None

    @classmethod
    def of(
        cls, config: Config, policy: Path, backbone: FluxBackbone, dtype: torch.dtype, device: torch.device
    ) -> "TailModel | None":
        """A run's own; None where the tail's model is the policy."""
        if not config.tail.has_model:
            return None
        return cls(config.tail, policy, backbone, dtype, device, config.rollout.compile)

    @contextmanager
    def following(self, policy: nn.Module) -> Iterator[None]:
        """Has the weights of the policy, gathered, for the length of a rollout, where it is what this model follows.

        A weight that neither a LoRA nor 8 bits change is the policy's own tensor.
        """
        try:
            if self._follows:
                self._fill(partial(_weight, policy))
            yield
        finally:
            if self._follows:
                for name, hollow in self._hollow.items():
                    self._put(name, hollow)

    def velocity(self, latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor) -> Tensor:
        """As `FluxBackbone.velocity`."""
        return self._backbone.velocity(self._backbone.transformer, latents, t, conditioning, rows)

    @torch.no_grad()
    def _fill(self, read: Callable[[str], Tensor]) -> None:
        """A layer at a time, so that no more than one is there in both precisions."""
        for name in self._hollow:
            owner, _, leaf = name.rpartition(".")
            value = read(name).to(self._device, self._dtype)
            if leaf == "weight" and owner in self._lora:
                down, up, scale = self._lora[owner]
                value = fused(value, down.to(self._device), up.to(self._device), scale)
            layer = self._put(name, nn.Parameter(value, requires_grad=False))
            quantised = "transformer_blocks." in owner and "norm" not in owner and isinstance(layer, nn.Linear)
            if self._quantization is not None and leaf == "weight" and quantised:
                self._quantization(nn.ModuleList([layer]))

    def _put(self, name: str, parameter: nn.Parameter) -> nn.Module:
        """Returns the layer whose parameter it now is."""
        owner, _, leaf = name.rpartition(".")
        layer = self._backbone.transformer.get_submodule(owner)
        setattr(layer, leaf, parameter)
        return layer


def _weight(policy: nn.Module, name: str) -> Tensor:
    """A parameter of the policy by its name in the checkpoint, adapters merged."""
    owner, _, leaf = name.rpartition(".")
    layer = policy.get_submodule(owner)
    base = getattr(layer, "base_layer", layer)
    value = getattr(base, leaf).detach()
    if base is not layer and leaf == "weight":
        value = value + layer.get_delta_weight("default").to(value.dtype)  # type: ignore[operator]
    return value


def _quantization(weights: str) -> Callable[[nn.Module], Any] | None:
    if weights == "exact":
        return None
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    configs = {"int8": Int8DynamicActivationInt8WeightConfig, "float8": Float8DynamicActivationFloat8WeightConfig}
    return partial(quantize_, config=configs[weights]())
