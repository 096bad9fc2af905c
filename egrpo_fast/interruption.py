"""SIGTERM and Ctrl-C: the run ends at the next safe place with a checkpoint, or by force when that takes too long."""

import os
import signal
import sys
import threading
import time
from types import FrameType

EXIT_CODES: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 130}
"""Of a run that was asked to end and left a checkpoint: a machine that is taken back is no failure."""
FORCED = 143
ECHO = 3.0
"""Seconds in which another signal is an echo of the first: launchers pass on what their whole group was sent."""


class Interruption:
    """Remembers that the process was asked to end. The first signal asks; one after ECHO, or `seconds` later, forces."""

    def __init__(self, seconds: float) -> None:
        self.signal = 0
        self._since = 0.0
        self._seconds = seconds
        for number in EXIT_CODES:
            signal.signal(number, self._asked)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            if time.monotonic() - self._since > ECHO:
                self._force("asked again")
            return
        self.signal, self._since = number, time.monotonic()
        os.write(2, f"\n{signal.Signals(number).name}: ending with a checkpoint; once more, {ECHO:.0f} s from now, ends at once\n".encode())
        timer = threading.Timer(self._seconds, self._force, [f"not done {self._seconds:.0f} s after being asked"])
        timer.daemon = True
        timer.start()

    def _force(self, why: str) -> None:
        os.write(2, f"\n{why}: ended at once; the last complete checkpoint stands, resume=true continues\n".encode())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(FORCED)
