"""Prompts to experience: the current policy's samples, rolled out by a plan, decoded and scored."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from egrpo_fast import noise
from egrpo_fast.config import Config, plan_of
from egrpo_fast.distributed.background import BackgroundWorker
from egrpo_fast.distributed.engine import Engine
from egrpo_fast.distributed.world import World
from egrpo_fast.host_to_device import on_device
from egrpo_fast.models.tail_check import TailGuard, compare
from egrpo_fast.objective import Objective
from egrpo_fast.plan import ode_plan
from egrpo_fast.policy import Policy
from egrpo_fast.prompts.order import Prompt
from egrpo_fast.rewards import Reward, RewardError, fill_dropped, score, score_or_nan
from egrpo_fast.rollout import NoiseKey, Rollout, TailVelocity, Velocity, Wavefront, find_micro_batch
from egrpo_fast.runs.metrics import Stopwatch
from egrpo_fast.runs.progress import OutOfMemory, Progress
from egrpo_fast.runs.report import HeldOut, Sample
from egrpo_fast.schedule import make_schedule


@dataclass(frozen=True)
class Experience:
    """A scored rollout of one wavefront. rewards [K, P, images]: K trained ones; dropped []: share of samples.

    finite []: whether all latents and rewards are.
    """

    prompts: tuple[str, ...]
    rollout: Rollout
    conditioning: Any
    rewards: Tensor
    dropped: Tensor
    finite: Tensor


@dataclass(frozen=True)
class TailCheck:
    """What the exact tail says of an approximated one's samples, on every rank. correlations: of all ranks' groups."""

    correlations: list[float]
    metrics: dict[str, float]


class Sampler:
    """Samples with the engine's weights, on all ranks together. Its `state`, what it knows of its tail, is kept."""

    def __init__(
        self,
        config: Config,
        world: World,
        progress: Progress,
        engine: Engine,
        policy: Policy,
        rewards: dict[str, Reward],
        objective: Objective,
    ) -> None:
        self.config, self._world, self._progress, self._engine = config, world, progress, engine
        self.policy, self.rewards, self._objective = policy, rewards, objective
        policy.before_call = progress.at_model_call
        self._trained = [reward.name for reward in config.rewards if reward.weight]
        self._buffers: dict[str, Any] = {
            "shape": policy.latent_shape,
            "ops": objective.ops,
            "device": world.device,
            "model_dtype": policy.dtype,
            "micro_batch": config.rollout.most_rows,
        }
        keep = config.objective.log_prob == "stored"
        self.wavefront = Wavefront(
            plan_of(config, 0), config.rollout.prompts_per_rollout, **self._buffers, keep_samples=keep
        )
        self._held_out: Wavefront | None = None
        self.beside = BackgroundWorker(world.device) if config.rollout.overlap else None
        self._tail_guard = TailGuard(config.tail)

    @property
    def state(self) -> dict[str, Any]:
        return self._tail_guard.state

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._tail_guard.state = state

    def sample(self, prompts: Sequence[Prompt]) -> list[Experience]:
        """Roll out and score this rank's prompts of the iteration under way."""
        if exact := self._tail_guard.fallen:
            self.policy.tail = None
        self.wavefront.use(plan_of(self.config.with_tail() if exact else self.config, self._progress.iteration))
        size = self.config.rollout.prompts_per_rollout
        chunks = list(_chunks([prompt.text for prompt in prompts], size))
        numbers = on_device([prompt.number for prompt in prompts], self._world.device)
        with self._progress.phase("rollout"):
            conditionings = [self.policy.encode(chunk) for chunk in chunks]
            rollouts: list[Rollout] = []
            scored: list[Callable[[], tuple[Tensor, Tensor]]] = []
            with (
                self._weights() as module,
                self.policy.tail_follows(module),
            ):
                for chunk, conditioning, some in zip(chunks, conditionings, numbers.split(size)):
                    if self.config.rollout.max_rows_per_call == "auto" and self.wavefront.micro_batch is None:
                        self.wavefront.micro_batch = self._find_micro_batch(module, conditioning)
                    key = NoiseKey(self.config.seed, self._progress.iteration, some)
                    velocity, tail = self.policy.velocity(conditioning, module), self.policy.tail_velocity(conditioning)
                    rollout = self._roll_out(self.wavefront, velocity, key, tail=tail)
                    rollouts.append(rollout)
                    scoring = partial(self._score, rollout, chunk, tiny=not exact)
                    scored.append(self.beside.begin(scoring) if self.beside else scoring)
        # The gathered weights are given back before the images need their memory, where they are not scored beside.
        with self._progress.phase("rewards"):
            batch = []
            for rollout, conditioning, chunk, scores in zip(rollouts, conditionings, chunks, scored):
                rewards, dropped = scores()
                finite = rollout.final_latents.isfinite().all() & rewards.isfinite().all()
                batch.append(Experience(tuple(chunk), rollout, conditioning, rewards, dropped, finite))
            return batch

    def check_tail(self, experience: Experience) -> TailCheck | None:
        """Every `tail.check_every` iterations: the same samples finished by the exact tail, and what both rewards say.

        A small sample, one wavefront of every rank. Changes nothing: `judge_tail` does, once the iteration is done.
        """
        if not self._tail_guard.due(self._progress.iteration):
            return None
        with self._progress.phase("tail check"):
            plan = plan_of(self.config.with_tail(), self._progress.iteration)
            self.wavefront.use(plan)
            with self._weights() as module:
                velocity = self.policy.velocity(experience.conditioning, module)
                rollout = self._roll_out(self.wavefront, velocity, experience.rollout.key)
            exact, _ = self._score(rollout, experience.prompts)
            if self._world.max_on_host(not exact.isfinite().all()):
                return TailCheck([], {"tail/not_finite": 1.0})
            found = compare(plan, self._objective, exact, experience.rewards)
            correlations = [one for rank in self._world.gather(found.correlations.flatten().tolist()) for one in rank]
            flips, bias = self._world.mean(torch.stack((found.flips.mean(), found.bias))).tolist()
        known = [value for value in correlations if not math.isnan(value)]
        correlation = {"tail/rank_correlation": sum(known) / len(known)} if known else {}
        return TailCheck(correlations, {"tail/sign_flips": flips, "tail/reward_bias": bias} | correlation)

    def judge_tail(self, check: TailCheck) -> tuple[dict[str, float], str | None]:
        """The same verdict on every rank. Returns metrics, and why the tail is exact from now on, if it is."""
        message = self._tail_guard.judge(check.correlations) if check.correlations else None
        return check.metrics | {"tail/exact": float(self._tail_guard.fallen)}, message

    def evaluate(self, prompts: Sequence[str]) -> HeldOut:
        """Every reward on these prompts, each from its own fixed noise, whatever the ranks and batches."""
        settings, rank = self.config.evaluation, self._world.rank
        names = [reward.name for reward in self.config.rewards]
        if self._held_out is None:
            size = min(settings.batch_size, -(-len(prompts) // self._world.size))
            steps = settings.num_inference_steps
            plan = ode_plan(make_schedule(steps, self.policy.times(steps, self.config.schedule.shift)))
            self._held_out = Wavefront(plan, size, **self._buffers)
        size = self._held_out.num_prompts
        # Every rank makes the same number of calls: the last ones are filled up with prompts that do not count.
        total = -(-len(prompts) // (size * self._world.size)) * size * self._world.size
        mine = list(_chunks(range(rank, total, self._world.size), size))
        scored: list[tuple[int, list[float]]] = []
        shown: list[tuple[int, Tensor]] = []
        with self._progress.phase("evaluation"):
            latents = []
            with self._weights() as module:
                for chunk in mine:
                    places = [place % len(prompts) for place in chunk]
                    velocity = self.policy.velocity(self.policy.encode([prompts[place] for place in places]), module)
                    key = NoiseKey(self.config.seed, 0, on_device(places, self._world.device))
                    latents.append(self._roll_out(self._held_out, velocity, key, noise.EVALUATION).final_latents[:, 0])
            # As in `sample`, the images get the memory of the gathered weights.
            for chunk, some in zip(mine, latents):
                images, texts = self.policy.decode(some), [prompts[place % len(prompts)] for place in chunk]
                scores = torch.stack([self._call(name, images, texts, drop=True) for name in names], dim=1)
                for place, row, image in zip(chunk, scores.tolist(), images):
                    if place < len(prompts):
                        scored.append((place, row))
                    if place < min(settings.grid_images, len(prompts)):
                        shown.append((place, image.cpu()))
        every = [row for _, row in sorted(pair for rank in self._world.gather(scored) for pair in rank)]
        means = torch.tensor(every, dtype=torch.float64).nanmean(0).tolist()
        if failed := [name for name, mean in zip(names, means) if math.isnan(mean)]:
            raise RewardError(f"rewards.{failed[0]}: scored none of the held-out images")
        collected = sorted((pair for rank in self._world.gather(shown) for pair in rank), key=lambda pair: pair[0])
        grid = torch.stack([image for _, image in collected]) if self._world.is_main else None
        return HeldOut(dict(zip(names, means)), grid)

    def samples(self, batch: Sequence[Experience]) -> list[Sample]:
        """Of the first prompts the images with the highest and the lowest mixed reward, decoded once more; on rank 0.

        Every `samples.every` iterations, and in the first.
        """
        settings, done = self.config.samples, self._progress.iteration
        if not settings.every or (done != 1 and done % settings.every) or not self._world.is_main:
            return []
        found: list[Sample] = []
        for experience in batch:
            mixed = self._objective.mixed(experience.rewards)
            for p, prompt in enumerate(experience.prompts[: settings.prompts - len(found) // 2]):
                at = torch.stack((mixed[p].argmax(), mixed[p].argmin()))
                images = self.policy.decode(experience.rollout.final_latents[p, at], not self._tail_guard.fallen)
                for place, image, scores in zip(("best", "worst"), images, experience.rewards[:, p, at].T.tolist()):
                    found.append(Sample(prompt, place, dict(zip(self._trained, scores)), image))
        return found

    def statistics(self, batch: Sequence[Experience]) -> tuple[dict[str, float], dict[str, dict[int, float]]]:
        """Over all ranks: each reward's mean and spread, how far images that are compared lie apart (the standard
        deviation of their latents), and each reward's spread within every group, by reward and grid index.

        By the last group sizes can be dealt.
        """
        plan = batch[0].rollout.plan
        rewards = torch.cat([experience.rewards for experience in batch], dim=1)
        spread = torch.stack([images.std(-1).mean(-1) for images in plan.compared(rewards)]).mean(0)
        by_step = torch.stack(
            [values.std(-1).unflatten(0, (len(rewards), -1)).mean((1, 2)) for values in plan.by_group(rewards)]
        )
        latents = torch.cat([experience.rollout.final_latents for experience in batch]).float().movedim(1, -1)
        apart = torch.stack([images.std(-1).mean() for images in plan.compared(latents)]).mean()
        found = torch.cat((torch.stack((rewards.mean((1, 2)), spread)), by_step))
        told = self._world.mean(torch.cat((apart[None], found.flatten())))
        means, spreads, *of_steps = told[1:].unflatten(0, found.shape).tolist()
        values = {f"reward/{name}": value for name, value in zip(self._trained, means)} | {
            f"reward_spread/{name}": value for name, value in zip(self._trained, spreads)
        }
        values["latent_spread"] = told[0].item()
        if self.config.objective.on_error == "drop":
            dropped = torch.stack([experience.dropped for experience in batch]).mean()
            values["dropped_share"] = self._world.mean(dropped).item()
        steps = [group.index for group in plan.groups]
        return values, {
            name: {step: value for step, value in zip(steps, column) if math.isfinite(value)}
            for name, column in zip(self._trained, zip(*of_steps))
        }

    def _weights(self) -> contextlib.AbstractContextManager[nn.Module]:
        return self._engine.inference(self.config.rollout.parameters == "gathered")

    def _roll_out(
        self,
        wavefront: Wavefront,
        velocity: Velocity,
        key: NoiseKey,
        noise_step: int = noise.INITIAL,
        tail: TailVelocity | None = None,
    ) -> Rollout:
        """A wavefront on every rank. Where one runs out of memory, all begin again with half the rows per model call.

        The others hear of it at their next call, or after the last; a rollout is a function of its key, so it comes
        out the same. Sharded weights are collected within a call, which nobody can leave alone: there it ends the run.
        """
        alone = self._world.size == 1 or not self._engine.sharded or self.config.rollout.parameters == "gathered"
        while True:
            with contextlib.suppress(OutOfMemory):
                try:
                    rollout = wavefront.run(velocity, key, noise_step, tail)
                except torch.OutOfMemoryError:
                    if not alone or wavefront.rows_per_call(tail) == 1:
                        raise
                    self._progress.check_shutdown(out_of_memory=True)
                if alone:
                    self._progress.check_shutdown()
                return rollout
            rows = wavefront.rows_per_call(tail)
            wavefront.micro_batch = rows // 2
            if self._world.device.type == "cuda":
                torch.cuda.empty_cache()
            if self._world.is_main:
                message = f"out of memory with {rows} rows per model call; goes on with {rows // 2}"
                warnings.warn(f"rollout.max_rows_per_call: {message}", stacklevel=2)

    def _find_micro_batch(self, module: nn.Module, conditioning: Any) -> int:
        """What `rollout.max_rows_per_call: auto` is, on the rank that can take least."""
        self._progress.at("finding rollout.max_rows_per_call")
        shape, device = self.wavefront.shape, self._world.device
        tail = self.policy.tail_velocity(conditioning)

        def seconds(rows: int) -> float:
            latents = torch.zeros(rows, *shape, dtype=self.policy.dtype, device=device)
            timed: list[float] = []
            for _ in range(3):  # the first may compile
                watch = Stopwatch(device)
                with torch.no_grad(), watch.phase("call"):
                    slots = torch.zeros(rows, dtype=torch.int64, device=device)
                    self.policy.backbone.velocity(module, latents, 0.5, conditioning, slots)
                timed += watch.read().values()
            return min(timed[1:])

        found = -self._world.max_on_host(-find_micro_batch(seconds, self.wavefront.rows_per_call(tail)))
        if self._world.is_main:
            print(f"rollout.max_rows_per_call: auto, found {found}")
        return found

    def _score(self, rollout: Rollout, prompts: Sequence[str], tiny: bool = False) -> tuple[Tensor, Tensor]:
        """The trained rewards [K, P, images] of a rollout's images, and the share [] of them that was dropped.

        `model.decode_batch_size` images are in memory at a time. tiny: decoded as `tail.decoder` says.
        """
        self._progress.at("rewards")
        latents = rollout.final_latents
        repeated = [prompt for prompt in prompts for _ in range(latents.shape[1])]
        size, scores = self.config.model.decode_batch_size, []
        for some, of_prompts in zip(latents.flatten(0, 1).split(size), _chunks(repeated, size)):
            try:
                images = self.policy.decode(some, tiny)
            except torch.OutOfMemoryError as error:
                beside = " and rollout.overlap=false" if self.beside else ""
                message = (
                    f"model.decode_batch_size: no memory for {len(some)} images; take fewer{beside}, or vae_tiling"
                )
                raise torch.OutOfMemoryError(f"{message} ({error})") from error
            scores.append(torch.stack([self._call(name, images, of_prompts) for name in self._trained]))
        rewards = torch.cat(scores, dim=1).unflatten(1, latents.shape[:2])
        if self.config.objective.on_error == "drop":
            return fill_dropped(rollout.plan.compared(rewards))
        return rewards, rewards.new_zeros(())

    def _call(self, name: str, images: Tensor, prompts: Sequence[str], drop: bool = False) -> Tensor:
        """A reward's scores [B]; what it fails on: NaN, or the end of the run, by `objective.on_error`.

        drop: NaN only for the images at fault, where it is not to end the run.
        """
        self._progress.at(f"reward {name}")
        on_error = self.config.objective.on_error
        if on_error == "skip":
            return score_or_nan(name, self.rewards[name], images, prompts, drop)
        return score(name, self.rewards[name], images, prompts, drop=on_error == "drop")


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
