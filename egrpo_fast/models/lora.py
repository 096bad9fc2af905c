"""LoRA files: read with the scale that diffusers gives them, written so that every reader gives them the run's."""

import copy
import inspect
import math
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from egrpo_fast.config import LoraConfig, takes
from egrpo_fast.models.protocol import Backbone
from egrpo_fast.models.weight_files import tensors_in

FILE = "pytorch_lora_weights.safetensors"
"""As diffusers names it in a folder."""

_FACTOR = re.compile(r".+\.(lora_A|lora_B|lora_down|lora_up|down|up)\.weight|.+\.alpha")
_OTHER_KINDS = {
    r"text_encoder|lora_te": "changes a text encoder",
    r".*(dora_scale|magnitude_vector)": "is a DoRA",
    r".*\.(lokr|hada)_": "is a LoKr or a LoHa",
}
"""Start of a tensor's name -> what such a file is."""
_LAYOUTS = ("transformer.", "lora_transformer_", "lora_unet_", "diffusion_model.")
"""How names begin: diffusers', two of kohya's, ComfyUI's. diffusers reads one of them and leaves out the others."""


class Adapter(NamedTuple):
    """What a LoRA adds to a layer's weight [out, in]: `scale up @ down`; down [r, in], up [out, r], as in the file."""

    down: Tensor
    up: Tensor
    scale: float


def read_lora(field: str, path: str, transformer: Any, family: type[Backbone]) -> dict[str, Adapter]:
    """The adapters in a LoRA file, or in a folder's, by layer; of any layout that diffusers reads.

    transformer: without adapters, on the meta device; stays as it is. The own loader of the family's pipeline
    puts the file onto a copy of it, so the scale is the one with which it would run the file. ValueError,
    which begins with `field`: the file cannot be read, is of another kind or architecture, or holds a tensor that the
    loader would leave out.
    """
    file = find_file(field, path)
    try:
        _check_names(file, tensors_in(file))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    transformer, pipeline = copy.deepcopy(transformer), family.pipeline
    shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    try:
        knows_alphas = {"return_alphas": True} if "return_alphas" in _arguments(pipeline.lora_state_dict) else {}
        given, *alphas, metadata = pipeline.lora_state_dict(
            str(file), local_files_only=True, use_safetensors=True, return_lora_metadata=True, **knows_alphas
        )
        alphas = alphas[0] if alphas else None
        layers = {name.partition(".lora_")[0].removeprefix("transformer."): name for name in given}
        factors = {}
        for layer, name in layers.items():
            down, up = (given.get(f"transformer.{layer}.lora_{which}.weight") for which in "AB")
            if down is None or up is None:
                raise ValueError(f"it changes more than linear layers of the transformer ({name}, ...)")
            factors[layer] = down, up
            if shapes.get(f"{layer}.weight") != (len(up), down.shape[-1]):
                raise ValueError(f"it is for another architecture ({layer})")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they tell of is checked below
            put = pipeline.load_lora_into_transformer
            more = {"network_alphas": alphas} if "network_alphas" in _arguments(put) else {}
            put(
                dict(given), transformer=transformer, adapter_name="default", metadata=metadata,
                low_cpu_mem_usage=True, **more,
            )  # fmt: skip
    except Exception as error:  # a converter fails in every way there is on a layout that it does not expect
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{field}: {file} cannot be read as a LoRA of this transformer: {message[:300]}") from None
    adapted = {layer: module for layer, module in transformer.named_modules() if hasattr(module, "lora_A")}
    parameters = sum(".lora_" in name for name, _ in transformer.named_parameters())
    if not adapted or adapted.keys() != factors.keys() or not parameters == len(given) == 2 * len(adapted):
        message = f"its {len(given)} tensors are {parameters} parameters of {len(adapted)} layers"
        raise ValueError(f"{field}: {file} is not read whole by diffusers: {message}")
    found = {layer: Adapter(*factors[layer], float(adapted[layer].scaling["default"])) for layer in adapted}
    for layer, adapter in found.items():
        rank = len(adapter.down)
        written = adapter.scale if not alphas else float(alphas.get(f"transformer.{layer}.alpha", rank)) / rank
        if not math.isclose(written, adapter.scale, rel_tol=1e-6) or not 0 < adapter.scale < math.inf:
            message = f"diffusers runs {layer} at scale {adapter.scale:g}, by its alpha it is {written:g}"
            raise ValueError(f"{field}: {file} has no sure scale: {message}")
    return found


def _arguments(function: Any) -> Collection[str]:
    return inspect.signature(function).parameters


def find_file(field: str, path: str) -> Path:
    """The LoRA file: `path` itself, or the one in that folder. ValueError, which begins with `field`: there is none."""
    found = Path(path)
    if found.is_dir():
        files = sorted(found.glob("*.safetensors"))
        if (named := found / FILE) in files:
            return named
        if len(files) != 1:
            raise ValueError(f"{field}: {path} holds {len(files)} safetensors files and no {FILE}; name the file")
        return files[0]
    if not found.is_file():
        raise ValueError(f"{field}: no file or folder {path}")
    if found.suffix != ".safetensors":
        raise ValueError(f"{field}: {path} is no .safetensors file; other formats can run code when they are read")
    return found


def _check_names(file: Path, names: Collection[str]) -> None:
    """ValueError where the file holds tensors that diffusers would leave out, most of them without a word."""
    for name in names:
        for pattern, kind in _OTHER_KINDS.items():
            if re.match(pattern, name):
                raise ValueError(f"{file} {kind} ({name}, ...); adapters of a transformer's linear layers are served")
        if not _FACTOR.fullmatch(name):
            raise ValueError(f"{file} changes more than linear layers of the transformer ({name}, ...)")
    layouts = {next((layout for layout in _LAYOUTS if name.startswith(layout)), "") for name in names}
    if len(layouts) > 1:
        raise ValueError(f"{file} mixes layouts: its tensors' names begin with {' and '.join(sorted(layouts))}")


def follow_lora(lora: LoraConfig, transformer: Any, family: type[Backbone]) -> tuple[LoraConfig, dict[str, Adapter]]:
    """The settings with those of `lora.path`'s file in place of what the user did not give, and its adapters by layer.

    transformer: as for `read_lora`. Without a path: the family's own layers where none are given, no adapters.
    ValueError where the file cannot be read, has adapters of several ranks or scales, or is another LoRA than the
    settings say.
    """
    if lora.path is None:
        return lora.model_copy(update={"target_modules": lora.target_modules or list(family.lora_targets)}), {}
    adapters = read_lora("model.lora.path", lora.path, transformer, family)
    for what, values in (
        ("rank", {len(adapter.down) for adapter in adapters.values()}),
        ("scale", {adapter.scale for adapter in adapters.values()}),
    ):
        if len(values) > 1:
            message = f"{what}s {', '.join(f'{value:g}' for value in sorted(values)[:4])}; one {what} for all is needed"
            raise ValueError(f"model.lora.path: {lora.path} has adapters of {message}")
    adapter = next(iter(adapters.values()))
    rank, alpha = len(adapter.down), adapter.scale * len(adapter.down)
    given = lora.model_fields_set - lora.follows
    if "rank" in given and lora.rank != rank:
        message = f"{lora.rank}, but {lora.path} is of rank {rank}"
        raise ValueError(f"model.lora.rank: {message}; leave it out to take the file's")
    if "alpha" in given and not math.isclose(lora.alpha, alpha, rel_tol=1e-6):
        message = f"{lora.alpha:g}, but that of {lora.path} is {alpha:g}"
        raise ValueError(f"model.lora.alpha: {message}; leave it out to take the file's")
    chosen = set(adapters)
    if "target_modules" in given:
        chosen = {layer for some in lora.layers(linear_layers(transformer)).values() for layer in some}
    if other := sorted(chosen ^ adapters.keys()):
        message = f"not the layers that {lora.path} adapts ({other[0]}, ...)"
        raise ValueError(f"model.lora.target_modules: {message}; leave it out to take the file's")
    found = {"rank": rank, "alpha": alpha, "target_modules": _ends(lora.path, adapters.keys(), transformer)}
    return lora.model_copy(update={name: value for name, value in found.items() if name not in given}), adapters


def _ends(path: str, chosen: Collection[str], transformer: nn.Module) -> list[str]:
    """The shortest ends of names that take these of a transformer's layers and no other, by the rule of `takes`."""
    names, ends = [name for name, _ in transformer.named_modules()], list[str]()
    for layer in chosen:
        if any(takes(end, layer) for end in ends):
            continue
        parts = layer.split(".")
        for end in (".".join(parts[place:]) for place in reversed(range(len(parts)))):
            if all(name in chosen for name in names if takes(end, name)):
                ends.append(end)
                break
        else:
            message = f"adapts {layer} and not every other layer whose name ends so, which no target_modules can say"
            raise ValueError(f"model.lora.path: {path} {message}")
    return ends


def adapter_name(parameter: str) -> str:
    """A parameter's name -> its factor's in diffusers' layout."""
    return parameter.replace(".default.", ".")


def save_lora(
    folder: Path, adapters: Mapping[str, Tensor], lora: LoraConfig, pipeline: Any, dtype: torch.dtype = torch.float32
) -> None:
    """`pytorch_lora_weights.safetensors`, for the pipeline's `load_lora_weights(folder)` and any other reader.

    adapters: by parameter name. pipeline: diffusers' class. The scale alpha / rank is multiplied into B, and alpha is
    written as the rank: a reader that takes alpha from the header, one that looks for `.alpha` tensors and one that
    knows no alpha run the file at the same strength. dtype: of the tensors, rounded to after that.
    """
    scale = lora.alpha / lora.rank
    layers = {
        adapter_name(name): (value.float() * scale if ".lora_B." in name else value.float()).to(dtype)
        for name, value in adapters.items()
    }
    metadata = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": lora.target_modules}
    pipeline.save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)


def linear_layers(transformer: nn.Module) -> list[str]:
    """The names of a transformer's linear layers, adapted or not."""
    linear = (name for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    return [name.removesuffix(".base_layer") for name in linear if ".lora_" not in name]


def describe(lora: LoraConfig, transformer: nn.Module) -> str:
    """What is adapted: the number of layers, and how many of them each entry of target_modules takes."""
    taken = lora.layers(linear_layers(transformer))
    layers = {name for names in taken.values() for name in names}
    message = ", ".join(f"{target} {len(names)}" for target, names in taken.items())
    return f"model.lora: rank {lora.rank}, alpha {lora.alpha:g}, on {len(layers)} linear layers: {message}"
