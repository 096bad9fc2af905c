"""SIGTERM, Ctrl-C, a closed terminal: the run ends at the next safe place with a checkpoint, or late, by force."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

EXIT_CODES: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}
"""Of a run that was asked to end and left a checkpoint: a machine that is taken back is no failure."""
FORCED = 143
ECHO = 3.0
"""Seconds in which another signal is an echo of the first: launchers pass on what their whole group was sent."""


class Interruption:
    """Remembers that the process was asked to end. The first signal asks; one after ECHO, or `seconds`, forces."""

    def __init__(self, seconds: float) -> None:
        self.signal = 0
        self._since = 0.0
        self._seconds = seconds
        for number in EXIT_CODES:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # else nohup was asked for
                signal.signal(number, self._asked)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            if time.monotonic() - self._since > ECHO:
                self._force("asked again")
            return
        self.signal, self._since = number, time.monotonic()
        self._tell(f"{signal.Signals(number).name}: ending with a checkpoint; again in {ECHO:.0f} s: at once, without")
        timer = threading.Timer(self._seconds, self._force, [f"not done {self._seconds:.0f} s after being asked"])
        timer.daemon = True
        timer.start()

    def _force(self, why: str) -> None:
        self._tell(f"{why}: ended at once; the last complete checkpoint, if there is one, stands (resume=true)")
        os._exit(FORCED)  # no flush: whoever hangs may hold the stream

    def _tell(self, text: str) -> None:
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())
