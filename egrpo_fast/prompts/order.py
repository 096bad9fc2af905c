"""The one endless order in which all ranks draw prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


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
