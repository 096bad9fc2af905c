"""The model of the tail where it is not the policy itself: another checkpoint, a LoRA of its own, 8 bits, a cache."""

import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import TaylorSeerCacheConfig
from torch import Tensor, nn

from egrpo_fast.config import Config, TailConfig, TaylorSeerConfig
from egrpo_fast.models.attention import use_same_attention
from egrpo_fast.models.folder import family_of, resolve
from egrpo_fast.models.lora import read_lora
from egrpo_fast.models.protocol import Backbone
from egrpo_fast.models.transformer import fill_buffers, meta_transformer
from egrpo_fast.models.vae import check_tiny_decoder
from egrpo_fast.models.weight_files import fused

FLOAT8_CAPABILITY = (8, 9)
"""CUDA compute capability from which on a GPU multiplies float8."""


def check_tail(tail: TailConfig, pipeline: Path) -> None:
    """ValueError, before any weight is read, where `tail` asks for what cannot be had here.

    pipeline: the folder whose transformer is trained. The model of the tail is checked where it is made.
    """
    if tail.quantization != "none" and importlib.util.find_spec("torchao") is None:
        raise ValueError(f"tail.quantization: {tail.quantization} needs torchao; pip install 'egrpo_fast[quantized]'")
    if tail.quantization == "float8":
        found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        if found is None or found < FLOAT8_CAPABILITY:
            message = f"this GPU's is {found[0]}.{found[1]}" if found else "there is no GPU"
            raise ValueError(f"tail.quantization: float8 needs compute capability 8.9 (Ada, Hopper); {message}")
    if tail.decoder is not None:
        check_tiny_decoder(tail.decoder, pipeline)


def with_local_tail(config: Config) -> Config:
    """The same with a folder for `tail.path`, which is downloaded if it is a hub id. ValueError: it cannot be."""
    if config.tail.path is None:
        return config
    tail = config.tail.model_copy(update={"path": str(resolve(config.tail.path, "tail.path"))})
    return config.model_copy(update={"tail": tail})


def slow_tail(config: Config) -> str | None:
    """What of a tail's settings is slower than it seems: blocks that hooks skip cannot be compiled."""
    tail, compiled = config.tail, config.rollout.compile
    if tail.quantization != "none" and (tail.cache is not None or not compiled):
        less = "without tail.cache" if compiled else "with rollout.compile"
        return f"tail.quantization: {tail.quantization} saves memory, but is fast only where it is compiled: {less}"
    if compiled and tail.cache is not None:
        return "rollout.compile: calls of the tail, nearly all of a rollout, are not compiled because of tail.cache"
    return None


class TailCache:
    """diffusers' caching hooks on a transformer, with a state for every sequence of calls (`rollout.Cache`).

    asked, computed: evaluations of a block for a row since it was made, wanted and really done.
    """

    def __init__(
        self, settings: TaylorSeerConfig, transformer: Any, blocks: Sequence[nn.Module], dtype: torch.dtype
    ) -> None:
        """dtype: of what is kept."""
        self._transformer, self.asked, self.computed = transformer, 0, 0
        # Lite: full mode keeps what every attention layer gave, 1.8 GB for a row of FLUX.1-dev at 720x720.
        transformer.enable_cache(
            TaylorSeerCacheConfig(
                cache_interval=settings.interval, disable_cache_before_step=settings.warm_up,
                max_order=settings.order, taylor_factors_dtype=dtype, use_lite_mode=True,
            )
        )  # fmt: skip
        for block in blocks:
            block.register_forward_pre_hook(self._ask, with_kwargs=True)
            next(block.children()).register_forward_pre_hook(self._compute)

    def sequence(self, family: int, chunk: int) -> AbstractContextManager[None]:
        return self._transformer.cache_context(f"{family}.{chunk}")

    def forget(self) -> None:
        self._transformer._reset_stateful_cache()

    def _ask(self, block: nn.Module, inputs: tuple[()], named: Mapping[str, Tensor]) -> None:
        self._rows = len(named["hidden_states"])
        self.asked += self._rows

    def _compute(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """The first thing inside a block, so it runs where the block is not skipped."""
        self.computed += self._rows


class TailModel:
    """A transformer for the tail alone, whole on the device, without gradient.

    Without `tail.path` it follows the policy: within `following` it has the policy's weights, with the LoRA and in the
    precision that `tail` asks for, and otherwise none. The Linear layers of the blocks are quantised (torchao), but
    those of modulation. Memory: 2 bytes a weight in bfloat16, 1 in 8 bits; nothing for a weight that is the policy's.

    A new one has looked at its files and read no weight; `load` makes it ready. cache: of its calls, or None.
    """

    def __init__(
        self, settings: TailConfig, policy: Any, pipeline: Path, dtype: torch.dtype, compiled: bool = False
    ) -> None:
        """policy: the transformer that is trained. pipeline: its folder. compiled: the blocks are, where no hooks skip
        some of them. ValueError names the setting that cannot be used."""
        self._follows = settings.path is None
        folder, field = (pipeline, "model.path") if settings.path is None else (Path(settings.path), "tail.path")
        transformer, self._weights = meta_transformer(folder, field=field)
        family = family_of(folder, field)
        if not self._follows:
            _check_like(transformer, policy, str(folder), family, family_of(pipeline))
        self._lora = read_lora("tail.lora", settings.lora, transformer, family) if settings.lora else {}
        use_same_attention(transformer, policy)
        self._linear_layers = family.linear_layers(transformer)
        if compiled and settings.cache is None:
            transformer = family.compiled(transformer)
        self.transformer = transformer.requires_grad_(False).eval()
        self._dtype = dtype
        self._quantization = _quantization(settings.quantization)
        self._hollow = dict(self.transformer.named_parameters())
        cache = settings.cache
        if cache and not hasattr(transformer, "enable_cache"):
            message = f"{cache.name} is diffusers', which has none for a {type(transformer).__name__}"
            raise ValueError(f"tail.cache: {message}")
        self.cache = TailCache(cache, transformer, family.blocks(transformer), dtype) if cache else None

    def load(self, backbone: Backbone, device: torch.device) -> None:
        """Read a checkpoint of its own. backbone: the policy's, by which it is called."""
        self._backbone, self._device = copy.copy(backbone), device
        self._backbone.transformer = self.transformer
        if not self._follows:
            self._fill(self._weights)
        fill_buffers(self.transformer, self._weights, self._dtype, device)
        self._weights.files.close()

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

    def velocity(self, latents: Tensor, t: float, conditioning: Any, rows: Tensor) -> Tensor:
        """As `Backbone.velocity`."""
        return self._backbone.velocity(self.transformer, latents, t, conditioning, rows)

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
            if self._quantization is not None and leaf == "weight" and owner in self._linear_layers:
                self._quantization(nn.ModuleList([layer]))

    def _put(self, name: str, parameter: nn.Parameter) -> nn.Module:
        """Returns the layer whose parameter it now is."""
        owner, _, leaf = name.rpartition(".")
        layer = self.transformer.get_submodule(owner)
        setattr(layer, leaf, parameter)
        return layer


def _check_like(transformer: Any, policy: Any, folder: str, family: type[Backbone], of_policy: type[Backbone]) -> None:
    """ValueError where a tail's checkpoint does not read the same latents and text as the policy's."""
    if family is not of_policy:
        raise ValueError(f"tail.path: {folder} is of another model family than model.path")
    for name in family.input_sizes:
        if (theirs := transformer.config.get(name)) != (ours := policy.config.get(name)):
            message = f"its {name} is {theirs}, that of model.path {ours}"
            raise ValueError(f"tail.path: {folder} is another kind of model: {message}")


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
    if weights == "none":
        return None
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    configs = {"int8": Int8DynamicActivationInt8WeightConfig, "float8": Float8DynamicActivationFloat8WeightConfig}
    return partial(quantize_, config=configs[weights]())
