"""A model's safetensors files, one or several with an index: checked by their headers, read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # headers alone tell the shapes, and do not wait for torch
    from safetensors import safe_open
    from torch import Tensor

from egrpo_fast.files import fingerprint, read_json, sampled

_HEADER_LIMIT = 100_000_000


def tensors_in(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name -> shape and place in bytes, of a safetensors file. ValueError where it is not one, or not all of one."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError("no safetensors header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        data = 8 + length
        found = {name: (tuple(entry["shape"]), data + entry["data_offsets"][0]) for name, entry in header.items()}
        size = data + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, its header asks for {size:,}: download it again")
    return found


class WeightFiles:
    """The weights in a folder: `STEM.safetensors`, or the shards that `STEM.safetensors.index.json` names.

    Only headers are read on opening. ValueError names the file that is missing, truncated or no safetensors file.
    """

    def __init__(self, folder: str | Path, stem: str = "diffusion_pytorch_model") -> None:
        folder = Path(folder)
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.is_file():
            try:
                names = set(read_json(index)["weight_map"].values())
                paths = [folder / name for name in sorted(names)]
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} cannot be read: {error!r}") from None
            if not paths:
                raise ValueError(f"{index} names no file")
            if astray := [name for name in sorted(names) if name in ("", "..") or Path(name).name != name]:
                raise ValueError(f"{index} names {astray[0]!r}; a file in its own folder is expected")
        elif single.is_file():
            paths = [single]
        else:
            raise ValueError(f"{folder} has neither {single.name} nor {index.name}")
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}")
        self._folder = folder
        self._where: dict[str, tuple[Path, int]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            for name, (shape, place) in tensors_in(path).items():
                self.shapes[name], self._where[name] = shape, (path, place)
        self.largest_file = max(path.stat().st_size for path in paths)
        self._open: tuple[Path, safe_open] | None = None

    def check_names(self, expected: Collection[str]) -> None:
        """ValueError where the files hold other tensors than those."""
        missing, extra = set(expected) - self.shapes.keys(), self.shapes.keys() - set(expected)
        wrong = [f"{word} {len(some)} ({min(some)}, ...)" for word, some in (("lack", missing), ("add", extra)) if some]
        if wrong:
            what = f"of {len(expected)} tensors they {' and '.join(wrong)}"
            raise ValueError(f"{self._folder}: weights of another architecture: {what}")

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError where these are not the tensors of that model: name -> shape."""
        self.check_names(expected)
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(
                    f"{self._folder}: weights of another architecture: {name} is {self.shapes[name]}, not {shape}"
                )

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's dtype. One file is open at a time: read in the files' order."""
        from safetensors import SafetensorError, safe_open

        path, _ = self._where[name]
        try:
            if self._open is None or self._open[0] != path:
                self._open = (path, safe_open(path, framework="pt"))
            return self._open[1].get_tensor(name)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path}: {name} cannot be read: {error}") from None

    def samples(self) -> list[bytes]:
        """For a `fingerprint`: of every weight, by name, its name, dtype, shape and 16 evenly spaced pieces of 4 KiB.

        At most 64 KiB of a weight are read, all of a smaller one. So other weights differ where training or merging
        touched a whole tensor; a few changed numbers between the pieces may pass. How they are split into files does
        not matter.
        """
        found = {}
        for name, (path, place) in self._where.items():
            tensor = self.read(name)  # its bytes are not read by that
            about = f"{name} {tensor.dtype} {self.shapes[name]}".encode()
            try:
                found[name] = about + _sample(path, place, tensor.nbytes)
            except OSError as error:
                raise ValueError(f"{path}: {name} cannot be read: {error}") from None
        self.close()
        return [found[name] for name in sorted(found)]

    def close(self) -> None:
        """Let go of the file that is open, and of the memory it is mapped to."""
        self._open = None


def part_identity(field: str, folder: Path) -> str:
    """Fingerprint of one part, a folder of a config and weights. ValueError, which begins with `field`."""
    try:
        config = {key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("_")}
        weights = WeightFiles(folder)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{field}: {folder} cannot be read: {error}") from None
    return fingerprint([json.dumps(config, sort_keys=True).encode(), *weights.samples()])


def _sample(path: Path, offset: int, size: int) -> bytes:
    """Of `size` bytes of a file. Not through the memory map, which reads ahead of every page that it is asked for."""
    with path.open("rb", buffering=0) as file:
        return b"".join(os.pread(file.fileno(), at.stop - at.start, offset + at.start) for at in sampled(size))


def new_adapter(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A new LoRA factor: A uniform in `+-sqrt(1 / in)` (Kaiming, a = sqrt 5), B zero. A function of (seed, name)."""
    import torch

    if ".lora_B." in name:
        return torch.zeros(shape)
    word = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    generator = torch.Generator().manual_seed(word % 2**63)
    return torch.empty(shape).uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator)


def fused(weight: Tensor, down: Tensor, up: Tensor, scale: Tensor | float) -> Tensor:
    """`W + scale B A` in the weight's dtype, added in float32: weight [out, in], down A [r, in], up B [out, r]."""
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)
