"""Which rows live at which grid step, where they branch and which model calls are made: a static table.

One prompt has a fixed set of state rows: row 0 is the anchor, then one row per sample. At every grid step each live row
is the *source* of one or more *edges*, affine steps to a destination row (its own next state, or a branch). All live
rows of a wavefront step share its time, so a step is one batched model call, whatever the number of branches.
A method is a function that makes a plan; `e_grpo_plan` is the paper's.
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


@dataclass(frozen=True)
class Edge:
    """One affine step from a source row to a destination row; `draw` is the noise stream's last word (s > 0 only)."""

    source: int
    destination: int
    step: AffineStep
    draw: int = 0


@dataclass(frozen=True)
class Group:
    """Samples that left one shared state by the same stochastic step: what an advantage is measured within.

    index, time: of the active step. source: row of the shared state. rows: row of each sample's picture.
    draws: noise stream word of each sample.
    """

    index: int
    time: float
    source: int
    step: AffineStep
    rows: tuple[int, ...]
    draws: tuple[int, ...]


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
    """A wave's edges for several prompts in compressed rows, as `ops.branch_rows` takes them (see there)."""

    time: float
    sources: Tensor
    source_slots: Tensor
    offsets: Tensor
    destinations: Tensor
    coefficients: Tensor
    draws: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Plan:
    """The wavefront of one prompt.

    num_rows: state rows of one prompt. waves: by grid index; only steps at which some row is live. groups: at most one
    per grid index, increasing. anchor_picture: whether the anchor is carried to t = 0.
    """

    schedule: Schedule
    num_rows: int
    waves: tuple[Wave, ...]
    groups: tuple[Group, ...]
    anchor_picture: bool

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

    @property
    def picture_rows(self) -> tuple[int, ...]:
        """Rows of the pictures that are rewarded, group by group."""
        return tuple(row for group in self.groups for row in group.rows)

    def by_group(self, values: Tensor) -> tuple[Tensor, ...]:
        """[..., pictures] in the order of `picture_rows` -> one [..., G_n] per group."""
        return values.split([len(group.rows) for group in self.groups], dim=-1)

    @property
    def evaluations(self) -> int:
        """Model evaluations of one prompt's rollout, without gradient."""
        return sum(len(wave.sources) for wave in self.waves)

    def tables(self, num_prompts: int, device: torch.device | str, dtype: torch.dtype) -> tuple[WaveTable, ...]:
        """Every wave's table for `num_prompts` prompts; prompt p owns rows p * num_rows onwards. Made once per run.

        Right because the plan is (`__post_init__`); ValueError where its rows are more than 32-bit indices name.
        """
        if num_prompts * self.num_rows >= 2**31:
            raise ValueError(f"num_prompts: {num_prompts} prompts of {self.num_rows} rows, allowed: below 2^31 in all")
        return tuple(self._table(wave, num_prompts, device, dtype) for wave in self.waves)

    def _table(self, wave: Wave, num_prompts: int, device: torch.device | str, dtype: torch.dtype) -> WaveTable:
        edges = [(slot, edge) for slot in range(num_prompts) for edge in wave.edges]
        degrees = [sum(edge.source == source for edge in wave.edges) for source in wave.sources]

        def words(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return WaveTable(
            time=wave.time,
            sources=words([slot * self.num_rows + source for slot in range(num_prompts) for source in wave.sources]),
            source_slots=words([slot for slot in range(num_prompts) for _ in wave.sources], torch.int64),
            offsets=words([0, *torch.tensor(degrees * num_prompts).cumsum(0).tolist()]),
            destinations=words([slot * self.num_rows + edge.destination for slot, edge in edges]),
            coefficients=torch.tensor(
                [(edge.step.c_x, edge.step.c_v, edge.step.s) for _, edge in edges], dtype=dtype, device=device
            ),
            draws=words([edge.draw for _, edge in edges], torch.int64),
            slots=words([slot for slot, _ in edges]),
        )


def tail_grid(start: int, num_steps: int, stride: int) -> list[int]:
    """Grid indices of an ODE tail: start, start + stride, ..., num_steps; the last stride may be shorter."""
    return [*range(start, num_steps, stride), num_steps]


def e_grpo_plan(
    schedule: Schedule,
    group_sizes: Sequence[int],
    tail_strides: Sequence[int],
    anchor_picture: bool = False,
) -> Plan:
    """E-GRPO (paper, Algorithm 1): at every active step G_n samples leave the anchor by one merged SDE step, then ODE.

    group_sizes, tail_strides: one number per active step. The anchor stops after its last active step unless its
    picture is wanted.
    """
    num_steps = schedule.num_steps
    edges: list[list[Edge]] = [[] for _ in range(num_steps)]
    anchor_end = num_steps if anchor_picture else max(schedule.active)
    for index in range(anchor_end):
        edges[index].append(Edge(ANCHOR, ANCHOR, schedule.ode(index, index + 1)))

    groups = []
    next_row = ANCHOR + 1
    for index, size, stride in zip(schedule.active, group_sizes, tail_strides, strict=True):
        length = schedule.merges[index]
        rows = tuple(range(next_row, next_row + size))
        next_row += size
        draws = tuple(draw_word(index, sample) for sample in range(size))
        group = Group(index, schedule.times[index], ANCHOR, schedule.sde(index, length), rows, draws)
        groups.append(group)
        edges[index] += [Edge(ANCHOR, row, group.step, draw) for row, draw in zip(rows, group.draws)]
        grid = tail_grid(index + length, num_steps, stride)
        for here, there in pairwise(grid):
            edges[here] += [Edge(row, row, schedule.ode(here, there)) for row in rows]

    waves = tuple(
        Wave(index, schedule.times[index], tuple(sorted(step_edges, key=lambda edge: edge.source)))
        for index, step_edges in enumerate(edges)
        if step_edges
    )
    return Plan(schedule, next_row, waves, tuple(groups), anchor_picture)


def ode_plan(schedule: Schedule) -> Plan:
    """One deterministic trajectory per prompt, all the way: what an evaluation samples."""
    steps = range(schedule.num_steps)
    waves = (Wave(i, schedule.times[i], (Edge(ANCHOR, ANCHOR, schedule.ode(i, i + 1)),)) for i in steps)
    return Plan(schedule, 1, tuple(waves), (), anchor_picture=True)
