"""What a forked rank runs: the command's own `main`, with a reward or a moment at which something goes wrong."""

import itertools
import os
import signal
import sys
import time

from egrpo_fast import train
from egrpo_fast.heartbeat import Heartbeat
from egrpo_fast.rewards.shapes import ShapesSoft


class FaultyReward(ShapesSoft):
    """`shapes_soft` that raises, hangs or returns NaN in some of its calls in training.

    With one wavefront of few pictures per rank and iteration, call n is iteration n of this process. An evaluation
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


def run_rank(rank, size, port, arguments, log, phase_file, signal_at):
    """`train.py shapes ARGUMENTS` as one rank. Its output goes to `log`, the phase it is in to `phase_file`.

    signal_at: None, or (signal, phase, n): it sends itself the signal when it enters the phase for the n-th time.
    """
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size), ("MASTER_PORT", port)):
        os.environ[name] = str(value)
    # As the shell starts a process: pytest and what it forks may ignore or handle these.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
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
