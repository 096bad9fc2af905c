"""Which rows live at which grid step, where they branch and which model calls are made: a static table.

One prompt has a fixed set of state rows. At every grid step each live row is the *source* of one or more *edges*,
affine steps to a destination row (its own next state, or a branch). All live rows of a wavefront step share its time,
so a step is one batched model call, whatever the number of branches. A method is a function that draws a plan
(`methods.py`); `Draft` is what it draws with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from egrpo_fast.noise import draw_word
from egrpo_fast.schedule import AffineStep, Schedule

ANCHOR = 0
"""The row that a plan's first trajectory lives in."""

View = tuple[tuple[int, ...], ...]
"""For every sample of a group the picture rows, equally many each, whose mean reward is the sample's."""


@dataclass(frozen=True)
class Edge:
    """One affine step from a source row to a destination row: `c_x x + c_v v + sign s eps`.

    draw: the noise stream's last word (s > 0 only). sign -1 mirrors the edge of the same source, step and draw.
    """

    source: int
    destination: int
    step: AffineStep
    draw: int = 0
    sign: int = 1


@dataclass(frozen=True)
class Group:
    """Samples of one stochastic step that are compared with each other: one forward of the update, one advantage each.

    index, time: of the step. sources: rows of the S states that the samples left, equally many each. draws, signs:
    noise stream word of each sample, source by source, and 1 or -1 for its mirror. views: each says whose rewards a
    sample gets; advantages are taken within each view and added. weight: of the group's loss.
    """

    index: int
    time: float
    step: AffineStep
    sources: tuple[int, ...]
    draws: tuple[int, ...]
    signs: tuple[int, ...]
    views: tuple[View, ...]
    weight: float = 1.0

    @property
    def size(self) -> int:
        return len(self.draws)


@dataclass(frozen=True)
class Wave:
    """One grid step: every edge that starts there, sorted by source."""

    index: int
    time: float
    edges: tuple[Edge, ...]

    @cached_property
    def sources(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(edge.source for edge in self.edges))


@dataclass(frozen=True)
class WaveTable:
    """A wave's edges for several prompts in compressed rows, as `ops.branch_rows` takes them (see there).

    A mirrored edge is without noise there: its row receives the mean, about which it then mirrors its twin's row.
    mirrors, twins int64: those rows; None where a wave has none.
    """

    time: float
    sources: Tensor
    source_slots: Tensor
    offsets: Tensor
    destinations: Tensor
    coefficients: Tensor
    draws: Tensor
    slots: Tensor
    mirrors: Tensor | None
    twins: Tensor | None


@dataclass(frozen=True)
class Plan:
    """The wavefront of one prompt.

    num_rows: state rows of one prompt. waves: by grid index; only steps at which some row is live. groups: at most one
    per grid index, increasing; several may share pictures.
    starts: rows that begin as noise, each with the sample word of its stream.
    """

    schedule: Schedule
    num_rows: int
    waves: tuple[Wave, ...]
    groups: tuple[Group, ...]
    starts: tuple[tuple[int, int], ...] = ((ANCHOR, 0),)

    def __post_init__(self) -> None:
        indices = [group.index for group in self.groups]
        assert indices == sorted(set(indices)), "groups not increasing by grid index"
        for wave in self.waves:
            destinations = [edge.destination for edge in wave.edges]
            sources = set(wave.sources)
            assert wave.sources and len(set(destinations)) == len(destinations), "overlapping destinations"
            assert all(0 <= row < self.num_rows for row in (*destinations, *sources)), "row outside the plan"
            kept = all(edge.destination == edge.source or edge.destination not in sources for edge in wave.edges)
            assert kept, "a source overwritten before it is read"
            assert all(edge.sign == 1 or _twin(wave, edge) for edge in wave.edges), "a mirror without its twin"
        edges = {wave.index: {(e.source, e.step, e.draw, e.sign) for e in wave.edges} for wave in self.waves}
        for group in self.groups:
            each, rest = divmod(group.size, len(group.sources))
            assert not rest and group.size == len(group.signs), "states left by different numbers of samples"
            left = [source for source in group.sources for _ in range(each)]
            samples = {(source, group.step, *word) for source, word in zip(left, zip(group.draws, group.signs))}
            assert samples <= edges[group.index], "a sample that no edge makes"
            assert all(len(view) == group.size for view in group.views), "a view of more or fewer samples"
        pictures = self.picture_rows
        assert len(set(pictures)) == len(pictures), "a picture compared with two different sets of others"

    @cached_property
    def _compared(self) -> tuple[tuple[int, ...], ...]:
        sets = (tuple(row for rows in view for row in rows) for group in self.groups for view in group.views)
        return tuple(dict.fromkeys(sets))

    @property
    def picture_rows(self) -> tuple[int, ...]:
        """Rows of the pictures that are rewarded, once each: one set that is compared after the other. Without groups
        every row is a picture."""
        if not self.groups:
            return tuple(range(self.num_rows))
        return tuple(row for rows in self._compared for row in rows)

    @property
    def trained_states(self) -> int:
        """States of one prompt that the update runs the model at, with gradient."""
        return sum(len(group.sources) for group in self.groups)

    def compared(self, values: Tensor) -> tuple[Tensor, ...]:
        """[..., pictures] in the order of `picture_rows` -> one [..., n] per set of pictures that is compared."""
        return values.split([len(rows) for rows in self._compared], dim=-1)

    def by_group(self, values: Tensor) -> tuple[Tensor, ...]:
        """[K, P, pictures] -> per group [K V, P, G]: each sample's mean over its pictures; V views vary fastest."""
        place = {row: i for i, row in enumerate(self.picture_rows)}
        result = []
        for group in self.groups:
            views = [[[place[row] for row in rows] for rows in view] for view in group.views]
            seen = [values[..., torch.tensor(view, device=values.device)].mean(-1) for view in views]
            result.append(torch.stack(seen, dim=1).flatten(0, 1))
        return tuple(result)

    @property
    def evaluations(self) -> int:
        """Model evaluations of one prompt's rollout, without gradient."""
        return sum(len(wave.sources) for wave in self.waves)

    @property
    def evaluations_alone(self) -> int:
        """What sampling every picture by itself would take: one for each of its steps from the noise on."""
        came_from = [{edge.destination: edge.source for edge in wave.edges} for wave in reversed(self.waves)]
        count = 0
        for row in self.picture_rows:
            for sources in came_from:
                if row in sources:
                    row, count = sources[row], count + 1
        return count

    def tables(self, num_prompts: int, device: torch.device | str, dtype: torch.dtype) -> tuple[WaveTable, ...]:
        """Every wave's table for `num_prompts` prompts; prompt p owns rows p * num_rows onwards.

        Right because the plan is (`__post_init__`); ValueError where its rows are more than 32-bit indices name.
        """
        if num_prompts * self.num_rows >= 2**31:
            raise ValueError(f"num_prompts: {num_prompts} prompts of {self.num_rows} rows, allowed: below 2^31 in all")
        return tuple(self._table(wave, num_prompts, device, dtype) for wave in self.waves)

    def _table(self, wave: Wave, num_prompts: int, device: torch.device | str, dtype: torch.dtype) -> WaveTable:
        edges = [(slot, edge) for slot in range(num_prompts) for edge in wave.edges]
        degrees = [sum(edge.source == source for edge in wave.edges) for source in wave.sources]
        mirrored = [
            (slot * self.num_rows + edge.destination, slot * self.num_rows + twin.destination)
            for slot, edge in edges
            if edge.sign < 0 and (twin := _twin(wave, edge))
        ]

        def words(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return WaveTable(
            time=wave.time,
            sources=words([slot * self.num_rows + source for slot in range(num_prompts) for source in wave.sources]),
            source_slots=words([slot for slot in range(num_prompts) for _ in wave.sources], torch.int64),
            offsets=words([0, *torch.tensor(degrees * num_prompts).cumsum(0).tolist()]),
            destinations=words([slot * self.num_rows + edge.destination for slot, edge in edges]),
            coefficients=torch.tensor(
                [(edge.step.c_x, edge.step.c_v, edge.step.s if edge.sign > 0 else 0.0) for _, edge in edges],
                dtype=dtype,
                device=device,
            ),
            draws=words([edge.draw for _, edge in edges], torch.int64),
            slots=words([slot for slot, _ in edges]),
            mirrors=words([row for row, _ in mirrored], torch.int64) if mirrored else None,
            twins=words([row for _, row in mirrored], torch.int64) if mirrored else None,
        )


def _twin(wave: Wave, edge: Edge) -> Edge | None:
    """The edge that a mirrored one mirrors."""
    same = (edge.source, edge.step, edge.draw, 1)
    return next((other for other in wave.edges if (other.source, other.step, other.draw, other.sign) == same), None)


def tail_grid(start: int, num_steps: int, stride: int) -> list[int]:
    """Grid indices of an ODE tail: start, start + stride, ..., num_steps; the last stride may be shorter."""
    return [*range(start, num_steps, stride), num_steps]


def singly(rows: Sequence[int]) -> View:
    """The view in which every sample gets the reward of its own picture."""
    return tuple((row,) for row in rows)


@dataclass(frozen=True)
class Samples:
    """Samples that left `sources` by one stochastic step at a grid index; rows: where each is, source by source."""

    index: int
    step: AffineStep
    sources: tuple[int, ...]
    rows: tuple[int, ...]
    draws: tuple[int, ...]
    signs: tuple[int, ...]


class Draft:
    """A plan in the making: rows are begun, stepped on, branched and trained, in any order; then it is a `Plan`.

    antithetic: samples of one state come in pairs that share their noise with opposite signs; an odd one is alone.
    """

    def __init__(self, schedule: Schedule, antithetic: bool = False) -> None:
        self._schedule, self._antithetic, self._num_rows = schedule, antithetic, 0
        self._edges: list[list[Edge]] = [[] for _ in range(schedule.num_steps)]
        self._groups: list[Group] = []
        self._starts: list[tuple[int, int]] = []

    def _rows(self, count: int) -> tuple[int, ...]:
        self._num_rows += count
        return tuple(range(self._num_rows - count, self._num_rows))

    def start(self, sample: int = 0) -> int:
        """A new row that begins as noise; rows of equal `sample` begin as the same."""
        (row,) = self._rows(1)
        self._starts.append((row, sample))
        return row

    def ode(self, rows: Sequence[int], start: int, end: int, stride: int = 1, fork: bool = False) -> tuple[int, ...]:
        """Deterministic steps of `rows` from grid index `start` to `end`. Returns their rows: with `fork` new ones."""
        here = tuple(rows)
        for index, following in pairwise(tail_grid(start, end, stride) if start < end else ()):
            there = self._rows(len(here)) if fork and index == start else here
            step = self._schedule.ode(index, following)
            self._edges[index] += [Edge(source, row, step) for source, row in zip(here, there)]
            here = there
        return here

    def sde(self, sources: Sequence[int], index: int, each: int = 1, length: int = 1, keep: bool = False) -> Samples:
        """`each` samples leave every source by a stochastic step over `length` grid steps.

        The first lives on in its source's row, unless `keep` says that the source goes its own way.
        """
        step = self._schedule.sde(index, length)
        rows: list[int] = []
        draws: list[int] = []
        signs: list[int] = []
        for source in sources:
            rows += [*([] if keep else [source]), *self._rows(each - (not keep))]
            for sample in range(each):
                mirrored = self._antithetic and sample % 2 == 1
                draws.append(draw_word(index, len(draws) - mirrored))
                signs.append(-1 if mirrored else 1)
        left = [source for source in sources for _ in range(each)]
        self._edges[index] += [Edge(*sample) for sample in zip(left, rows, [step] * len(rows), draws, signs)]
        return Samples(index, step, tuple(sources), tuple(rows), tuple(draws), tuple(signs))

    def train(self, samples: Samples, *views: View, weight: float = 1.0) -> None:
        """Make a group of the samples."""
        index, time = samples.index, self._schedule.times[samples.index]
        group = Group(index, time, samples.step, samples.sources, samples.draws, samples.signs, views, weight)
        self._groups.append(group)

    def plan(self) -> Plan:
        waves = tuple(
            Wave(index, self._schedule.times[index], tuple(sorted(edges, key=lambda edge: edge.source)))
            for index, edges in enumerate(self._edges)
            if edges
        )
        groups = tuple(sorted(self._groups, key=lambda group: group.index))
        return Plan(self._schedule, self._num_rows, waves, groups, tuple(self._starts))


def ode_plan(schedule: Schedule) -> Plan:
    """One deterministic trajectory per prompt, all the way: what an evaluation samples."""
    draft = Draft(schedule)
    draft.ode([draft.start()], 0, schedule.num_steps)
    return draft.plan()
