"""Weights of a reward: a file or a hub id to tensors, without executing anything that a checkpoint may hold."""

import pickle
import re
from collections.abc import Collection
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from egrpo_fast.files import expanded, read_json

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def find_weights(weights: str, filename: str) -> Path:
    """`weights`: a file, a folder that holds `filename`, or the hub id of one that does. ValueError: neither."""
    path = Path(expanded(weights))
    if path.is_dir():
        path /= filename
    if path.is_file():
        return path
    if not _HUB_ID.fullmatch(weights):
        raise ValueError(f"weights: no file {path}")
    try:
        return Path(hf_hub_download(weights, filename))
    except (OSError, ValueError) as error:
        raise ValueError(f"weights: no file {weights}, and no {filename} from the hub: {error}") from None


def check_shards(weights: str) -> None:
    """ValueError where a folder in transformers' layout has an index that names a file outside of it."""
    index = Path(weights) / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = set(read_json(index)["weight_map"].values())
        astray = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"weights: {index} cannot be read: {error!r}") from None
    if astray:
        raise ValueError(f"weights: {index} names {min(astray)!r}; a file in its own folder is expected")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a `.pt` that holds nothing else: flat, or under `state_dict`.

    ValueError for anything else. A pickle that asks for a call is refused before the call: torch's `weights_only`
    unpickler knows tensors and plain containers alone.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"weights: {path} holds other things than tensors, and is not executed; store a state_dict, or safetensors"
        ) from None
    except Exception as error:  # bytes that are no checkpoint fail in every way there is
        raise ValueError(f"weights: {path} is no checkpoint ({type(error).__name__}: {error})") from None
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"weights: {path} holds no state_dict")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def load_weights(network: nn.Module, tensors: dict[str, Tensor], message: str, unused: Collection[str] = ()) -> None:
    """Every tensor of the network from the checkpoint, none left over but `unused` (prefixes). ValueError: not its own.

    Half a checkpoint is worse than none: a network that is part random still gives scores.
    """
    expected = network.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(unused))}
    wrong = {
        "missing": expected.keys() - given.keys(),
        "unknown": given.keys() - expected.keys(),
        "of another shape": {
            name for name in expected.keys() & given.keys() if expected[name].shape != given[name].shape
        },
    }
    if any(wrong.values()):
        parts = (f"{len(names)} {what} (as {min(names)})" for what, names in wrong.items() if names)
        raise ValueError(f"weights: {message} is of another model or version: {', '.join(parts)}")
    # Assigned, for the network may be empty so far; in its dtype, for half-precision checkpoints run in float32.
    network.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in given.items()}, assign=True)
