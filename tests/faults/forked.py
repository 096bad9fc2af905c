"""Runs of the trainer whose ranks are forked from a process that has imported everything: ten seconds sooner each."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fault_injection import run_rank
from safetensors.torch import load_file

from egrpo_fast.config import CHECKPOINTS, CONFIG_FILE
from egrpo_fast.distributed.checkpoint import Checkpoints, problems
from egrpo_fast.distributed.world import free_port
from egrpo_fast.runs.metrics import METRICS

TINY = [
    "iterations=8", "schedule.num_steps=4", "rollout.group_size=3", "optimizer.lr=1e-3", "optimizer.warmup_steps=2",
    "optimizer.ema_decay=0.5", "evaluation.num_prompts=4", "evaluation.batch_size=2",
    "evaluation.num_inference_steps=2",
    "evaluation.every=3", "checkpoint.every=1", "checkpoint.best=clip", "prompts.per_iteration=2",
]  # fmt: skip
BOUND = 900
"""Seconds in which a run that goes wrong must have ended, on a machine that does other things too."""
IMPORTS = [
    "fault_injection", "egrpo_fast.trainer", "egrpo_fast.commands.doctor", "egrpo_fast.rewards.clip",
    "egrpo_fast.rewards.shapes_soft",
]  # fmt: skip


@dataclass
class Ranks:
    """A run's processes, and where they write."""

    processes: list
    log: Path
    phase_files: list[Path]

    def wait(self, seconds=BOUND):
        """Exit codes; None for a rank that still runs after so many seconds. -9: killed by signal 9."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def kill(self, ranks=None, number=signal.SIGKILL):
        """The number of processes that were alive to get the signal."""
        alive = [process for rank, process in enumerate(self.processes) if ranks is None or rank in ranks]
        alive = [process for process in alive if process.exitcode is None]
        for process in alive:
            os.kill(process.pid, number)
        return len(alive)

    def phase(self, rank=0):
        file = self.phase_files[rank]
        return file.exists() and file.read_text().strip()

    def told(self):
        return self.log.read_text(errors="replace")


class Server:
    def __init__(self):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTS)

    def start(self, folder, *overrides, ranks=1, signal_at=None):
        """`train.py shapes TINY output_dir=FOLDER OVERRIDES` on so many ranks. signal_at: by rank, see run_rank."""
        log, port, arguments = folder.with_name(f"{folder.name}.log"), free_port(), [*TINY, f"output_dir={folder}"]
        log.unlink(missing_ok=True)
        phases = [folder.with_name(f"{folder.name}.phase{rank}") for rank in range(ranks)]
        return self.fork(
            run_rank,
            [
                (rank, ranks, port, [*arguments, *overrides], log, phases[rank], (signal_at or {}).get(rank))
                for rank in range(ranks)
            ],
            log,
            phases,
        )

    def fork(self, target, arguments, log, phases=()):
        """A process for each of `arguments`, that calls the target with them."""
        processes = [self._context.Process(target=target, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()
        return Ranks(processes, log, phases)

    def run(self, folder, *overrides, ranks=1, codes=None, signal_at=None):
        """The same to its end, with these exit codes (all 0). Returns what it printed."""
        run = self.start(folder, *overrides, ranks=ranks, signal_at=signal_at)
        found = run.wait()
        run.kill()
        assert found == (codes or [0] * ranks), run.told()[-4000:]
        return run.told()

    def resume(self, folder, *overrides, **options):
        return self.run(folder, "resume=true", *overrides, **options)


def lines(folder):
    """The metrics of a run but its seconds and speed; each line must be whole."""
    text = (folder / METRICS).read_text()
    assert text.endswith("\n")
    read = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("seconds/", "speed/"))} for line in read]


def iterations(folder):
    return [line for line in lines(folder) if "skipped_steps" in line]


def weights(folder):
    return load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def differences(folder, reference):
    """In what two finished runs differ; []: weights bit for bit, every line of the metrics, the summary."""
    ours, theirs = weights(folder), weights(reference)
    wrong = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    if lines(folder) != lines(reference):
        wrong.append(METRICS)
    if (folder / "summary.json").read_text() != (reference / "summary.json").read_text():
        wrong.append("summary.json")
    return [f"{folder.name}: {name} differs" for name in wrong]


def unsound(folder):
    """Problems of complete checkpoints; there must never be any."""
    paths = Checkpoints(folder / CHECKPOINTS).all()
    return [f"{folder.name}/{path.name}: {problem}" for path in paths for problem in problems(path)]


def newest(folder):
    path = Checkpoints(folder / CHECKPOINTS).newest()
    return int(path.name[len("iteration-") :][:6]) if path else 0


def saving(folder):
    return any((folder / CHECKPOINTS).glob("*.partial"))


@dataclass
class Kills:
    """Figures of a run that was killed until it was done."""

    kills: int = 0
    resumes: int = 0
    in_a_save: int = 0
    phases: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def kill_until_done(server, folder, reference, ranks, seconds, rng: random.Random, only_one=False):
    """Start, kill -9 at a random moment in the first `seconds`, and so on until a run comes through: always by the
    same command, with resume=true.

    only_one: kill one rank, and see the others end by themselves.
    """
    told = Kills()
    while True:
        told.resumes += (folder / CONFIG_FILE).exists()
        before = newest(folder)
        run = server.start(folder, "resume=true", ranks=ranks)
        codes = run.wait(rng.uniform(0.5, seconds))
        if rng.random() < 0.4:  # aimed at the next save
            while None in codes and not saving(folder):
                codes = run.wait(0.005)
            time.sleep(rng.uniform(0.0, 0.03))
        if None not in codes:
            break
        while only_one and not all(map(run.phase, range(ranks))):  # before they have met, only a launcher sees it
            run.wait(0.05)
        told.phases.append(run.phase() or "starting")
        run.kill([rng.randrange(ranks)] if only_one else None)
        told.kills += 1
        if None in run.wait():
            run.kill()
            told.wrong.append(f"{folder.name}: a rank lives on {BOUND} s after a kill")
        told.in_a_save += saving(folder)
        told.wrong += unsound(folder)
        if newest(folder) < before:
            told.wrong.append(f"{folder.name}: iteration {before} is lost")
    told.wrong += [f"{folder.name}: lost, {run.told()[-2000:]}"] if any(codes) else differences(folder, reference)
    return told
