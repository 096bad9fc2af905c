"""Prompt files, and the one endless order in which all ranks draw from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch


def read_prompts(path: str | Path, field: str = "prompts") -> list[str]:
    """Prompts of a UTF-8 text file, one per line; blank lines are skipped. ValueError names `field` and the fault."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: {path} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"{field}: cannot read {path}: {error.strerror}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{field}: {path} holds no prompt; one per line is expected")
    return prompts


@dataclass(frozen=True)
class Prompt:
    """One prompt of an iteration. number: its place in the endless order, which also names its noise streams."""

    number: int
    text: str


class PromptOrder:
    """Number n is line `order_e[n mod N]` of epoch `e = n div N`, `order_e` a permutation seeded by (seed, e).

    A pure function of n: nothing to save, nothing to share. Every prompt comes exactly once per epoch, whatever the
    number of ranks.
    """

    def __init__(self, lines: Sequence[str], seed: int, shuffle: bool = True) -> None:
        self.lines, self.seed, self.shuffle = lines, seed, shuffle
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.lines)))
        # manual_seed takes 64 bits; a hash of the pair would do as well, but this stays readable in a debugger.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(len(self.lines), generator=generator).tolist()

    def __getitem__(self, number: int) -> Prompt:
        epoch, place = divmod(number, len(self.lines))
        return Prompt(number, self.lines[self._epoch(epoch)[place]])

    def iteration(self, iteration: int, per_iteration: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """This rank's share of an iteration: numbers `iteration * per_iteration + rank, + world_size, ...`."""
        first = iteration * per_iteration
        return [self[number] for number in range(first + rank, first + per_iteration, world_size)]
