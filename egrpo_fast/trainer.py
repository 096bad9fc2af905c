"""The loop: prompts -> rollout -> rewards -> update -> log -> checkpoint (paper, Algorithm 1)."""

import contextlib
import json
import math
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from egrpo_fast import figures, metrics, noise, ops
from egrpo_fast.backbones.flux import FluxBackbone
from egrpo_fast.backbones.flux_text import Conditioning
from egrpo_fast.backbones.tail import TailModel
from egrpo_fast.beside import Beside
from egrpo_fast.checkpoint import CheckpointError, CheckpointReader, Checkpoints, problems
from egrpo_fast.config import CHECKPOINTS, Config
from egrpo_fast.engine import Engine, World
from egrpo_fast.export import export
from egrpo_fast.fidelity import TailGuard, compare
from egrpo_fast.guards import BadSteps, Guard, verdict
from egrpo_fast.heartbeat import Heartbeat
from egrpo_fast.interruption import Interruption
from egrpo_fast.methods import plan_of
from egrpo_fast.objective import GroupLoss, Objective, policy_mismatch
from egrpo_fast.plan import ode_plan
from egrpo_fast.prompts import Prompt, PromptOrder
from egrpo_fast.rewards import Reward, RewardError, fill_dropped, score, score_or_nan
from egrpo_fast.rollout import NoiseKey, Rollout, Velocity, Wavefront, find_micro_batch
from egrpo_fast.schedule import make_schedule

PIPELINE = "pipeline"
BASE_PICTURES = "base_pictures.safetensors"
OUT_OF_MEMORY = 1 << 10
"""What a rank tells the others in place of a signal's number; above all of them."""


@dataclass(frozen=True)
class Experience:
    """A scored rollout of one wavefront. rewards [K, P, pictures]: K trained ones; dropped []: share of samples.

    finite []: whether all latents and rewards are.
    """

    prompts: tuple[str, ...]
    rollout: Rollout
    conditioning: Conditioning
    rewards: Tensor
    dropped: Tensor
    finite: Tensor


class Asked(Exception):
    """Some rank was asked to end, by this signal; raised on all ranks at the same place."""

    def __init__(self, signal: int) -> None:
        self.signal = signal


class OutOfMemory(Exception):
    """Some rank's device ran out of memory in a rollout; raised on all ranks."""


@dataclass(frozen=True)
class HeldOut:
    """A held-out evaluation, on every rank: mean of each reward, and on rank 0 the first pictures [N, 3, H, W]."""

    rewards: dict[str, float]
    pictures: Tensor | None


class Trainer:
    """Trains a backbone's transformer on rewards. `train()` runs what is left of `config.iterations`.

    rollout_transformer: on the meta device, what forwards without gradient use in the transformer's place. tail_model:
    what tails use; None: the policy.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        heart: Heartbeat,
        backbone: FluxBackbone,
        rewards: dict[str, Reward],
        interruption: Interruption,
        train_prompts: Sequence[str],
        held_out_prompts: Sequence[str],
        rollout_transformer: nn.Module | None = None,
        tail_model: TailModel | None = None,
    ) -> None:
        self.tail_model = tail_model
        self.config, self.world, self.heart, self.backbone, self.rewards = config, world, heart, backbone, rewards
        self.order = PromptOrder(train_prompts, config.seed, config.prompts.shuffle)
        self.held_out = list(held_out_prompts[: config.evaluation.num_prompts])
        self.trained = [reward for reward in config.rewards if reward.weight]
        self.plan = plan_of(config, 0)
        steps = len(self.plan.groups) if config.objective.optimizer_step == "active_step" else 1
        self.engine = Engine(backbone.transformer, config, config.iterations * steps, rollout_transformer)
        self.ops = ops.choose(config.rollout.backend, world.device)
        self.objective = Objective.of(config, self.ops)

        buffers: dict[str, Any] = {
            "shape": backbone.latent_shape,
            "ops": self.ops,
            "device": world.device,
            "model_dtype": torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32,
            "micro_batch": config.rollout.most_rows,
        }
        self.wavefront = Wavefront(self.plan, config.rollout.prompts_per_call, **buffers)
        evaluation_schedule = make_schedule(config.evaluation.num_steps, config.schedule.shift)
        per_rank = -(-len(self.held_out) // world.size)
        self.evaluation_wavefront = Wavefront(
            ode_plan(evaluation_schedule), min(config.evaluation.prompts_per_call, per_rank), **buffers
        )
        self.beside = Beside(world.device) if config.rollout.overlap else None
        self.stopwatch = metrics.Stopwatch(world.device)
        self.guard, self.tail_guard = Guard(config.guards), TailGuard(config.tail)
        self.interruption = interruption
        self.log: metrics.RunLog | None = None
        self.checkpoints = Checkpoints(
            config.output_dir / CHECKPOINTS,
            world.rank,
            world.size,
            config.checkpoint.keep,
            config.checkpoint.asynchronous,
            local_ranks=world.local_size,
        )
        self.iteration = 0
        self._stepped = False  # whether this iteration has changed the weights: then it is brought to its end
        self._saved: tuple[int, int] | None = None
        self.history: list[tuple[int, dict[str, float]]] = []
        if config.resume:
            self._resume()

    def train(self) -> int:
        """Iterate to the end, or until the watch stops the run; then write summary, plots and trained pipeline.

        Returns the signal that asked the run to end early, with a checkpoint of what it had done; 0: none did.
        """
        self.log = self._open_log()
        try:
            held_out = self._iterate()
            self.checkpoints.wait()
            held_out = held_out or self.evaluate()  # its pictures, where a resumed run had ended
        except Asked as asked:
            self.save(needed=True)
            if self.log:
                self.log.close()
            return asked.signal
        except BadSteps:
            self.save(needed=True)
            raise
        except Exception:
            self.heart.at("finishing the last checkpoint", "after an error")
            with contextlib.suppress(CheckpointError):
                self.checkpoints.wait()
            raise
        self._finish(held_out)
        if self.log:
            self.log.close()
        return 0

    def _iterate(self) -> HeldOut | None:
        """All that is left of the run, up to its last checkpoint. Returns the last evaluation made."""
        config = self.config
        held_out: HeldOut | None = None
        while True:
            self._may_end()
            if self._evaluation_due():
                held_out = self.evaluate()
                self._report(held_out)
            last = self.iteration == config.iterations or self._stopped()
            due = config.checkpoint.every and self.iteration % config.checkpoint.every == 0
            if self.iteration and (last or due or self._is_best()):
                self.save()
            if last:
                return held_out
            prompts = self.order.iteration(
                self.iteration, config.prompts.per_iteration, self.world.rank, self.world.size
            )
            batch = self.sample(prompts)
            # A latent or reward that is not finite, on whichever rank: nothing is changed on any.
            skipped = self.world.agree(not all(experience.finite for experience in batch))
            checked = {} if skipped else self._check_tail(batch)
            with self._phase("update"):
                values = {"lr": self.engine.rate, "skipped_steps": 1} if skipped else self.update(batch)
            self.iteration += 1
            self._stepped = False
            values |= checked | self._reward_statistics(batch) | self.stopwatch.read()
            self._log_iteration(values, batch)

    def sample(self, prompts: Sequence[Prompt]) -> list[Experience]:
        """Roll out and score this rank's prompts: the current policy's experience."""
        if exact := self.tail_guard.fallen:
            self.tail_model = None
        self.plan = plan_of(self.config.with_tail() if exact else self.config, self.iteration)
        self.wavefront.use(self.plan)
        names = [reward.name for reward in self.trained]
        chunks = list(_chunks([prompt.text for prompt in prompts], self.config.rollout.prompts_per_call))
        numbers = torch.tensor([prompt.number for prompt in prompts], device=self.world.device)
        with self._phase("rollout"):
            conditionings = [self.backbone.encode(chunk) for chunk in chunks]
            rollouts: list[Rollout] = []
            scored: list[Callable[[], tuple[Tensor, Tensor]]] = []
            with self.engine.inference(self.config.rollout.weights == "gathered") as module:
                if self.tail_model:
                    self.tail_model.refresh(module)
                for chunk, conditioning, some in zip(
                    chunks, conditionings, numbers.split(self.config.rollout.prompts_per_call)
                ):
                    if self.config.rollout.micro_batch == "auto" and self.wavefront.micro_batch is None:
                        self.wavefront.micro_batch = self._find_micro_batch(module, conditioning)
                    key = NoiseKey(self.config.seed, self.iteration, some)
                    rollout = self._roll_out(
                        self.wavefront,
                        self._velocity(module, conditioning),
                        key,
                        tail_velocity=self._tail_velocity(conditioning),
                    )
                    rollouts.append(rollout)
                    scoring = partial(self._score, rollout.final_latents, chunk, names, tiny=not exact)
                    scored.append(self.beside.begin(scoring) if self.beside else scoring)
        # The gathered weights are given back before the pictures need their memory, where they are not scored beside.
        with self._phase("rewards"):
            batch = []
            for rollout, conditioning, chunk, scores in zip(rollouts, conditionings, chunks, scored):
                rewards, dropped = scores()
                finite = rollout.final_latents.isfinite().all() & rewards.isfinite().all()
                batch.append(Experience(tuple(chunk), rollout, conditioning, rewards, dropped, finite))
            return batch

    def update(self, batch: Sequence[Experience]) -> dict[str, float]:
        """One forward and backward per group and wavefront; one optimizer step per iteration or group.

        A step whose gradient is not finite on some rank changes nothing on any: `skipped_steps` counts them.
        """
        groups, every_step = self.plan.groups, self.config.objective.optimizer_step == "active_step"
        # The ratio compares with the rollout's weights under this same forward, so it starts at exactly 1. With one
        # optimizer step that is the forward itself; with several, it is taken before the first.
        references = [[self._at_group(e, n) for n in range(len(groups))] for e in batch] if every_step else None
        rewards = [self.plan.by_group(experience.rewards) for experience in batch]
        kept = [self.plan.unpruned(self.objective.mixed(experience.rewards)) for experience in batch]
        share = len(batch) * (1 if every_step else len(groups))
        parts: list[GroupLoss] = []
        mismatches, norms, rate = [], [], self.engine.rate
        for n, group in enumerate(groups):
            due = every_step or n == len(groups) - 1
            for place, experience in enumerate(batch):
                rollout = experience.rollout
                velocity = self._at_group(experience, n, gradient=True)
                reference = references[place][n] if references else velocity.detach()
                scores, counting = rewards[place][n], kept[place][n]
                part = self.objective(group, rollout.key, velocity, reference, scores, counting)
                self.engine.backward(part.loss / share, last=due and place == len(batch) - 1)
                parts.append(part.detach())
                mismatches.append(policy_mismatch(group, reference, rollout.velocities[n]))
            if due:
                self.heart.at("optimizer step", f"(iteration {self.iteration + 1})")
                self._stepped, rate = True, self.engine.rate
                norms.append(self.engine.step())
        first = parts[: len(batch)] if every_step else parts  # what was compared before the first optimizer step
        return self._update_statistics(parts, first, mismatches, norms) | {"lr": rate}

    def _update_statistics(
        self,
        parts: Sequence[GroupLoss],
        first: Sequence[GroupLoss],
        mismatches: Sequence[Tensor],
        norms: Sequence[float],
    ) -> dict[str, float]:
        means = {
            "loss": torch.stack([part.loss for part in parts]),
            "clip_fraction": torch.stack([part.clip_fraction for part in parts]),
            "zero_advantage_share": torch.stack([(part.advantages == 0).float().mean() for part in parts]),
            "policy_mismatch": torch.stack(list(mismatches)),
        }
        values = dict(zip(means, self.world.mean(torch.stack([value.mean() for value in means.values()])).tolist()))
        for name, some in (("log_ratio_before_update", first), ("max_log_ratio", parts)):
            values[name] = self.world.largest(torch.stack([part.log_ratio.abs().max() for part in some]).max())
        if taken := [norm for norm in norms if math.isfinite(norm)]:
            values["grad_norm"] = sum(taken) / len(taken)
        groups = self.plan.groups
        values["step_entropy"] = sum(group.step.entropy for group in groups) / len(groups)
        return values | {"skipped_steps": len(norms) - len(taken)}

    def evaluate(self) -> HeldOut:
        """Every reward on held-out prompts, each from its own fixed noise, whatever the ranks and batches."""
        wavefront, names = self.evaluation_wavefront, [reward.name for reward in self.config.rewards]
        size = wavefront.num_prompts
        # Every rank makes the same number of calls: the last ones are filled up with prompts that do not count.
        total = -(-len(self.held_out) // (size * self.world.size)) * size * self.world.size
        mine = list(range(self.world.rank, total, self.world.size))
        scored: list[tuple[int, list[float]]] = []
        shown: list[tuple[int, Tensor]] = []
        with self._phase("evaluation"):
            latents = []
            with self.engine.inference(self.config.rollout.weights == "gathered") as module:
                for chunk in _chunks(mine, size):
                    places = [place % len(self.held_out) for place in chunk]
                    velocity = self._velocity(module, self.backbone.encode([self.held_out[place] for place in places]))
                    key = NoiseKey(self.config.seed, 0, torch.tensor(places, device=self.world.device))
                    latents.append(self._roll_out(wavefront, velocity, key, noise.EVALUATION).final_latents[:, 0])
            # As in `sample`, the pictures get the memory of the gathered weights.
            for chunk, some in zip(_chunks(mine, size), latents):
                pictures, prompts = self.backbone.decode(some), [self.held_out[i % len(self.held_out)] for i in chunk]
                scores = torch.stack([self._call(name, pictures, prompts, drop=True) for name in names], dim=1)
                for place, row, picture in zip(chunk, scores.tolist(), pictures):
                    if place < len(self.held_out):
                        scored.append((place, row))
                    if place < min(self.config.evaluation.grid_pictures, len(self.held_out)):
                        shown.append((place, picture.cpu()))
        every = [row for _, row in sorted(pair for rank in self.world.gather(scored) for pair in rank)]
        means = torch.tensor(every, dtype=torch.float64).nanmean(0).tolist()
        if failed := [name for name, mean in zip(names, means) if math.isnan(mean)]:
            raise RewardError(f"rewards.{failed[0]}: scored none of the held-out pictures")
        collected = sorted((pair for rank in self.world.gather(shown) for pair in rank), key=lambda pair: pair[0])
        grid = torch.stack([picture for _, picture in collected]) if self.world.is_main else None
        return HeldOut(dict(zip(names, means)), grid)

    def save(self, needed: bool = False) -> None:
        """A checkpoint of this iteration, written while training goes on. needed: wait for it; CheckpointError."""
        state = {
            "iteration": self.iteration,
            "optimizer_steps": self.engine.steps,
            "held_out": self.history,
            "guard": self.guard.state,
            "tail": self.tail_guard.state,
        }
        if self._saved != (self.iteration, len(self.history)):
            self._saved = self.iteration, len(self.history)
            attempt = self.world.from_main(uuid.uuid4().hex[:8])
            if self.log:
                self.log.sync()  # no checkpoint outlives its lines
            with self._phase("checkpoint"):
                self._told(self.checkpoints.wait)
                pieces, local, best = self.engine.pieces(), self.engine.local(), self._is_best()
                self._told(lambda: self.checkpoints.save(self.iteration, pieces, local, state, attempt, best), needed)
        if needed:
            self.checkpoints.wait()

    def _told(self, write: Callable[[], None], needed: bool = False) -> None:
        """A checkpoint that cannot be written ends no run: those before it stand."""
        try:
            write()
        except CheckpointError as error:
            if needed:
                raise
            self._saved = None
            warnings.warn(f"{error}; training goes on, the checkpoints before it stand", stacklevel=2)

    def _is_best(self) -> bool:
        """Whether this iteration was evaluated and is the best so far of `checkpoint.best`."""
        watched = self.config.checkpoint.best
        if watched is None or not self.history or self.history[-1][0] != self.iteration:
            return False
        *before, (_, now) = self.history
        return all(now[watched] > past[watched] for _, past in before)

    def _resume(self) -> None:
        """Continue from the newest checkpoint that is sound on every rank; damaged ones are told and passed over."""
        paths = self.world.from_main(list(reversed(self.checkpoints.all())))
        for path in paths:
            with self._phase("verifying"):
                found = [problem for rank in self.world.gather(self._problems(path)) for problem in rank]
            if not found:
                reader = CheckpointReader(path)
                with self._phase("restoring"):
                    self.engine.restore(reader, reader.state["optimizer_steps"])
                self.iteration, self.guard.state = reader.state["iteration"], reader.state["guard"]
                self.tail_guard.state = reader.state["tail"]
                self.history = [(iteration, rewards) for iteration, rewards in reader.state["held_out"]]
                self._saved = self.iteration, len(self.history)
                return
            if self.world.is_main:
                warnings.warn(f"resume: {path} is damaged and passed over: {'; '.join(found)}", stacklevel=2)
        folder = self.config.output_dir / CHECKPOINTS
        if paths:
            raise ValueError(f"resume: every checkpoint in {folder} is damaged")
        if self.world.is_main:  # killed before its first one
            warnings.warn(f"resume: there is no checkpoint in {folder}; the run begins again", stacklevel=2)

    def _problems(self, path: Path) -> list[str]:
        """What is wrong with this rank's share of a checkpoint's files."""
        try:
            return problems(path, CheckpointReader(path).files[self.world.rank :: self.world.size])
        except ValueError as error:
            return [str(error)]

    def _check_tail(self, batch: Sequence[Experience]) -> dict[str, float]:
        """Every `tail.check_every` iterations: the same samples finished by the exact tail, and what both rewards say.

        A small sample, one wavefront of every rank; all come to the same verdict.
        """
        if not self.tail_guard.due(self.iteration):
            return {}
        experience = batch[0]
        with self._phase("tail check"):
            plan = plan_of(self.config.with_tail(), self.iteration)
            self.wavefront.use(plan)
            with self.engine.inference(self.config.rollout.weights == "gathered") as module:
                velocity = self._velocity(module, experience.conditioning)
                rollout = self._roll_out(self.wavefront, velocity, experience.rollout.key)
            names = [reward.name for reward in self.trained]
            exact, _ = self._score(rollout.final_latents, experience.prompts, names)
            if self.world.agree(not exact.isfinite().all()):
                return {}
            found = compare(plan, self.objective, exact, experience.rewards)
            correlations = [one for rank in self.world.gather(found.correlations.flatten().tolist()) for one in rank]
            flips, bias = self.world.mean(torch.stack((found.flips.mean(), found.bias))).tolist()
        told = self.tail_guard.judge(correlations)
        if told and self.log:
            self.log.say(f"WARNING: iteration {self.iteration + 1}: {told}")
        known = [value for value in correlations if not math.isnan(value)]
        values = {"tail/sign_flips": flips, "tail/reward_bias": bias, "tail/exact": float(self.tail_guard.fallen)}
        return values | ({"tail/rank_correlation": sum(known) / len(known)} if known else {})

    def _evaluation_due(self) -> bool:
        """At the start, every so often and at the end; not again where a resumed run has its result."""
        every, done = self.config.evaluation.every, [iteration for iteration, _ in self.history]
        due = self.iteration in (0, self.config.iterations) or (every and self.iteration % every == 0)
        return bool(due) and self.iteration not in done

    def _may_end(self, signal: int | None = None) -> None:
        """Asked, on every rank at the same call, where some rank was asked to end and the weights are as they were.

        signal: what this rank says in place of its own; OutOfMemory where it, or another's, is OUT_OF_MEMORY.
        """
        if self._stepped:
            return
        told = self.world.agree(self.interruption.signal if signal is None else signal)
        if told == OUT_OF_MEMORY:
            raise OutOfMemory
        if told:
            raise Asked(told)

    def _roll_out(
        self,
        wavefront: Wavefront,
        velocity: Velocity,
        key: NoiseKey,
        noise_step: int = noise.INITIAL,
        tail_velocity: Velocity | None = None,
    ) -> Rollout:
        """A wavefront on every rank. Where one runs out of memory, all begin again with half the rows per model call.

        The others hear of it at their next call, or after the last; a rollout is a function of its key, so it comes
        out the same. Sharded weights are collected within a call, which nobody can leave alone: there it ends the run.
        """
        alone = self.world.size == 1 or not self.engine.sharded or self.config.rollout.weights == "gathered"
        while True:
            with contextlib.suppress(OutOfMemory):
                try:
                    rollout = wavefront.run(velocity, key, noise_step, tail_velocity)
                except torch.OutOfMemoryError:
                    if not alone or wavefront.rows_per_call == 1:
                        raise
                    self._may_end(OUT_OF_MEMORY)
                if alone:
                    self._may_end()
                return rollout
            rows = wavefront.rows_per_call
            wavefront.micro_batch = rows // 2
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
            if self.world.is_main:
                told = f"out of memory with {rows} rows per model call; goes on with {rows // 2}"
                warnings.warn(f"rollout.micro_batch: {told}", stacklevel=2)

    def _find_micro_batch(self, module: nn.Module, conditioning: Conditioning) -> int:
        """What `rollout.micro_batch: auto` is, on the rank that can take least."""
        self.heart.at("finding rollout.micro_batch")
        shape, device = self.wavefront.shape, self.world.device
        dtype = torch.bfloat16 if self.config.model.dtype == "bfloat16" else torch.float32

        def seconds(rows: int) -> float:
            latents = torch.zeros(rows, *shape, dtype=dtype, device=device)
            timed: list[float] = []
            for _ in range(3):  # the first may compile
                watch = metrics.Stopwatch(device)
                with torch.no_grad(), watch.phase("call"):
                    slots = torch.zeros(rows, dtype=torch.int64, device=device)
                    self.backbone.velocity(module, latents, 0.5, conditioning, slots)
                timed += watch.read().values()
            return min(timed[1:])

        found = -self.world.agree(-find_micro_batch(seconds, self.wavefront.rows_per_call))
        if self.world.is_main:
            print(f"rollout.micro_batch: auto, found {found}")
        return found

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.heart.at(name, f"(iteration {self.iteration + 1})")
        with self.stopwatch.phase(name):
            yield

    def _velocity(self, module: nn.Module, conditioning: Conditioning) -> Velocity:
        def velocity(latents: Tensor, t: float, rows: Tensor) -> Tensor:
            self._at_model_call(t)
            return self.backbone.velocity(module, latents, t, conditioning, rows)

        return velocity

    def _tail_velocity(self, conditioning: Conditioning) -> Velocity | None:
        if (model := self.tail_model) is None:
            return None

        def velocity(latents: Tensor, t: float, rows: Tensor) -> Tensor:
            self._at_model_call(t)
            return model.velocity(latents, t, conditioning, rows)

        return velocity

    def _at_model_call(self, t: float) -> None:
        self.heart.at("model call", f"(iteration {self.iteration + 1}, t = {t:.3f})")
        self._may_end()  # every rank makes the same calls

    def _at_group(self, experience: Experience, n: int, gradient: bool = False) -> Tensor:
        """The training forward at the states of a group: [P * S, L, C]."""
        state, group = experience.rollout.states[n], self.plan.groups[n]
        rows = torch.arange(len(state), device=state.device) // len(group.sources)
        with torch.set_grad_enabled(gradient):
            return self._velocity(self.engine.module, experience.conditioning)(state, group.time, rows)

    def _score(
        self, latents: Tensor, prompts: Sequence[str], names: Sequence[str], tiny: bool = False
    ) -> tuple[Tensor, Tensor]:
        """latents [P, pictures, L, C] -> rewards [K, P, pictures] and the share [] of them that was dropped.

        `model.decode_batch` pictures are in memory at a time. tiny: decoded as `tail.decoder` says.
        """
        self.heart.at("rewards", f"(iteration {self.iteration + 1})")
        repeated = [prompt for prompt in prompts for _ in range(latents.shape[1])]
        size, scores = self.config.model.decode_batch, []
        for some, of_prompts in zip(latents.flatten(0, 1).split(size), _chunks(repeated, size)):
            images = self.backbone.decode(some, tiny)
            scores.append(torch.stack([self._call(name, images, of_prompts) for name in names]))
        rewards = torch.cat(scores, dim=1).unflatten(1, latents.shape[:2])
        if self.config.objective.on_error == "drop":
            return fill_dropped(self.plan.compared(rewards))
        return rewards, rewards.new_zeros(())

    def _call(self, name: str, images: Tensor, prompts: Sequence[str], drop: bool = False) -> Tensor:
        """A reward's scores [B]; what it fails on: NaN, or the end of the run, by `objective.on_error`.

        drop: NaN only for the pictures at fault, where it is not to end the run.
        """
        self.heart.at(f"reward {name}", f"(iteration {self.iteration + 1})")
        on_error = self.config.objective.on_error
        if on_error == "skip":
            return score_or_nan(name, self.rewards[name], images, prompts, drop)
        return score(name, self.rewards[name], images, prompts, drop=on_error == "drop")

    def _reward_statistics(self, batch: Sequence[Experience]) -> dict[str, float]:
        rewards = torch.cat([experience.rewards for experience in batch], dim=1)
        spread = torch.stack([pictures.std(-1).mean(-1) for pictures in self.plan.compared(rewards)]).mean(0)
        means, spreads = self.world.mean(torch.stack((rewards.mean((1, 2)), spread))).tolist()
        values = {f"reward/{reward.name}": value for reward, value in zip(self.trained, means)} | {
            f"reward_spread/{reward.name}": value for reward, value in zip(self.trained, spreads)
        }
        if self.config.objective.on_error == "drop":
            dropped = torch.stack([experience.dropped for experience in batch]).mean()
            values["dropped_share"] = self.world.mean(dropped).item()
        return values

    def _spread_by_step(self, batch: Sequence[Experience]) -> dict[str, dict[int, float]]:
        """Reward standard deviation within every group, by reward and grid index: what group sizes can be dealt by."""
        rewards = torch.cat([experience.rewards for experience in batch], dim=1)
        by_group = self.plan.by_group(rewards)
        spreads = torch.stack([values.std(-1).unflatten(0, (len(rewards), -1)).mean((1, 2)) for values in by_group])
        by_reward = zip(self.trained, self.world.mean(spreads.flatten()).unflatten(0, spreads.shape).T.tolist())
        steps = [group.index for group in self.plan.groups]
        return {
            reward.name: {step: value for step, value in zip(steps, values) if math.isfinite(value)}
            for reward, values in by_reward
        }

    def _open_log(self) -> metrics.RunLog | None:
        if not self.world.is_main:
            return None
        config = self.config.model_dump(mode="json") if self.config.wandb else None
        log = metrics.RunLog(
            self.config.output_dir, self.config.iterations, self.iteration, not self._evaluation_due(), config
        )
        plan = self.plan
        log.say(
            f"per prompt: {len(plan.waves)} wavefront steps, {plan.num_rows} rows, {plan.evaluations} evaluations "
            f"in the rollout, {plan.trained_states} in {len(plan.groups)} forwards and backwards in the update; "
            f"per iteration and rank: "
            f"{self.config.prompts.per_iteration // self.world.size} prompts; "
            f"ops: {', '.join(f'{op} {backend}' for op, backend in self.ops.chosen.items())}"
        )
        return log

    def _stopped(self) -> bool:
        """Whether the watch ends the run: the same on every rank, for the history is."""
        found = verdict(self.config, self.history)
        return found is not None and found.stop

    def _log_iteration(self, values: dict[str, float], batch: Sequence[Experience]) -> None:
        """Metrics, alarms, and whose prompts a skipped step was of. BadSteps after too many in a row."""
        log = self.log
        skipped = int(values["skipped_steps"])
        concerned: list[str] = []
        if skipped:  # the same on every rank
            mine = [prompt for experience in batch if not experience.finite for prompt in experience.prompts]
            concerned = [prompt for rank in self.world.gather(mine) for prompt in rank]
        alarms, notes = self.guard.alarms(values), {"spread_by_step": self._spread_by_step(batch)}
        if log:
            log.write(self.iteration, values, notes | ({"skipped_prompts": concerned} if skipped else {}))
            phases = {name.removeprefix("seconds/"): value for name, value in values.items() if "seconds/" in name}
            log.advance(reward=values[f"reward/{self.trained[0].name}"], **phases)
            for alarm in alarms:
                log.say(f"WARNING: iteration {self.iteration}: {alarm}")
        why = f"a loss or gradient of iteration {self.iteration}"
        if concerned:
            why = f"latents or rewards of {', '.join(map(repr, concerned[:4]))} at iteration {self.iteration}"
        if skipped and log:
            log.say(f"WARNING: skipped {skipped} step(s), nothing was changed: {why} not finite")
        self.guard.skipped(skipped, why)

    def _report(self, held_out: HeldOut) -> None:
        self.history.append((self.iteration, held_out.rewards))
        log = self.log
        if log is None:
            return
        assert held_out.pictures is not None
        folder = self.config.output_dir
        values = {f"held_out/{name}": value for name, value in held_out.rewards.items()}
        rule, found = self.config.evaluation.stop_when, verdict(self.config, self.history)
        if found:
            values |= {"watch/best": found.best, "watch/alarms": found.alarms, "watch/stop": float(found.stop)}
        log.write(self.iteration, values | self.stopwatch.read())
        shown = "  ".join(f"{name} {value:.4f}" for name, value in held_out.rewards.items())
        log.say(f"held out after {self.iteration} iterations: {shown}")
        if rule and found and found.alarms:
            log.say(
                f"WARNING: {rule.reward} fell to {held_out.rewards[rule.reward]:.4f} from its best of {found.best:.4f} "
                f"(iteration {found.best_at}) while the trained rewards rose: alarm {found.alarms} of {rule.patience}"
                f"{'; the run stops here' if found.stop else ''}"
            )
        (folder / "pictures").mkdir(exist_ok=True)
        captions = self.held_out[: len(held_out.pictures)]
        figures.picture_grid(folder / "pictures" / f"iteration-{self.iteration:06d}.png", held_out.pictures, captions)
        if self.iteration == 0:
            save_file({"pictures": held_out.pictures.contiguous()}, folder / BASE_PICTURES)

    def _finish(self, after: HeldOut) -> None:
        if not self.world.is_main:
            return
        assert after.pictures is not None
        folder = self.config.output_dir
        lines = metrics.RunLog.read(folder)
        base = next(line for line in lines if line["iteration"] == 0)
        figures.curves(folder / "curve.png", lines)
        before = load_file(folder / BASE_PICTURES)["pictures"]
        figures.before_after(folder / "before_after.png", before, after.pictures, self.held_out[: len(before)])
        held_out = {name: {"before": base[f"held_out/{name}"], "after": after.rewards[name]} for name in after.rewards}
        summary: dict[str, Any] = {"iterations": self.iteration, "held_out": held_out}
        if self._stopped() and self.config.evaluation.stop_when:
            summary["stopped_by"] = self.config.evaluation.stop_when.reward
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        with self._phase("export"):
            last = folder / CHECKPOINTS / f"iteration-{self.iteration:06d}"
            export(folder, folder / PIPELINE, checkpoint=last, replace=True)
        print(f"\n{'held-out reward':<18}{'before':>10}{'after':>10}")
        for name, value in held_out.items():
            print(f"{name:<18}{value['before']:>10.4f}{value['after']:>10.4f}")
        loader = "load_lora_weights" if self.config.model.lora else "from_pretrained"
        print(f"\n{folder}: curve.png, before_after.png, {PIPELINE}/ (FluxPipeline.{loader} loads it)")


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
