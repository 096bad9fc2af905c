"""Prompt files, and the one endless order in which all ranks draw from them."""

import json
import os
import tempfile
import warnings
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from egrpo_fast.shapes import prompts_path


class StoredPrompts(Sequence[str]):
    """Strings in an unnamed temporary file; in memory, 8 bytes each. What happens to their source does not matter."""

    def __init__(self, prompts: Iterable[str]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object
        self._ends = array("q", [0])
        try:
            for prompt in prompts:
                self._ends.append(self._ends[-1] + self._file.write(prompt.encode()))
            self._file.flush()
        except BaseException:
            with suppress(OSError):  # a full disk was told once
                self._file.close()
            raise
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        place = range(len(self))[place]
        start, end = self._ends[place : place + 2]
        return os.pread(self._file.fileno(), end - start, start).decode()


def read_prompts(path: str | Path, field: str = "prompts", column: str = "prompt") -> Sequence[str]:
    """Prompts of a file, stripped, in its order; memory does not grow with their length.

    By suffix: `.jsonl` and `.ndjson` hold one object per line and `.parquet` a table, with the prompt as string
    `column`; anything else is text with one prompt per line. All are UTF-8; blank lines are skipped, a prompt that is
    blank inside JSON or Parquet is refused. Repeated prompts are kept, and a warning counts them.
    ValueError names `field`, the file and the fault with its line.
    """
    path = Path(path)
    read, unit = {".jsonl": (_json_lines, "line"), ".ndjson": (_json_lines, "line"), ".parquet": (_parquet, "row")}.get(
        path.suffix.lower(), (_text_lines, "line")
    )
    places, digests = array("q"), array("Q")

    def noted() -> Iterator[str]:
        for place, value in read(path, column):
            prompt = _checked(value, f"{unit} {place}")
            places.append(place)
            digests.frombytes(blake2b(prompt.encode(), digest_size=8).digest())
            yield prompt

    try:
        prompts = StoredPrompts(noted())
    except ValueError as error:
        raise ValueError(f"{field}: {path} {error}") from None
    except OSError as error:
        raise ValueError(f"{field}: cannot read {path}: {error.strerror or error}") from None
    if not prompts:
        raise ValueError(f"{field}: {path} holds no prompt; one per {unit} is expected")
    _warn_of_repeats(f"{field}: {path}", unit, np.array(places), np.array(digests))
    return prompts


def read_split(path: str, split: str, column: str = "prompt") -> Sequence[str]:
    """`read_prompts` of what a recipe's `prompts.SPLIT` names; `shapes`: the captions that ship with the package."""
    return read_prompts(prompts_path(path, split), f"prompts.{split}", column)


def _checked(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"holds {type(value).__name__} instead of a string in {where}")
    prompt = value.strip()
    if not prompt:
        raise ValueError(f"holds an empty prompt in {where}")
    if "\0" in prompt:
        raise ValueError(f"is not text: a NUL character in {where}")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise ValueError(f"holds half a character (a lone surrogate) in {where}") from None
    return prompt


def _warn_of_repeats(told: str, unit: str, places: np.ndarray, digests: np.ndarray) -> None:
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    original = first[group]
    repeats = np.flatnonzero(original != np.arange(len(digests)))
    if len(repeats):
        shown = ", ".join(f"{unit} {places[place]} repeats {places[original[place]]}" for place in repeats[:3])
        more = ", ..." if len(repeats) > 3 else ""
        warnings.warn(f"{told} holds {len(repeats)} of its prompts again ({shown}{more})", stacklevel=3)


def _text_lines(path: Path, column: str) -> Iterator[tuple[int, str]]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"is not UTF-8 (byte {start + error.start}, line {number})") from None
            start += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if text := text.strip():
                yield number, text


def _json_lines(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    for number, line in _text_lines(path, column):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"holds no JSON in line {number}") from None
        if not isinstance(record, dict):
            raise ValueError(f"holds no JSON object in line {number}")
        if column not in record:
            raise ValueError(f"lacks field {column!r} in line {number}; there are: {', '.join(record) or 'none'}")
        yield number, record[column]


def _parquet(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise ValueError("is Parquet, and pyarrow is not installed; pip install pyarrow") from None

    with path.open("rb") as source:
        try:
            with ParquetFile(source, page_checksum_verification=True) as file:
                names = file.schema_arrow.names
                if column not in names:
                    raise ValueError(f"lacks column {column!r}; there are: {', '.join(names) or 'none'}")
                batches = file.iter_batches(1024, columns=[column])
                yield from enumerate((value for batch in batches for value in batch.column(0).to_pylist()), 1)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"cannot be read as Parquet: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class Prompt:
    """One prompt of an iteration. number: its place in the endless order, which also names its noise streams."""

    number: int
    text: str


class PromptOrder:
    """Number n is line `order_e[n mod N]` of epoch `e = n div N`, `order_e` a permutation seeded by (seed, e).

    A pure function of n: nothing to save, nothing to share. Every prompt comes exactly once per epoch, whatever the
    number of ranks. In memory: 8 bytes per prompt and epoch, of the two latest epochs.
    """

    def __init__(self, lines: Sequence[str], seed: int, shuffle: bool = True) -> None:
        self.lines, self.seed, self.shuffle = lines, seed, shuffle
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.lines))
        # manual_seed takes 64 bits; a hash of the pair would do as well, but this stays readable in a debugger.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(len(self.lines), generator=generator)

    def __getitem__(self, number: int) -> Prompt:
        epoch, place = divmod(number, len(self.lines))
        return Prompt(number, self.lines[int(self._epoch(epoch)[place])])

    def iteration(self, iteration: int, per_iteration: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """This rank's share of an iteration: numbers `iteration * per_iteration + rank, + world_size, ...`."""
        first = iteration * per_iteration
        return [self[number] for number in range(first + rank, first + per_iteration, world_size)]
