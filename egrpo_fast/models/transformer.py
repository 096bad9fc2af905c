"""A pipeline's transformer: made without its weights, on the meta device, and filled one parameter after the other."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from egrpo_fast.config import LoraConfig
from egrpo_fast.files import read_json
from egrpo_fast.models.folder import family_of
from egrpo_fast.models.lora import Adapter, follow_lora, linear_layers, read_lora
from egrpo_fast.models.quantization import quantize_layers, weight_takers
from egrpo_fast.models.weight_files import WeightFiles, fused, new_adapter


class TransformerWeights:
    """Where each parameter of a transformer from `meta_transformer` has its value: files, or a new or given adapter."""

    def __init__(
        self, files: WeightFiles, shapes: Mapping[str, tuple[int, ...]], lora: LoraConfig | None,
        given: Mapping[str, Adapter], seed: int,
    ) -> None:  # fmt: skip
        """lora: what was adapted. given: adapters by layer; none: new ones."""
        self.files, self.lora, self._shapes, self._given, self._seed = files, lora, shapes, given, seed

    def __call__(self, name: str) -> Tensor:
        """The value of one parameter, on the CPU."""
        if ".lora_" not in name:
            return self.files.read(name.replace(".base_layer.", "."))
        if not self._given:
            return new_adapter(name, self._shapes[name], self._seed)
        layer, _, which = name.partition(".lora_")
        return self._given[layer].down if which.startswith("A.") else self._given[layer].up


class FusedWeights:
    """As TransformerWeights of a whole transformer, with the adapters of a LoRA file added.

    A weight and its adapters are added in float32 and rounded to the dtype of the file, as `egrpo export --fuse` does.
    """

    def __init__(self, weights: TransformerWeights, adapters: Mapping[str, Adapter]) -> None:
        self.files, self._weights, self._adapters = weights.files, weights, adapters

    def __call__(self, name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        value = self._weights(name)
        return fused(value, *self._adapters[layer]) if leaf == "weight" and layer in self._adapters else value


def hollow_transformer(folder: Path, field: str = "model.path") -> Any:
    """The transformer of a pipeline folder on the meta device, by its config. ValueError, which begins with `field`."""
    family, config = family_of(folder, field), folder / "transformer" / "config.json"
    try:
        with torch.device("meta"):
            transformer = family.transformer_class.from_config(read_json(config))
        return family.mended(transformer)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{field}: {config} describes no transformer: {error!r}") from None


def meta_transformer(
    folder: Path, lora: LoraConfig | None = None, seed: int = 0, field: str = "model.path", quantization: Any = None
) -> tuple[Any, TransformerWeights]:
    """The transformer of a pipeline folder without its weights (on the meta device), and where they are.

    lora: adapters are added and alone need gradients; it follows the file that it names. quantization: a
    `quantization_config`, by which the weights under the adapters will be kept. ValueError: files and architecture do
    not match (it begins with `field`), or the adapters do not fit.
    """
    family, transformer = family_of(folder, field), hollow_transformer(folder, field)
    try:
        files = WeightFiles(folder / "transformer")
        files.check({name: tuple(value.shape) for name, value in transformer.state_dict().items()})
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    given: Mapping[str, Adapter] = {}
    if lora is not None:
        lora, given = follow_lora(lora, transformer, family)
        lora.layers(linear_layers(transformer))  # says which entry takes nothing, as peft does not
        transformer.requires_grad_(False)
        if quantization is not None:
            quantize_layers(transformer, quantization)
        made = peft.LoraConfig(r=lora.rank, target_modules=lora.target_modules, init_lora_weights=False)
        made.lora_alpha = lora.alpha  # type: ignore[assignment]  # peft says int, and only divides it
        try:
            transformer.add_adapter(made)
        except ValueError as error:
            raise ValueError(f"model.lora.target_modules: {' '.join(str(error).split())}") from None
    return transformer, TransformerWeights(files, _shapes(transformer), lora, given, seed)


def with_adapters(weights: TransformerWeights, transformer: Any, folder: Path, lora: str, field: str) -> FusedWeights:
    """The same weights with the adapters in a LoRA file. ValueError, which begins with `field`: they do not fit."""
    return FusedWeights(weights, read_lora(field, lora, transformer, family_of(folder)))


def _shapes(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}


def fill_whole(
    transformer: nn.Module, read: Callable[[str], Tensor], dtype: torch.dtype, device: torch.device | str
) -> None:
    """Give a transformer from `meta_transformer` its parameters, one after the other. `fill_buffers` does the rest."""
    takers = weight_takers(transformer, device)
    for name, hollow in list(transformer.named_parameters()):
        if name in takers:
            takers[name](read(name).to(device, dtype))
            continue
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(read(name).to(device, dtype), hollow.requires_grad)
        setattr(transformer.get_submodule(owner), leaf, value)


def fill_buffers(
    transformer: nn.Module, read: Callable[[str], Tensor], dtype: torch.dtype, device: torch.device | str
) -> None:
    """Give a transformer from `meta_transformer` what its files hold and is never trained, whole on every rank."""
    for name, hollow in list(transformer.named_buffers()):
        if hollow.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(owner), leaf, read(name).to(device, dtype))
