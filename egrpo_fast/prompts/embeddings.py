"""Embeddings of prompts as files: for each prompt a row of several tensors, found again by its text. Knows no model.

In the folder of a cache:

    index.json               who made it and how, names and shapes, dtype; the shards that count, size and checksum
    shard-00012.safetensors  keys uint8 [N, 16], sums int64 [N], and [N, ...] of each name

A key is the first half of the SHA-256 of the prompt's UTF-8, so one cache serves every file and order of its prompts. A
sum is the CRC-32 of a row's bytes, in the index's order of names, and is checked whenever the row is read. Files are
written beside their place and renamed. A shard counts once the index names it: an interrupted writer leaves the rest
whole.
"""

import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from egrpo_fast.files import read_bytes, write_whole
from egrpo_fast.folder_lock import lock

INDEX_FILE = "index.json"
LOCK_FILE = "lock"
KEY_BYTES = 16
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""What rows may be of, by torch's name and safetensors'."""

Positive = Annotated[int, Field(ge=1)]


class Shard(BaseModel):
    """A file of the cache. prompts: its rows; size: in bytes; checksum: SHA-256 of its keys, then its sums."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str = Field(pattern=r"^shard-[0-9]{5,9}\.safetensors$")
    prompts: Positive
    size: Positive
    checksum: str


class Index(BaseModel):
    """What `index.json` holds.

    encoder: fingerprint of the encoder. made_with: its settings, for people. shapes: of one prompt's tensors, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[2] = 2
    encoder: str
    made_with: dict[str, str | int]
    shapes: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]{1,99}$")], tuple[Positive, ...]]
    dtype: Literal["float32", "bfloat16"]
    shards: tuple[Shard, ...] = ()

    @field_validator("shapes")
    @classmethod
    def _apart(cls, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        if taken := shapes.keys() & {"keys", "sums"}:
            raise ValueError(f"{min(taken)} is the name of one of the cache's own tables")
        return shapes

    @property
    def row_bytes(self) -> int:
        """Of one prompt on disk."""
        elements = sum(map(prod, self.shapes.values()))
        return elements * getattr(torch, self.dtype).itemsize + KEY_BYTES + 8

    def __str__(self) -> str:
        how = ", ".join(f"{name} {value}" for name, value in self.made_with.items())
        return f"encoder {self.encoder[:12]} ({how}; {describe(self.shapes)})"


def describe(shapes: Mapping[str, Sequence[int]]) -> str:
    """Shapes, for people: `t5 512 x 4096, pooled 768`."""
    return ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())


def keys_of(prompts: Sequence[str]) -> np.ndarray:
    """The key of every prompt, dtype S16 [P]."""
    buffer = bytearray()
    for prompt in prompts:
        buffer += sha256(prompt.encode()).digest()[:KEY_BYTES]
    return np.frombuffer(buffer, f"S{KEY_BYTES}")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def _sum(tensors: Iterable[Tensor]) -> int:
    found = 0
    for tensor in tensors:
        found = zlib.crc32(_bytes(tensor), found)
    return found


def _checksum(keys: Tensor, sums: Tensor) -> str:
    return sha256(_bytes(keys).tobytes() + _bytes(sums).tobytes()).hexdigest()


def _read_index(folder: Path) -> Index:
    file = folder / INDEX_FILE
    try:
        return Index.model_validate_json(read_bytes(file))
    except FileNotFoundError:
        raise ValueError(f"embeddings: {folder} holds no {INDEX_FILE}; make the folder with `egrpo encode`") from None
    except OSError as error:
        raise ValueError(f"embeddings: cannot read {file}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        message = f"embeddings: {file} is damaged or of another version ({where}: {first['msg']})"
        raise ValueError(f"{message}; choose another folder, or remove this one to make it anew") from None


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[Any]:
    """A shard, open for reading; whatever is wrong inside becomes a ValueError that names it."""
    try:
        with safe_open(folder / name, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        message = f"embeddings: {folder / name} is damaged ({error}); `egrpo encode` with the same arguments repairs it"
        raise ValueError(message) from None


def _read_keys(folder: Path, index: Index, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """(keys, sums) of a shard that is what the index says, without reading its rows; else ValueError."""
    with _opened(folder, shard.file) as file:
        if (size := (folder / shard.file).stat().st_size) != shard.size:
            raise ValueError(f"{size:,} bytes instead of {shard.size:,}")
        count, dtype = shard.prompts, DTYPES[index.dtype]
        expected = {
            "keys": ([count, KEY_BYTES], "U8"), "sums": ([count], "I64"),
            **{name: ([count, *shape], dtype) for name, shape in index.shapes.items()},
        }  # fmt: skip
        for name, (shape, kind) in expected.items():
            view = file.get_slice(name)
            if (view.get_shape(), view.get_dtype()) != (shape, kind):
                raise ValueError(f"{name} is {view.get_dtype()} {view.get_shape()} instead of {kind} {shape}")
        keys, sums = file.get_tensor("keys"), file.get_tensor("sums")
        if _checksum(keys, sums) != shard.checksum:
            raise ValueError("wrong checksum")
    return np.frombuffer(_bytes(keys).tobytes(), f"S{KEY_BYTES}"), sums.numpy()


class EmbeddingCache:
    """A cache to read from. In memory: 32 bytes per prompt. ValueError names the file that is missing or damaged."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        tables = [_read_keys(self.folder, self.index, shard) for shard in self.index.shards]
        keys = np.concatenate([np.empty(0, f"S{KEY_BYTES}"), *(keys for keys, _ in tables)])
        self._starts = np.cumsum([0, *(len(keys) for keys, _ in tables)])
        self._rows = np.argsort(keys, kind="stable")
        self._keys = keys[self._rows]
        self._sums = np.concatenate([np.empty(0, np.int64), *(sums for _, sums in tables)])

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def fingerprint(self) -> str:
        """Of the encoder that made it."""
        return self.index.encoder

    def check(self, fingerprint: str, shapes: Mapping[str, tuple[int, ...]], asked: str = "model.path") -> None:
        """ValueError where the rows are of another shape, or by another encoder, than `asked` needs."""
        message = f"embeddings: {self.folder} was made by {self.index}"
        if self.index.shapes != dict(shapes):
            raise ValueError(f"{message}; {asked} needs {describe(shapes)}")
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{message}, not by encoder {fingerprint[:12]} of {asked}; run `egrpo encode` with the same model, "
                "max_sequence_length, dtype and quantization as here, into another folder"
            )

    def _find(self, prompts: Sequence[str]) -> np.ndarray:
        """Row of every prompt, int64 [P]; -1: not there."""
        keys = keys_of(prompts)
        if not len(self):
            return np.full(len(keys), -1)
        places = np.searchsorted(self._keys, keys).clip(max=len(self) - 1)
        return np.where(self._keys[places] == keys, self._rows[places], -1)

    def missing(self, prompts: Sequence[str]) -> np.ndarray:
        """Places of the prompts that are not there, int64, increasing."""
        return np.flatnonzero(self._find(prompts) < 0)

    def require(self, prompts: Sequence[str], field: str = "prompts") -> None:
        """ValueError where a prompt is not there: how many, and the first."""
        if len(missing := self.missing(prompts)):
            raise ValueError(
                f"{field}: {len(missing)} of {len(prompts)} prompts are not in {self.folder}, the first is "
                f"{prompts[int(missing[0])]!r}; `egrpo encode` with this file adds them"
            )

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """[P, ...] by name, on the CPU in the cache's dtype; reads these rows alone.

        ValueError where a prompt is not there, or its row is not what was written.
        """
        self.require(prompts)
        rows = self._find(prompts)
        dtype = getattr(torch, self.index.dtype)
        found = {name: torch.empty(len(rows), *shape, dtype=dtype) for name, shape in self.index.shapes.items()}
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(shards):
            with _opened(self.folder, self.index.shards[shard].file) as file:
                views = {name: file.get_slice(name) for name in found}
                for place in np.flatnonzero(shards == shard):
                    row = int(rows[place] - self._starts[shard])
                    for name, view in views.items():
                        found[name][place] = view[row]
                    if _sum(tensor[place] for tensor in found.values()) != self._sums[rows[place]]:
                        raise ValueError(f"wrong checksum of row {row}")
        return found


class EmbeddingWriter:
    """Makes a cache, or adds to it: a context manager that holds the folder against other writers.

    folder: new, empty or a cache of the same encoder. index: what to write, without shards. shard_bytes: a shard is
    written when it is as large; an interruption loses no more. verify: read every row of the shards that are there,
    not only their tables. Damaged shards are dropped, `dropped` names them. ValueError says what the user must mend.
    """

    def __init__(self, folder: str | Path, index: Index, shard_bytes: int = 2**28, verify: bool = False) -> None:
        self.folder, self.index = Path(folder), index
        self.shard_prompts = max(1, shard_bytes // index.row_bytes)
        self.dropped: list[str] = []
        self._verify = verify
        self._lock: IO[str] | None = None
        self._pending: list[tuple[np.ndarray, Mapping[str, Tensor]]] = []

    def __enter__(self) -> "EmbeddingWriter":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.folder / LOCK_FILE)
        except BlockingIOError:
            raise ValueError(f"embeddings: another process is writing into {self.folder}") from None
        except OSError as error:
            raise ValueError(f"embeddings: cannot write into {self.folder}: {error.strerror}") from None
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._lock is not None
        with self._lock:
            if kind is None:
                self._flush()

    def _open(self) -> None:
        others = {file.name for file in self.folder.iterdir()} - {LOCK_FILE, f"{INDEX_FILE}.tmp"}
        held: list[np.ndarray] = []
        kept = []
        if others:
            before = _read_index(self.folder)
            asked, made = (index.model_dump(exclude={"shards", "made_with"}) for index in (self.index, before))
            if asked != made:
                raise ValueError(f"embeddings: {self.folder} was made by {before}, not by {self.index}; choose another")
            for shard in before.shards:
                try:
                    keys, sums = _read_keys(self.folder, before, shard)
                    if self._verify:
                        self._verify_rows(shard, sums)
                except ValueError:
                    self.dropped.append(shard.file)
                    continue
                held.append(keys)
                kept.append(shard)
        self._keep(kept)
        named = {shard.file for shard in kept}
        for file in self.folder.glob("shard-*"):
            if file.name not in named:
                file.unlink()
        self._held = np.concatenate([np.empty(0, f"S{KEY_BYTES}"), *held])

    def _verify_rows(self, shard: Shard, sums: np.ndarray) -> None:
        with _opened(self.folder, shard.file) as file:
            views = [file.get_slice(name) for name in self.index.shapes]
            for row, expected in enumerate(sums):
                if _sum(view[row] for view in views) != expected:
                    raise ValueError(f"wrong checksum of row {row}")

    def missing(self, prompts: Sequence[str]) -> np.ndarray:
        """Places of the prompts to encode, int64, increasing: not held yet, each once."""
        distinct, first = np.unique(keys_of(prompts), return_index=True)
        return np.sort(first[~np.isin(distinct, self._held)])

    def check_space(self, prompts: int) -> None:
        """ValueError where the disk has no room for so many prompts more."""
        needed, free = prompts * self.index.row_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"embeddings: {prompts:,} prompts need {needed / 1e9:,.2f} GB, {self.folder} has {free / 1e9:,.2f} GB "
                "free; make room, or ask for fewer tokens (max_sequence_length)"
            )

    def add(self, prompts: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Take a batch: [P, ...] by name, of the index's shapes and dtype. ValueError: one is not finite."""
        tensors = {name: tensors[name].cpu() for name in self.index.shapes}
        for name, tensor in tensors.items():
            assert tensor.dtype == getattr(torch, self.index.dtype)
            assert tensor.shape == (len(prompts), *self.index.shapes[name])
            for prompt, row in zip(prompts, tensor):
                if not torch.isfinite(row).all():
                    raise ValueError(f"embeddings: that of {prompt!r} is not finite; try dtype float32")
        self._pending.append((keys_of(prompts), tensors))
        if sum(len(keys) for keys, _ in self._pending) >= self.shard_prompts:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        keys = np.concatenate([some for some, _ in self._pending])
        rows = {name: torch.cat([some[name] for _, some in self._pending]) for name in self.index.shapes}
        tensors = {
            "keys": torch.from_numpy(np.frombuffer(keys.tobytes(), np.uint8).copy()).view(-1, KEY_BYTES),
            "sums": torch.tensor([_sum(row) for row in zip(*rows.values())]),
            **rows,
        }
        shards = self.index.shards
        number = 1 + max((int(shard.file[6:-12]) for shard in shards), default=-1)
        path = self.folder / f"shard-{number:05d}.safetensors"
        self._write(path, save(tensors))
        checksum = _checksum(tensors["keys"], tensors["sums"])
        self._keep([*shards, Shard(file=path.name, prompts=len(keys), size=path.stat().st_size, checksum=checksum)])
        self._held = np.concatenate([self._held, keys])
        self._pending.clear()

    def _keep(self, shards: Sequence[Shard]) -> None:
        self.index = self.index.model_copy(update={"shards": tuple(shards)})
        self._write(self.folder / INDEX_FILE, self.index.model_dump_json(indent=1))

    def _write(self, path: Path, content: bytes | str) -> None:
        try:
            write_whole(path, content)
        except OSError as error:
            raise ValueError(
                f"embeddings: cannot write {path}: {error.strerror}; make room, and the same command goes on after "
                f"the {sum(shard.prompts for shard in self.index.shards)} prompts that are kept"
            ) from None
