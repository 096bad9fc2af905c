"""Runs a plan over a velocity callable: one batched model call per grid step, then one op that makes every next state.

Knows no model: any `velocity(latents[R, L, C], t, rows[R]) -> [R, L, C]` will do, an analytic flow included.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from egrpo_fast import noise
from egrpo_fast.host_to_device import on_device
from egrpo_fast.ops import Ops
from egrpo_fast.plan import Group, Plan, Wave, WaveTable

Velocity = Callable[[Tensor, float, Tensor], Tensor]
"""velocity(latents [R, L, C], t, rows int64 [R]) -> [R, L, C]; rows: which of the run's prompts each row is of."""


class Cache(Protocol):
    """What a tail's model keeps of a call for the next one of the same rows, so as to compute less in that."""

    def sequence(self, family: int, chunk: int) -> AbstractContextManager[Any]:
        """Entered for each call; those of equal numbers have the same rows in the same order, step after step."""

    def forget(self) -> None:
        """Keep nothing: the run has ended, or failed."""


@dataclass(frozen=True)
class TailVelocity:
    """Another model for rows in their tail (`Plan.tails`), in calls of its own.

    cache: of that model, whose calls are then of one family (`Plan.families`) of one prompt each.
    """

    velocity: Velocity
    cache: Cache | None = None


@dataclass(frozen=True)
class NoiseKey:
    """What, with a plan's draws, names every noise stream of a rollout. prompts: int64 [P] on the rollout's device."""

    seed: int
    iteration: int
    prompts: Tensor

    def streams(self, group: Group) -> Tensor:
        """Streams of a group's samples, int64 [P, G, 3]."""
        return noise.streams(self.iteration, self.prompts, on_device(group.draws, self.prompts.device))


@dataclass(frozen=True)
class Rollout:
    """What a rollout of P prompts leaves behind.

    states, velocities: per group [P * S, L, C], the S states that each prompt's samples left, and the velocities that
    the rollout left them with.
    final_latents: [P, images, L, C] in the order of `plan.image_rows`.
    samples: per group [P * G, L, C], where the stochastic step led, if they were kept. Else (None) their noise can be
    replayed.
    """

    plan: Plan
    key: NoiseKey
    states: tuple[Tensor, ...]
    velocities: tuple[Tensor, ...]
    final_latents: Tensor
    samples: tuple[Tensor, ...] | None = None


class Wavefront:
    """A plan made ready for `num_prompts` prompts at a time: tables and row buffers, reused as long as they fit.

    shape: (tokens, channels) of one image. dtype: of the state, float32 (float64 in tests). model_dtype: what the
    model reads. micro_batch: most rows of one model call; None: all live rows. keep_samples: in `Rollout.samples`.
    """

    def __init__(
        self,
        plan: Plan,
        num_prompts: int,
        shape: tuple[int, int],
        ops: Ops,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        model_dtype: torch.dtype = torch.float32,
        micro_batch: int | None = None,
        keep_samples: bool = False,
    ) -> None:
        self._keep_samples = keep_samples
        self.num_prompts, self.shape, self.ops, self.micro_batch = num_prompts, shape, ops, micro_batch
        self._device, self._dtype, self._model_dtype = device, dtype, model_dtype
        self._waves: tuple[Wave, ...] | None = None
        self._latents = torch.empty(0, *shape, dtype=dtype, device=device)
        self.use(plan)

    def use(self, plan: Plan) -> None:
        """Run this plan from now on. What it shares with the one before, tables or buffers, is not made again."""
        self.plan = plan
        if self._waves != plan.waves or len(self._latents) != self.num_prompts * plan.num_rows:
            self._waves, self.tables = plan.waves, plan.tables(self.num_prompts, self._device, self._dtype)
        if len(self._latents) != self.num_prompts * plan.num_rows:
            self._latents = self._latents.new_empty(self.num_prompts * plan.num_rows, *self.shape)
            self._before: Tensor | None = None
            # Where the model reads the state's own dtype there is nothing to copy.
            same = self._model_dtype == self._dtype
            self._copy = None if same else torch.empty_like(self._latents, dtype=self._model_dtype)
        if self._before is None and any(table.kept is not None for table in self.tables):
            self._before = torch.empty_like(self._latents, dtype=self._model_dtype)
        self._image_rows = self._index(plan.image_rows)
        waves = {wave.index: wave.sources for wave in plan.waves}
        # By grid index: the rows of a group's states, and their places among their wave's sources.
        self._left = {
            group.index: (
                self._index(group.sources), self._index([waves[group.index].index(row) for row in group.sources])
            )
            for group in plan.groups
        }  # fmt: skip
        self._samples = {group.index: self._index(plan.sample_rows(group)) for group in plan.groups}

    def _index(self, rows: Sequence[int]) -> Tensor:
        return on_device(rows, self._device, torch.int64)

    def rows_per_call(self, tail: TailVelocity | None = None) -> int:
        """Most rows of one model call of a run, with that tail."""
        rows = [self.num_prompts * len(wave.sources) for wave in self.plan.waves]
        if tail is not None and tail.cache is not None:
            rows = [count - self.num_prompts * len(in_tail) for count, in_tail in zip(rows, self.plan.tails)]
            rows += [len(family) for family in self.plan.families]
        return min(self.micro_batch or max(rows), max(rows))

    def _velocity(self, velocity: Velocity, tail: TailVelocity | None, table: WaveTable) -> Tensor:
        """[S, L, C] at the wave's sources; of rows in their tail by its model, where there is one."""
        if tail is None or table.tail is None:
            return self._call(velocity, table)
        parts = [] if table.exact is None else [(table.exact, self._call(velocity, table, table.exact))]
        if tail.cache is None:
            parts.append((table.tail, self._call(tail.velocity, table, table.tail)))
        else:
            parts += [
                (places, self._call(tail.velocity, table, places, partial(tail.cache.sequence, family)))
                for family, places in table.families
            ]
        (_, v), *more = parts
        if more:
            v = v.new_empty(len(table.sources), *self.shape)
            for places, part in parts:
                v[places] = part.to(v.dtype)
        return v

    def _call(
        self,
        velocity: Velocity,
        table: WaveTable,
        places: Tensor | None = None,
        sequence: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """[N, L, C] at these of the wave's sources, or at all. sequence(n): entered for the n-th call that it takes."""
        sources, slots = table.sources, table.source_slots
        if places is not None:
            sources, slots = sources[places], slots[places]
        readable = self._latents if self._copy is None else self._copy
        size = self.micro_batch or len(sources)
        chunks = []
        for chunk, (some, rows) in enumerate(zip(sources.split(size), slots.split(size))):
            with sequence(chunk):
                chunks.append(velocity(readable[some], table.time, rows))
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _extrapolate(self, v: Tensor, table: WaveTable) -> Tensor:
        """Multistep tails: `v + h (v - v_before)` where a source has history; v is kept for the steps that need it."""
        used = v
        if table.multistep is not None:
            assert self._before is not None and table.history is not None
            now = v[table.multistep].to(self._latents.dtype)
            used = v.clone()
            used[table.multistep] = (now + table.history * (now - self._before[table.multistep_rows])).to(v.dtype)
        if table.kept is not None:
            assert self._before is not None
            self._before[table.kept_for] = v[table.kept].to(self._before.dtype)
        return used

    @property
    def _by_prompt(self) -> Tensor:
        return self._latents.unflatten(0, (self.num_prompts, self.plan.num_rows))

    def _step(self, v: Tensor, table: WaveTable, key: NoiseKey) -> None:
        """From velocities [S, L, C] at a wave's sources to the next state of every row.

        `sde_step` where no row branches, as in Flow-GRPO's trajectories; else `branch_rows`.
        """
        if table.plain and self.ops.chosen["sde_step"] == self.ops.chosen["branch_rows"]:
            streams = noise.streams_of(key.iteration, key.prompts[table.slots], table.draws)
            self._latents, copy = self.ops.sde_step(
                self._latents, v, table.coefficients, streams, key.seed, self._model_dtype
            )
            self._copy = None if self._copy is None else copy
            return
        self.ops.branch_rows(
            self._latents, self._copy, v, table.sources, table.offsets, table.destinations, table.coefficients,
            table.draws, table.slots, key.prompts, key.iteration, key.seed,
        )  # fmt: skip
        self._mirror(table)

    def _mirror(self, table: WaveTable) -> None:
        """Antithetic samples: `mean - s eps = 2 mean - (mean + s eps)`, where `branch_rows` has left the mean."""
        if table.mirrors is not None:
            mirrored = 2.0 * self._latents[table.mirrors] - self._latents[table.twins]
            self._latents[table.mirrors] = mirrored
            if self._copy is not None:
                self._copy[table.mirrors] = mirrored.to(self._copy.dtype)

    @torch.no_grad()
    def run(
        self,
        velocity: Velocity,
        key: NoiseKey,
        noise_step: int = noise.INITIAL,
        tail: TailVelocity | None = None,
    ) -> Rollout:
        """Roll the plan out from the prompts' initial noise (stream word `noise_step`) to the images.

        tail: another model for rows in their tail; None: the same.
        Between host and device nothing is copied and nothing is waited for.
        """
        plan, num_prompts = self.plan, self.num_prompts
        assert len(key.prompts) == num_prompts
        for row, sample in plan.starts:
            self._by_prompt[:, row] = noise.initial_noise(
                key.seed, key.iteration, key.prompts, self._latents.shape[1:], self._latents.dtype, noise_step, sample
            )
        if self._copy is not None:
            self._copy.copy_(self._latents)

        states, velocities, samples = [], [], []
        try:
            for wave, table in zip(plan.waves, self.tables):
                v = self._velocity(velocity, tail, table)
                if wave.index in self._left:
                    rows, places = self._left[wave.index]
                    states.append(self._by_prompt[:, rows].flatten(0, 1))
                    velocities.append(v.unflatten(0, (num_prompts, -1))[:, places].flatten(0, 1))
                self._step(self._extrapolate(v, table), table, key)
                if self._keep_samples and wave.index in self._samples:
                    samples.append(self._by_prompt[:, self._samples[wave.index]].flatten(0, 1))
        finally:
            if tail is not None and tail.cache is not None:
                tail.cache.forget()

        return Rollout(
            plan=plan,
            key=key,
            states=tuple(states),
            velocities=tuple(velocities),
            final_latents=self._by_prompt[:, self._image_rows],
            samples=tuple(samples) if self._keep_samples else None,
        )


def find_micro_batch(seconds: Callable[[int], float], most: int) -> int:
    """Rows per model call, by trial: doubled from 1 up to `most`, until the memory is full or more rows gain nothing.

    seconds: what a call of so many rows takes. Nothing gained: less than 3% of the time per row.
    """
    best, per_row = 1, seconds(1)
    while best < most:
        rows = min(2 * best, most)
        try:
            now = seconds(rows) / rows
        except torch.OutOfMemoryError:
            break
        if now > 0.97 * per_row:
            break
        best, per_row = rows, now
    return best
