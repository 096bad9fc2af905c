"""Where this rank is: iteration and phase, for heartbeat and stopwatch; and where all ranks agree to leave it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from egrpo_fast.distributed.heartbeat import Heartbeat
from egrpo_fast.distributed.signals import Interruption
from egrpo_fast.distributed.world import World
from egrpo_fast.runs.metrics import Stopwatch

OUT_OF_MEMORY = 1 << 10
"""What a rank tells the others in place of a signal's number; above all of them."""


class ShutdownRequested(Exception):
    """Some rank was asked to end, by this signal; raised on all ranks at the same place."""

    def __init__(self, signal: int) -> None:
        self.signal = signal


class OutOfMemory(Exception):
    """Some rank's device ran out of memory in a rollout; raised on all ranks."""


class Progress:
    """iteration: done so far. committed: the one under way has changed the weights, so it is brought to its end.

    Of the thread that makes it: other threads say nothing, for every rank must say the same in the same order.
    """

    def __init__(self, world: World, heart: Heartbeat, interruption: Interruption) -> None:
        self._world, self._heart, self._interruption = world, heart, interruption
        self.stopwatch = Stopwatch(world.device)
        self.iteration, self.committed, self._thread = 0, False, threading.get_ident()

    def at(self, place: str, detail: str = "") -> None:
        """What this rank does now, for the heartbeat."""
        if threading.get_ident() == self._thread:
            self._heart.at(place, f"(iteration {self.iteration + 1}{detail})")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the iteration, with its seconds in the log."""
        self.at(name)
        with self.stopwatch.phase(name):
            yield

    def at_model_call(self, t: float) -> None:
        """Before every model call of a rollout: every rank makes the same ones."""
        self.at("model call", f", t = {t:.3f}")
        self.check_shutdown()

    def check_shutdown(self, out_of_memory: bool = False) -> None:
        """ShutdownRequested or OutOfMemory, where one was asked to end or is out of memory.

        Not where the iteration is committed.
        """
        if self.committed:
            return
        message = self._world.max_on_host(OUT_OF_MEMORY if out_of_memory else self._interruption.signal)
        if message == OUT_OF_MEMORY:
            raise OutOfMemory
        if message:
            raise ShutdownRequested(message)
