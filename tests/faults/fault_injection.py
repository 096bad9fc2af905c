"""What a forked rank runs: the command's own `main`, with a reward or a moment at which something goes wrong."""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings

import torch

from egrpo_fast import train
from egrpo_fast.config import CHECKPOINTS, load_config
from egrpo_fast.distributed.checkpoint import CheckpointReader
from egrpo_fast.distributed.heartbeat import Heartbeat, group_store
from egrpo_fast.distributed.world import World
from egrpo_fast.rewards.shapes_soft import ShapesSoft


class FaultyReward(ShapesSoft):
    """`shapes_soft` that raises, hangs or returns NaN in some of its calls in training.

    With one wavefront of few images per rank and iteration, call n is iteration n of this process. An evaluation
    shows each prompt once, a group several times: evaluations are left alone.
    """

    def __init__(self, fault, first, last=10**9, rank=None, device="cpu"):
        super().__init__(device=device)
        self._fault, self._calls = fault, itertools.count(1)
        self._when = range(first, last + 1) if rank in (None, int(os.environ["RANK"])) else ()

    def __call__(self, images, prompts):
        scores = super().__call__(images, prompts)
        if len(set(prompts)) < len(prompts) and next(self._calls) in self._when:
            if self._fault == "raise":
                raise RuntimeError("the judge is ill")
            if self._fault == "hang":
                time.sleep(600)
            scores[0] = float("nan")
        return scores


def become(rank, size, port, log):
    """A rank as a launcher starts one: its place among the others, its output, no handler of whoever forked it."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in world.items():
        os.environ[name] = str(value)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)


def run_rank(rank, size, port, arguments, log, phase_file, signal_at):
    """`train.py shapes ARGUMENTS` as one rank. Its output goes to `log`, the phase it is in to `phase_file`.

    signal_at: None, or (signal, phase, n): it sends itself the signal when it enters the phase for the n-th time.
    """
    become(rank, size, port, log)
    _watch_phases(os.open(phase_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), signal_at)
    sys.argv = ["train.py", "shapes", *arguments]
    train.main()


def _watch_phases(descriptor, signal_at):
    at, seen = Heartbeat.at, itertools.count(1)
    number, wanted, nth = signal_at or (0, None, 0)

    def watched(self, phase, *details, **limit):
        at(self, phase, *details, **limit)
        os.pwrite(descriptor, phase.ljust(40).encode(), 0)
        if phase == wanted and next(seen) == nth:
            os.kill(os.getpid(), number)

    Heartbeat.at = watched


def damages(path):
    """(what, do it) for a file: missing, cut short, emptied, and a flipped bit at eight places."""
    size = path.stat().st_size

    def flip(position):
        raw = bytearray(path.read_bytes())
        raw[position] ^= 1 << random.Random(position).randrange(8)
        path.write_bytes(raw)

    yield "missing", path.unlink
    yield "cut short", lambda: os.truncate(path, size - 1)
    yield "emptied", lambda: os.truncate(path, 0)
    for position in sorted({(size - 1) * part // 7 for part in range(8)}):
        yield f"bit of byte {position}", lambda at=position: flip(at)


def resume_from_damaged(rank, size, port, arguments, log, told):
    """Damage every file of a run's newest checkpoint in every way, and let the trainer resume: rank 0 writes `told`.

    told: rows of file, damage, the iteration resumed at, whether the weights are that checkpoint's, the warning.
    """
    become(rank, size, port, log)
    config, rows = load_config("shapes", arguments), []
    world = World()
    with Heartbeat(rank, size, group_store(), 600.0) as heart:
        trainer = train.make_trainer(config, world, heart, *train.check_inputs(config))
        newest = trainer.checkpoints.newest()
        aside = config.output_dir / CHECKPOINTS / "aside"
        if world.is_main:
            shutil.copytree(newest, aside)
        world.gather(None)
        for name in sorted(path.name for path in aside.iterdir()):
            for index, (what, _) in enumerate(damages(aside / name)):
                if world.is_main:
                    list(damages(newest / name))[index][1]()
                world.gather(None)
                trainer.progress.iteration = -1
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    trainer._resume()
                before = CheckpointReader(newest.with_name(f"iteration-{trainer.iteration:06d}"))
                same = all(
                    torch.equal(
                        piece.tensor, before.read(piece.name, piece.kind, piece.start, piece.start + len(piece.tensor))
                    )
                    for piece in trainer.engine.state_shards()
                )
                warned = " ".join(str(each.message) for each in caught)
                rows.append((name, what, trainer.iteration, all(world.gather(same)), warned))
                if world.is_main:
                    shutil.copy(aside / name, newest / name)
                world.gather(None)
    if rank == 0:
        told.write_text(json.dumps(rows))
