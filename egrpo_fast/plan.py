"""Which rows live at which grid step, where they branch and which model calls are made: a static table.

One prompt has a fixed set of state rows. At every grid step each live row goes on to one or more rows: to its own next
state, or to new branches. Each such move is an *edge* from a source to a destination. All rows that are live at a step
have the same time, so one batched model call serves them (`Wavefront` may split it). A method is a class whose `plan()`
makes a plan, with `PlanBuilder` (`methods/`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from egrpo_fast.noise import draw_word
from egrpo_fast.schedule import AffineStep, Schedule, Solver

if TYPE_CHECKING:  # a plan is integers: only its tables and the scores of its images are tensors
    import torch
    from torch import Tensor

MOST_EDGES = 2_000_000
"""Of a plan, which is held as a table: many times what any paper's setting has, and some hundred megabytes."""
ANCHOR = 0
"""The row that a plan's first trajectory lives in."""

View = tuple[tuple[int, ...], ...]
"""For every sample of a group the image rows, equally many each, whose mean reward is the sample's."""


@dataclass(frozen=True)
class Edge:
    """One affine step from a source row to a destination row: `c_x x + c_v v + sign s eps`.

    draw: the noise stream's last word (s > 0 only). sign -1 mirrors the edge of the same source, step and draw.
    history: h of a multistep tail, whose v is `v + h (v - v_before)`, v_before that of the step that made the source.
    """

    source: int
    destination: int
    step: AffineStep
    draw: int = 0
    sign: int = 1
    history: float = 0.0


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

    plain: every row of the plan takes one stochastic step, in its own place: `ops.sde_step` will do.
    A mirrored edge is without noise there: its row receives the mean, about which it then mirrors its twin's row.
    mirrors, twins int64: those rows. exact, tail int64: places in `sources` of rows outside and in their tail.
    families: of every prompt's families (`Plan.families`) that are live, its number and places int64; together `tail`.
    multistep int64 [H], multistep_rows int64 [H], history [H, 1, 1]: places of multistep sources, their rows, their h.
    kept int64 [K], kept_for int64 [K]: places whose velocity a later wave extrapolates from, and the rows it does so
    for. Each None where a wave has none.
    """

    time: float
    plain: bool
    sources: Tensor
    source_slots: Tensor
    offsets: Tensor
    destinations: Tensor
    coefficients: Tensor
    draws: Tensor
    slots: Tensor
    mirrors: Tensor | None
    twins: Tensor | None
    exact: Tensor | None
    tail: Tensor | None
    families: tuple[tuple[int, Tensor], ...]
    multistep: Tensor | None
    multistep_rows: Tensor | None
    history: Tensor | None
    kept: Tensor | None
    kept_for: Tensor | None


@dataclass(frozen=True)
class Plan:
    """The wavefront of one prompt.

    num_rows: state rows of one prompt. waves: by grid index; only steps at which some row is live. groups: at most one
    per grid index, increasing; several may share images.
    starts: rows that begin as noise, each with the sample word of its stream. extremes: of every prompt's images only
    so many best and worst ones train what led to them; 0: all do.
    """

    schedule: Schedule
    num_rows: int
    waves: tuple[Wave, ...]
    groups: tuple[Group, ...]
    starts: tuple[tuple[int, int], ...] = ((ANCHOR, 0),)
    extremes: int = 0

    def __post_init__(self) -> None:
        """ValueError where it cannot be: this guards what the author of a method may get wrong."""
        indices = [group.index for group in self.groups]
        _require(indices == sorted(set(indices)), "groups not increasing by grid index")
        for wave in self.waves:
            destinations = [edge.destination for edge in wave.edges]
            sources, where = set(wave.sources), f"grid step {wave.index}"
            _require(bool(sources), f"{where}: no row is live")
            _require(len(set(destinations)) == len(destinations), f"{where}: overlapping destinations")
            inside = all(0 <= row < self.num_rows for row in (*destinations, *sources))
            _require(inside, f"{where}: row outside the plan")
            kept = all(edge.destination == edge.source or edge.destination not in sources for edge in wave.edges)
            _require(kept, f"{where}: a source overwritten before it is read")
            twins = _twins(wave)
            mirrors = (edge for edge in wave.edges if edge.sign != 1)
            _require(all(_noise(edge) in twins for edge in mirrors), f"{where}: a mirror without its twin")
            words = [(edge.draw, edge.sign) for edge in wave.edges if edge.step.s]
            message = "two samples have the same noise; draw all samples of a step at once"
            _require(len(set(words)) == len(words), f"{where}: {message}")
        self._check_history()
        edges = {wave.index: {(e.source, e.step, e.draw, e.sign) for e in wave.edges} for wave in self.waves}
        for group in self.groups:
            where = f"the group of grid step {group.index}"
            each, rest = divmod(group.size, len(group.sources)) if group.sources else (0, 1)
            _require(
                not rest and group.size == len(group.signs), f"{where}: states left by different numbers of samples"
            )
            left = [source for source in group.sources for _ in range(each)]
            samples = {(source, group.step, *word) for source, word in zip(left, zip(group.draws, group.signs))}
            _require(samples <= edges.get(group.index, set()), f"{where}: a sample that no edge makes")
            _require(all(len(view) == group.size for view in group.views), f"{where}: a view of more or fewer samples")
        images = self.image_rows
        _require(len(set(images)) == len(images), "an image compared with two different sets of others")

    def _check_history(self) -> None:
        """Only a tail extrapolates, one velocity per row and from a step of its own: never what a group trains."""
        stepped: set[int] = set()  # rows that a step of their tail has made
        for wave, tail in zip(self.waves, self.tails):
            weights = {(edge.source, edge.history) for edge in wave.edges}
            where, extrapolating = f"grid step {wave.index}", {row for row, history in weights if history}
            _require(len(weights) == len(wave.sources), f"{where}: a source with two velocities")
            _require(extrapolating <= tail & stepped, f"{where}: history outside of a tail")
            stepped -= {edge.destination for edge in wave.edges if edge.source not in tail}
            stepped |= {edge.destination for edge in wave.edges if edge.source in tail}

    @cached_property
    def tails(self) -> tuple[frozenset[int], ...]:
        """Per wave the sources in their tail: a stochastic step is behind them, none is ahead.

        Their velocity is environment, not policy: it may be extrapolated (`Edge.history`) or of another model.
        """
        after_noise: set[int] = set()
        reached = []
        for wave in self.waves:
            reached.append(after_noise.intersection(wave.sources))
            made = {edge.destination for edge in wave.edges if edge.step.s or edge.source in after_noise}
            after_noise = after_noise - {edge.destination for edge in wave.edges} | made
        acting: set[int] = set()
        found = []
        for wave, rows in zip(reversed(self.waves), reversed(reached)):
            sources = {edge.source for edge in wave.edges if edge.step.s or edge.destination in acting}
            acting = acting - {edge.destination for edge in wave.edges} | sources
            found.append(frozenset(rows - acting))
        return tuple(reversed(found))

    @cached_property
    def families(self) -> tuple[tuple[int, ...], ...]:
        """The rows that have a tail, parted by its waves: those of a family are in the same model calls to the end."""
        waves: dict[int, list[int]] = {}
        for wave, tail in zip(self.waves, self.tails):
            for row in sorted(tail):
                waves.setdefault(row, []).append(wave.index)
        families: dict[tuple[int, ...], list[int]] = {}
        for row, taken in sorted(waves.items()):
            families.setdefault(tuple(taken), []).append(row)
        return tuple(map(tuple, families.values()))

    @property
    def tail_evaluations(self) -> int:
        """Those of one prompt's `evaluations` that are of tails."""
        return sum(map(len, self.tails))

    @cached_property
    def _compared(self) -> tuple[tuple[int, ...], ...]:
        sets = (tuple(row for rows in view for row in rows) for group in self.groups for view in group.views)
        return tuple(dict.fromkeys(sets))

    @property
    def image_rows(self) -> tuple[int, ...]:
        """Rows of the images that are rewarded, once each: one set that is compared after the other. Without groups
        every row is an image."""
        if not self.groups:
            return tuple(range(self.num_rows))
        return tuple(row for rows in self._compared for row in rows)

    def sample_rows(self, group: Group) -> tuple[int, ...]:
        """The rows that a group's samples are in after their step, in the order of its draws."""
        (wave,) = (wave for wave in self.waves if wave.index == group.index)
        made = {(edge.source, edge.draw, edge.sign): edge.destination for edge in wave.edges if edge.step.s}
        left = (source for source in group.sources for _ in range(group.size // len(group.sources)))
        return tuple(made[word] for word in zip(left, group.draws, group.signs))

    @property
    def trained_states(self) -> int:
        """States of one prompt that the update runs the model at, with gradient."""
        return sum(len(group.sources) for group in self.groups)

    def compared(self, values: Tensor) -> tuple[Tensor, ...]:
        """[..., images] in the order of `image_rows` -> one [..., n] per set of images that is compared."""
        return values.split([len(rows) for rows in self._compared], dim=-1)

    def by_group(self, values: Tensor) -> tuple[Tensor, ...]:
        """[K, P, images] -> per group [K V, P, G]: each sample's mean over its images; V views vary fastest."""
        import torch

        from egrpo_fast.host_to_device import on_device

        place = {row: i for i, row in enumerate(self.image_rows)}
        result = []
        for group in self.groups:
            views = [[[place[row] for row in rows] for rows in view] for view in group.views]
            seen = [values[..., on_device(view, values.device)].mean(-1) for view in views]
            result.append(torch.stack(seen, dim=1).flatten(0, 1))
        return tuple(result)

    def unpruned(self, scores: Tensor) -> tuple[Tensor | None, ...]:
        """Scores [P, images] -> per group bool [P, G]: samples that led to one of the `extremes`. None: all train."""
        if not self.extremes:
            return (None,) * len(self.groups)
        import torch

        order = scores.argsort(-1)
        chosen = torch.cat((order[:, : self.extremes], order[:, -self.extremes :]), -1)
        kept = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        return tuple(share.sum(0) > 0 for share in self.by_group(kept[None]))

    @property
    def evaluations(self) -> int:
        """Model evaluations of one prompt's rollout, without gradient."""
        return sum(len(wave.sources) for wave in self.waves)

    @property
    def evaluations_alone(self) -> int:
        """What sampling every image by itself would take: one for each of its steps from the noise on."""
        came_from = [{edge.destination: edge.source for edge in wave.edges} for wave in reversed(self.waves)]
        count = 0
        for row in self.image_rows:
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
        tables = []
        later: dict[int, float] = {}  # by row the h that its velocity of now is used with when it is read next
        for wave, tail in zip(reversed(self.waves), reversed(self.tails)):
            tables.append(self._table(wave, tail, later, num_prompts, device, dtype))
            later |= {edge.source: edge.history for edge in wave.edges}
        return tuple(reversed(tables))

    def _table(
        self,
        wave: Wave,
        tail: Set[int],
        later: Mapping[int, float],
        num_prompts: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> WaveTable:
        import torch

        from egrpo_fast.host_to_device import on_device

        edges = [(slot, edge) for slot in range(num_prompts) for edge in wave.edges]
        count = Counter(edge.source for edge in wave.edges)
        degrees = [count[source] for source in wave.sources]
        twins = _twins(wave)
        mirrored = [
            (slot * self.num_rows + edge.destination, slot * self.num_rows + twins[_noise(edge)])
            for slot, edge in edges
            if edge.sign < 0
        ]

        places = [
            (slot * len(wave.sources) + place, slot * self.num_rows, source)
            for slot in range(num_prompts)
            for place, source in enumerate(wave.sources)
        ]
        weights = {edge.source: edge.history for edge in wave.edges}
        multistep = [(place, first + source) for place, first, source in places if weights[source]]
        history = [weights[source] for *_, source in places if weights[source]]
        kept = [
            (place, first + edge.destination)
            for place, first, source in places
            for edge in wave.edges
            if edge.source == source and later.get(edge.destination)
        ]

        families = {
            slot * len(self.families) + number: [slot * len(wave.sources) + wave.sources.index(row) for row in rows]
            for slot in range(num_prompts)
            for number, rows in enumerate(self.families)
            if tail >= set(rows)
        }

        def words(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return on_device(values, device, dtype)

        def indices(values: Iterable[int]) -> Tensor | None:
            found = list(values)
            return words(found, torch.int64) if found else None

        members = indices(chain.from_iterable(families.values()))
        in_place = [edge.source for edge in wave.edges if edge.source == edge.destination]
        return WaveTable(
            time=wave.time,
            plain=in_place == [*range(self.num_rows)] and not mirrored and any(edge.step.s for edge in wave.edges),
            sources=words([slot * self.num_rows + source for slot in range(num_prompts) for source in wave.sources]),
            source_slots=words([slot for slot in range(num_prompts) for _ in wave.sources], torch.int64),
            offsets=words([0, *torch.tensor(degrees * num_prompts).cumsum(0).tolist()]),
            destinations=words([slot * self.num_rows + edge.destination for slot, edge in edges]),
            coefficients=on_device(
                [(edge.step.c_x, edge.step.c_v, edge.step.s if edge.sign > 0 else 0.0) for _, edge in edges],
                device,
                dtype,
            ),
            draws=words([edge.draw for _, edge in edges], torch.int64),
            slots=words([slot for slot, _ in edges]),
            mirrors=indices(row for row, _ in mirrored),
            twins=indices(row for _, row in mirrored),
            exact=indices(place for place, _, source in places if source not in tail),
            tail=indices(place for place, _, source in places if source in tail),
            families=tuple(zip(families, members.split([*map(len, families.values())]))) if members is not None else (),
            multistep=indices(place for place, _ in multistep),
            multistep_rows=indices(row for _, row in multistep),
            history=on_device(history, device, dtype).reshape(-1, 1, 1) if history else None,
            kept=indices(place for place, _ in kept),
            kept_for=indices(row for _, row in kept),
        )


def _require(right: bool, wrong: str) -> None:
    if not right:
        raise ValueError(f"plan: {wrong}")


def _noise(edge: Edge) -> tuple[int, AffineStep, int]:
    """What a mirrored edge has in common with the one that it mirrors."""
    return edge.source, edge.step, edge.draw


def _twins(wave: Wave) -> dict[tuple[int, AffineStep, int], int]:
    """By `_noise`, the destination of every edge that may be mirrored."""
    return {_noise(edge): edge.destination for edge in wave.edges if edge.sign == 1}


def tail_grid(start: int, num_steps: int, stride: int) -> list[int]:
    """Grid indices of an ODE tail: start, start + stride, ..., num_steps; the last stride may be shorter."""
    return [*range(start, num_steps, stride), num_steps]


def singly(rows: Sequence[int]) -> View:
    """The view in which every sample gets the reward of its own image."""
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


class PlanTooLargeError(ValueError):
    """A plan of more edges than this program holds; nothing was drawn."""


class PlanBuilder:
    """A plan in the making: rows are begun, stepped on, branched and trained, in any order; then it is a `Plan`.

    antithetic: samples of one state come in pairs that share their noise with opposite signs; an odd one is alone.
    """

    def __init__(self, schedule: Schedule, antithetic: bool = False) -> None:
        self._schedule, self._antithetic, self._num_rows, self._num_edges = schedule, antithetic, 0, 0
        self._edges: list[list[Edge]] = [[] for _ in range(schedule.num_steps)]
        self._groups: list[Group] = []
        self._starts: list[tuple[int, int]] = []

    def _add(self, index: int, count: int, edges: Iterable[Edge]) -> None:
        """`count` edges that start at a grid index."""
        self._num_edges += count
        if self._num_edges > MOST_EDGES:
            raise PlanTooLargeError(f"more than {MOST_EDGES:,} steps of samples in one iteration of a prompt")
        self._edges[index] += edges

    def _rows(self, count: int) -> tuple[int, ...]:
        self._num_rows += count
        return tuple(range(self._num_rows - count, self._num_rows))

    def start(self, sample: int = 0) -> int:
        """A new row that begins as noise; rows of equal `sample` begin as the same."""
        (row,) = self._rows(1)
        self._starts.append((row, sample))
        return row

    def ode(
        self,
        rows: Sequence[int],
        start: int,
        end: int,
        stride: int = 1,
        fork: bool = False,
        solver: Solver = "euler",
    ) -> tuple[int, ...]:
        """Deterministic steps of `rows` from grid index `start` to `end`. Returns their rows: with `fork` new ones.

        The first has no history, so it is an Euler step with every solver.
        """
        here, before = tuple(rows), start
        for index, following in pairwise(tail_grid(start, end, stride) if start < end else ()):
            there = self._rows(len(here)) if fork and index == start else here
            step, h = self._schedule.ode(index, following), 0.0
            if index > start:
                h = self._schedule.extrapolation(solver, before, index, following)
            self._add(index, len(here), (Edge(source, row, step, history=h) for source, row in zip(here, there)))
            here, before = there, index
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
                # A mirrored sample has its twin's noise: that of the sample before it.
                draws.append(draws[-1] if mirrored else draw_word(index, len(draws)))
                signs.append(-1 if mirrored else 1)
        left = [source for source in sources for _ in range(each)]
        self._add(index, len(rows), (Edge(*sample) for sample in zip(left, rows, [step] * len(rows), draws, signs)))
        return Samples(index, step, tuple(sources), tuple(rows), tuple(draws), tuple(signs))

    def train(self, samples: Samples, *views: View, weight: float = 1.0) -> None:
        """Make a group of the samples."""
        index, time = samples.index, self._schedule.times[samples.index]
        group = Group(index, time, samples.step, samples.sources, samples.draws, samples.signs, views, weight)
        self._groups.append(group)

    def plan(self, extremes: int = 0) -> Plan:
        waves = tuple(
            Wave(index, self._schedule.times[index], tuple(sorted(edges, key=lambda edge: edge.source)))
            for index, edges in enumerate(self._edges)
            if edges
        )
        groups = tuple(sorted(self._groups, key=lambda group: group.index))
        return Plan(self._schedule, self._num_rows, waves, groups, tuple(self._starts), extremes)


def ode_plan(schedule: Schedule) -> Plan:
    """One deterministic trajectory per prompt, all the way: what an evaluation samples."""
    draft = PlanBuilder(schedule)
    draft.ode([draft.start()], 0, schedule.num_steps)
    return draft.plan()
