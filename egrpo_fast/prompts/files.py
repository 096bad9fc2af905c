"""Prompts from files: read and checked."""

import warnings
from pathlib import Path
from typing import Any

from egrpo_fast.prompts.formats import opened
from egrpo_fast.shapes import prompts_path

LONGEST_PROMPT, MOST_PROMPTS = 20_000, 1 << 24
"""Characters of a prompt, and prompts of a file. T5 reads 512 tokens: a longer prompt is a file of another kind."""


def read_prompts(path: str | Path | list[str], field: str = "prompts", column: str = "prompt") -> list[str]:
    """Prompts of a file, a hub data set or a list, stripped, in its order.

    What can be read: `prompts/formats.py`. column: the field of an object, or column of a table, that holds the prompt.
    Blank lines of text are skipped; elsewhere a blank prompt is refused. Repeated prompts are kept, and a warning
    counts them. ValueError names `field`, the file and the fault with its line.
    """
    prompts, places = list[str](), list[int]()
    unit, message = "line", "the list" if isinstance(path, list) else str(path)
    try:
        with opened(path) as (read, unit):
            for place, value in read(column):
                prompts.append(_checked(value, f"{unit} {place}"))
                places.append(place)
                if len(places) > MOST_PROMPTS:
                    raise ValueError(f"holds more than {MOST_PROMPTS:,} prompts")
    except ValueError as error:
        raise ValueError(f"{field}: {message} {error}") from None
    except OSError as error:
        raise ValueError(f"{field}: cannot read {message}: {error.strerror or error}") from None
    if not prompts:
        raise ValueError(f"{field}: {message} holds no prompt; one per {unit} is expected")
    _warn_of_repeats(f"{field}: {message}", unit, places, prompts)
    return prompts


def read_split(source: str | list[str], split: str, column: str = "prompt") -> list[str]:
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


def _warn_of_repeats(message: str, unit: str, places: list[int], prompts: list[str]) -> None:
    first: dict[str, int] = {}
    repeats = [(place, before) for place, p in zip(places, prompts) if (before := first.setdefault(p, place)) != place]
    if repeats:
        shown = ", ".join(f"{unit} {place} repeats {before}" for place, before in repeats[:3])
        more = ", ..." if len(repeats) > 3 else ""
        warnings.warn(f"{message} holds {len(repeats)} of its prompts again ({shown}{more})", stacklevel=3)
