"""Prompts from files: read, checked, kept."""

import os
import tempfile
import warnings
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, overload

import numpy as np

from egrpo_fast.prompts.formats import opened
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


LONGEST_PROMPT, MOST_PROMPTS = 20_000, 1 << 24
"""Characters of a prompt, and prompts of a file. T5 reads 512 tokens: a longer prompt is a file of another kind."""


def read_prompts(path: str | Path | list[str], field: str = "prompts", column: str = "prompt") -> Sequence[str]:
    """Prompts of a file, a hub data set or a list, stripped, in its order; memory does not grow with their length.

    What can be read: `prompts/formats.py`. column: the field of an object, or column of a table, that holds the prompt.
    Blank lines of text are skipped; elsewhere a blank prompt is refused. Repeated prompts are kept, and a warning
    counts them. ValueError names `field`, the file and the fault with its line.
    """
    places, digests = array("q"), array("Q")
    unit, told = "line", "the list" if isinstance(path, list) else str(path)

    def noted() -> Iterator[str]:
        nonlocal unit
        with opened(path) as (read, unit):
            for place, value in read(column):
                prompt = _checked(value, f"{unit} {place}")
                if len(places) == MOST_PROMPTS:
                    raise ValueError(f"holds more than {MOST_PROMPTS:,} prompts")
                places.append(place)
                digests.frombytes(blake2b(prompt.encode(), digest_size=8).digest())
                yield prompt

    try:
        prompts = StoredPrompts(noted())
    except ValueError as error:
        raise ValueError(f"{field}: {told} {error}") from None
    except OSError as error:
        raise ValueError(f"{field}: cannot read {told}: {error.strerror or error}") from None
    if not prompts:
        raise ValueError(f"{field}: {told} holds no prompt; one per {unit} is expected")
    _warn_of_repeats(f"{field}: {told}", unit, np.array(places), np.array(digests))
    return prompts


def read_split(source: str | list[str], split: str, column: str = "prompt") -> Sequence[str]:
    """`read_prompts` of what a recipe's `prompts.SPLIT` names; `shapes`: the captions that ship with the package."""
    named = source if isinstance(source, list) else prompts_path(source, split)
    return read_prompts(named, f"prompts.{split}", column)


def _checked(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"holds {type(value).__name__} instead of a string in {where}")
    prompt = value.strip()
    if not prompt:
        raise ValueError(f"holds an empty prompt in {where}")
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"holds a prompt of {len(prompt):,} characters in {where}; at most {LONGEST_PROMPT:,}")
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
