"""The loop: prompts -> rollout -> rewards -> update -> log -> checkpoint (paper, Algorithm 1)."""

import contextlib
import math
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from egrpo_fast import ops
from egrpo_fast.config import CHECKPOINTS, RUN_FILE, Config, plan_of
from egrpo_fast.distributed.checkpoint import CheckpointError, CheckpointReader, Checkpoints, problems
from egrpo_fast.distributed.engine import Engine
from egrpo_fast.distributed.heartbeat import Heartbeat
from egrpo_fast.distributed.signals import Interruption
from egrpo_fast.distributed.world import World
from egrpo_fast.folder_lock import Claim
from egrpo_fast.objective import GroupLoss, Objective, policy_mismatch
from egrpo_fast.policy import Policy
from egrpo_fast.prompts.order import PromptOrder
from egrpo_fast.rewards import Reward
from egrpo_fast.runs.guards import BadSteps, Guard, verdict
from egrpo_fast.runs.metrics import RunLog, Work
from egrpo_fast.runs.progress import Progress, ShutdownRequested
from egrpo_fast.runs.report import SUMMARY, HeldOut, Report
from egrpo_fast.sampler import Experience, Sampler


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Callbacks:
    """Functions of a Python program that a run calls, on every rank. What one raises ends the run."""

    on_iteration: Callable[[int, dict[str, float]], None] = _nothing
    """Iterations done, and the metrics of the last one, as in metrics.jsonl."""
    on_evaluation: Callable[[int, dict[str, float]], None] = _nothing
    """Iterations done, and the mean of every reward on the held-out prompts."""
    on_checkpoint: Callable[[int], None] = _nothing
    """Iterations done. The checkpoint of as many is being written."""


class TrainingLoop:
    """Trains a policy on rewards. `train()` runs what is left of `config.iterations`.

    claim: of the run's folder; None: every checkpoint in it is taken for this run's. callbacks: what it calls as it
    goes.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        heart: Heartbeat,
        policy: Policy,
        rewards: dict[str, Reward],
        interruption: Interruption,
        train_prompts: Sequence[str],
        held_out_prompts: Sequence[str],
        claim: Claim | None = None,
        callbacks: Callbacks = Callbacks(),
        work: Work | None = None,
    ) -> None:
        """work: what an iteration computes; None: that is not counted."""
        self.config, self.world, self.heart, self.policy = config, world, heart, policy
        self.claim, self.callbacks = claim, callbacks
        self.work = work or Work(config.prompts.per_iteration * len(plan_of(config, 0).image_rows))
        self.progress = Progress(world, heart, interruption)
        self.order = PromptOrder(train_prompts, config.seed, config.prompts.shuffle)
        self.held_out = list(held_out_prompts[: config.evaluation.num_prompts])
        steps = len(plan_of(config, 0).groups) if config.objective.optimizer_step == "active_step" else 1
        self.engine = Engine(policy.transformer, config, config.iterations * steps, policy.compiled)
        self.objective = Objective.of(config, ops.choose(config.rollout.backend, world.device))
        self.sampler = Sampler(config, world, self.progress, self.engine, policy, rewards, self.objective)
        self.guard = Guard(config.guards)
        self.checkpoints = Checkpoints(
            config.output_dir / CHECKPOINTS,
            world.rank,
            world.size,
            config.checkpoint.save_total_limit,
            config.checkpoint.asynchronous,
            local_ranks=world.local_size,
            claim=claim,
        )
        self._saved: tuple[int, int] | None = None
        self.history: list[tuple[int, dict[str, float]]] = []
        if config.resume:
            self._resume()

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self.progress.iteration

    def train(self) -> int:
        """Iterate to the end, or until the watch stops the run; then write summary, plots and trained pipeline.

        Returns the signal that asked the run to end early, with a checkpoint of what it had done; 0: none did.
        """
        config, world = self.config, self.world
        self.report = Report(
            config, self.held_out, self.iteration, not self._evaluation_due(), world.is_main, self.claim
        )
        self.report.begin(
            self.sampler.wavefront.plan, self.iteration, world.hardware, self.objective.ops.chosen
        )  # fmt: skip
        try:
            held_out = self._iterate()
            self.checkpoints.wait()
            held_out = held_out or self.evaluate()  # its images, where a resumed run had ended
        except ShutdownRequested as asked:
            self.save(needed=True)
            self.report.close()
            return asked.signal
        except BadSteps:
            self.save(needed=True)
            raise
        except Exception:
            self.progress.at("finishing the last checkpoint", ", after an error")
            with contextlib.suppress(CheckpointError):
                self.checkpoints.wait()
            raise
        with self.progress.phase("export"):
            self.report.finish(self.iteration, self.history, held_out, self._stopped())
        self.report.close()
        return 0

    def _iterate(self) -> HeldOut | None:
        """All that is left of the run, up to its last checkpoint. Returns the last evaluation made."""
        config, progress = self.config, self.progress
        held_out: HeldOut | None = None
        while True:
            progress.check_shutdown()
            if self._evaluation_due():
                held_out = self.evaluate()
                self.history.append((self.iteration, held_out.rewards))
                watched = verdict(config, self.history)
                self.report.held_out(self.iteration, held_out, watched, progress.stopwatch.read())
                self.callbacks.on_evaluation(self.iteration, dict(held_out.rewards))
            last = self.iteration >= config.iterations or self._stopped()
            due = config.checkpoint.every and self.iteration % config.checkpoint.every == 0
            if self.iteration and (last or due or self._is_best()):
                self.save()
            if last:
                return held_out
            prompts = self.order.iteration(
                self.iteration, config.prompts.per_iteration, self.world.rank, self.world.size
            )
            batch = self.sampler.sample(prompts)
            # A latent or reward that is not finite, on whichever rank: nothing is changed on any.
            skipped = self.world.max_on_host(not all(experience.finite for experience in batch))
            check = None if skipped else self.sampler.check_tail(batch[0])
            with progress.phase("update"):
                values = {"lr": self.engine.learning_rate, "skipped_steps": 1} if skipped else self.update(batch)
            progress.iteration += 1
            progress.committed = False
            checked, given_up = self.sampler.judge_tail(check) if check else ({}, None)
            self._tell(values | checked, batch, [given_up] if given_up else [])

    def update(self, batch: Sequence[Experience]) -> dict[str, float]:
        """One forward and backward per group and wavefront; one optimizer step per iteration or group.

        A step whose gradient is not finite on some rank changes nothing on any: `skipped_steps` counts them.
        """
        plan = batch[0].rollout.plan
        groups, every_step = plan.groups, self.config.objective.optimizer_step == "active_step"
        # The ratio compares with the rollout's weights under this same forward, so it starts at exactly 1. With one
        # optimizer step that is the forward itself; with several, it is taken before the first.
        references = [[self._at_group(e, n) for n in range(len(groups))] for e in batch] if every_step else None
        rewards = [plan.by_group(experience.rewards) for experience in batch]
        kept = [plan.unpruned(self.objective.mixed(experience.rewards)) for experience in batch]
        share = len(batch) * (1 if every_step else len(groups))
        parts: list[GroupLoss] = []
        mismatches, norms, rate = [], [], self.engine.learning_rate
        for n, group in enumerate(groups):
            due = every_step or n == len(groups) - 1
            for place, experience in enumerate(batch):
                rollout = experience.rollout
                velocity = self._at_group(experience, n, gradient=True)
                reference = references[place][n] if references else velocity.detach()
                scores, counting = rewards[place][n], kept[place][n]
                stored = (rollout.states[n], rollout.samples[n]) if rollout.samples else None
                part = self.objective(group, rollout.key, velocity, reference, scores, counting, stored)
                self.engine.backward(part.loss / share, last=due and place == len(batch) - 1)
                parts.append(part.detach())
                mismatches.append(policy_mismatch(group, reference, rollout.velocities[n]))
            if due:
                self.progress.at("optimizer step")
                self.progress.committed, rate = True, self.engine.learning_rate
                norms.append(self.engine.step())
        first = parts[: len(batch)] if every_step else parts  # what was compared before the first optimizer step
        entropy = sum(group.step.entropy for group in groups) / len(groups)
        return self._statistics(parts, first, mismatches, norms) | {"step_entropy": entropy, "lr": rate}

    def _statistics(
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
            values[name] = self.world.max(torch.stack([part.log_ratio.abs().max() for part in some]).max())
        if taken := [norm for norm in norms if math.isfinite(norm)]:
            values["grad_norm"] = sum(taken) / len(taken)
        return values | {"skipped_steps": len(norms) - len(taken)}

    def _at_group(self, experience: Experience, n: int, gradient: bool = False) -> Tensor:
        """The training forward at the states of a group: [P * S, L, C]."""
        rollout = experience.rollout
        state, group = rollout.states[n], rollout.plan.groups[n]
        rows = torch.arange(len(state), device=state.device) // len(group.sources)
        with torch.set_grad_enabled(gradient):
            return self.policy.velocity(experience.conditioning, self.engine.module)(state, group.time, rows)

    def evaluate(self) -> HeldOut:
        """Every reward on the held-out prompts."""
        return self.sampler.evaluate(self.held_out)

    def _tell(self, values: dict[str, float], batch: Sequence[Experience], alarms: list[str]) -> None:
        """Metrics, alarms (some are there already), and whose prompts a skipped step was of.

        BadSteps after too many of those in a row.
        """
        of_rewards, spread_by_step = self.sampler.statistics(batch)
        seconds = self.progress.stopwatch.read()
        values = values | of_rewards | seconds | self.work.speed(seconds, self.world.device)
        skipped, notes = int(values["skipped_steps"]), dict[str, Any](spread_by_step=spread_by_step)
        alarms, why = [*alarms, *self.guard.alarms(values)], f"a loss or gradient of iteration {self.iteration}"
        if skipped:  # the same on every rank
            mine = [prompt for experience in batch if not experience.finite for prompt in experience.prompts]
            concerned = [prompt for rank in self.world.gather(mine) for prompt in rank]
            if concerned:
                why = f"latents or rewards of {', '.join(map(repr, concerned[:4]))} at iteration {self.iteration}"
            notes["skipped_prompts"] = concerned
            alarms.append(f"skipped {skipped} step(s), nothing was changed: {why} not finite")
        self.report.iteration(self.iteration, values, notes, alarms, self.sampler.samples(batch))
        self.callbacks.on_iteration(self.iteration, values)
        self.guard.skipped(skipped, why)

    def _evaluation_due(self) -> bool:
        """At the start, every so often and at the end; not again where a resumed run has its result."""
        every, done = self.config.evaluation.every, [iteration for iteration, _ in self.history]
        ends = self.iteration == 0 or self.iteration >= self.config.iterations
        due = ends or (every and self.iteration % every == 0)
        return bool(due) and self.iteration not in done

    def _stopped(self) -> bool:
        """Whether the watch ends the run: the same on every rank, for the history is."""
        found = verdict(self.config, self.history)
        return found is not None and found.stop

    def save(self, needed: bool = False) -> None:
        """A checkpoint of this iteration, written while training goes on. needed: wait for it; CheckpointError."""
        state = {
            "iteration": self.iteration,
            "optimizer_steps": self.engine.steps,
            "held_out": self.history,
            "guard": self.guard.state,
            "tail": self.sampler.state,
        }
        now = self.iteration, len(self.history)
        if self.world.max_on_host(self._saved != now):  # one rank alone may not have been able to
            attempt = self.world.broadcast(uuid.uuid4().hex[:8])
            self.report.sync()  # no checkpoint outlives its lines
            with self.progress.phase("checkpoint"):
                self._or_warn(self.checkpoints.wait)
                self._saved = now
                pieces, local, best = self.engine.state_shards(), self.engine.rank_local_state(), self._is_best()
                self._or_warn(
                    lambda: self.checkpoints.save(self.iteration, pieces, local, state, attempt, best), needed
                )
            self.callbacks.on_checkpoint(self.iteration)
        if needed:
            self.checkpoints.wait()

    def _or_warn(self, write: Callable[[], None], needed: bool = False) -> None:
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
        """Continue from the newest checkpoint that is sound on every rank. A warning names those that are not.

        ValueError: the run has written checkpoints, and none of them can be used.
        """
        paths, message = self.world.broadcast(self._resumable() if self.world.is_main else None)
        if message:
            raise ValueError(f"resume: {message}")
        for path in paths:
            with self.progress.phase("verifying"):
                found = [problem for rank in self.world.gather(self._problems(path)) for problem in rank]
            if not found:
                reader = CheckpointReader(path)
                with self.progress.phase("restoring"):
                    self.engine.restore(reader, reader.state["optimizer_steps"])
                self.progress.iteration, self.guard.state = reader.state["iteration"], reader.state["guard"]
                self.sampler.state = reader.state.get("tail", self.sampler.state)  # older ones know no tails
                self.history = [(iteration, rewards) for iteration, rewards in reader.state["held_out"]]
                self._saved = self.iteration, len(self.history)
                if self.world.is_main and self.iteration > self.config.iterations:
                    message = f"{self.iteration} are done already; the run ends with these"
                    warnings.warn(f"iterations: {self.config.iterations} are asked for, {message}", stacklevel=2)
                return
            if self.world.is_main:
                warnings.warn(f"resume: {path} is damaged and passed over: {'; '.join(found)}", stacklevel=2)
        folder = self.config.output_dir / CHECKPOINTS
        if paths:
            message = "is damaged or another run's; put a sound one back, or begin anew in another output_dir"
            raise ValueError(f"resume: every checkpoint in {folder} {message}")
        if self.world.is_main:  # killed before its first one
            warnings.warn(f"resume: there is no checkpoint in {folder}; the run begins again", stacklevel=2)

    def _resumable(self) -> tuple[list[Path], str]:
        """The run's checkpoints, the newest first, and why the run is refused; "": it is not.

        A run without checkpoints begins again, which overwrites its log. That is right where it was killed before its
        first checkpoint. It is refused where the checkpoints are gone. The run saves the second one only after the
        first is written, so a log of more than twice `checkpoint.every` iterations shows that there was one.
        """
        try:
            paths, log = self.checkpoints.all()[::-1], RunLog.read(self.config.output_dir)
        except ValueError as error:
            return [], f"{error}; make it readable again"
        done = max((line["iteration"] for line in log), default=0)
        folder, every = self.config.output_dir, self.config.checkpoint.every
        if not paths and ((folder / SUMMARY).exists() or (every and done > 2 * every)):
            message = f"there is no checkpoint in {self.checkpoints.folder}, though {done} iterations were done"
            return [], f"{message}; put one back, or begin anew in another output_dir"
        nameless = self.claim and not self.claim.run and not (folder / RUN_FILE).exists()
        if nameless and any(map(_bears_a_name, paths)):
            message = f"{folder / RUN_FILE} is missing, which says whose the checkpoints are"
            return [], f"{message}; put {RUN_FILE} back, or begin anew in another output_dir"
        return paths, ""

    def _problems(self, path: Path) -> list[str]:
        """What is wrong with this rank's share of a checkpoint's files."""
        try:
            reader = CheckpointReader(path)
            if self.claim and reader.run != self.claim.run:
                return ["checkpoint.json: of another run"]
            if path.name.removesuffix(".old") != f"iteration-{reader.iteration:06d}":
                return [f"checkpoint.json: of iteration {reader.iteration}"]
            return problems(path, reader.files[self.world.rank :: self.world.size])
        except (OSError, ValueError) as error:
            return [str(error)]


def _bears_a_name(path: Path) -> bool:
    """Whether a checkpoint says whose it is; not where it is damaged."""
    try:
        return bool(CheckpointReader(path).run)
    except (OSError, ValueError):
        return False
