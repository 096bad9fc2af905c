"""No hang is silent: every rank says where it is, and a thread on every rank ends the process when one waits or dies.

The medium is a connection of its own (`clone`) to the process group's store: no port, folder or thread to agree on, and
the death of rank 0, which serves it, shows at once. Files in a shared folder would need one that all nodes mount, and
its client caches show news late. Rank 0 collects, the others read one table: one request per rank and beat.
"""

import atexit
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from datetime import timedelta
from itertools import groupby
from types import TracebackType

import torch.distributed as dist
from torch.distributed import distributed_c10d

from egrpo_fast.terminal import printable

EXIT_CODE = os.EX_TEMPFAIL
"""Of a process that the heartbeat ends: 75, nothing is wrong with the settings, the run may be resumed."""
HUSH = 2
"""Beats without news of a rank after which its silence is reported."""
LINGER = 4
"""Beats for which a rank that ends on its own account stays: the others read why, and it learns who fell silent."""
GRACE = 7
"""Beats for which a rank outlives another's failure: that one lingers, then prints its own traceback."""
FAREWELL = 30.0
"""Seconds that a failed rank has to end by itself."""
ABSENT = "not started"


@dataclass(frozen=True)
class Entry:
    """Where a rank is. count: its calls of `at`; seconds: since the last; silent: seconds since it was heard of."""

    count: int = 0
    phase: str = ABSENT
    detail: str = ""
    seconds: float = 0.0
    limit: float = float("inf")
    failure: str = ""
    closed: bool = False
    silent: float = 0.0

    @property
    def place(self) -> str:
        return f"{self.phase} {self.detail}".rstrip()


Table = Mapping[int, Entry]


def group_store() -> dist.Store:
    """The store that the default process group met at."""
    return distributed_c10d._get_default_store()


def name_ranks(ranks: Sequence[int]) -> str:
    """[1] -> 'rank 1'; [0, 2, 3, 4] -> 'ranks 0, 2-4'."""
    spans = []
    for _, run in groupby(enumerate(sorted(ranks)), lambda pair: pair[1] - pair[0]):
        first, *others = (rank for _, rank in run)
        spans.append(f"{first}-{others[-1]}" if others else str(first))
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(spans)}"


def describe(table: Table, hush: float = float("inf")) -> str:
    """One line for all ranks of one place and state, with the longest stay; silence above `hush` seconds is shown."""
    groups: dict[tuple[str, bool, str], list[int]] = {}
    for rank, entry in sorted(table.items()):
        groups.setdefault((entry.place, entry.silent > hush, entry.failure), []).append(rank)
    lines = []
    for (place, hushed, failure), ranks in groups.items():
        line = f"  {name_ranks(ranks)}: {place}, {max(table[rank].seconds for rank in ranks):.0f} s"
        silent = max(table[rank].silent for rank in ranks)
        line += f" (not heard of for {silent:.0f} s)" if hushed else ""
        lines.append(line + (f" (failed: {failure})" if failure else ""))
    return "\n".join(lines)


def culprits(table: Table, waiting: int) -> list[int]:
    """The ranks that the waiting one likely waits for; none where all that still run are at one place.

    `at` is called alike on every rank, so whoever called it least is behind; where all called it as often, whoever is
    elsewhere.
    """
    running = {rank: entry for rank, entry in table.items() if not entry.closed}
    if len({entry.place for entry in running.values()}) <= 1:
        return []
    least = min(entry.count for entry in running.values())
    behind = [rank for rank, entry in running.items() if entry.count == least]
    if len(behind) < len(running):
        return behind
    return [rank for rank, entry in running.items() if entry.place != running[waiting].place]


class Heartbeat:
    """Every rank says what it is doing; a thread ends the process, loudly, when one has waited too long or has died.

    rank, world_size: of the process group. store: the group's (`group_store`); None where there is one rank.
    stall_seconds: how long one entry may last unless `at` says otherwise. gone_seconds: a rank that is not heard of for
    so long is taken for dead; choose more than any one call holds Python's lock. beat: seconds between messages. A
    process that is killed on this machine is missed sooner, by the launcher.

    A process is ended with EXIT_CODE, after a block on stderr: where every rank is, whom it likely waits for and, where
    this rank is the one that waits, its threads' tracebacks. Should Python's lock be held too long for that, or stderr
    be stuck, faulthandler ends it with 1 (its one `dump_traceback_later` belongs to the heartbeat). One per process
    group, made on every rank. ValueError: a store is missing, or a number is not above 0 and finite.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store | None,
        stall_seconds: float,
        gone_seconds: float = 120.0,
        beat: float = 1.0,
    ):
        for name, value in (("stall_seconds", stall_seconds), ("gone_seconds", gone_seconds), ("beat", beat)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: {value}, allowed: above 0 and finite")
        if store is None and world_size > 1:
            raise ValueError(f"store: None for {world_size} ranks; give the process group's")
        self._rank = rank
        self._stall_seconds, self._gone_seconds, self._beat = stall_seconds, gone_seconds, beat
        self._failure = ""
        self._lost = ""
        self._closing = self._leaving = False
        self._wake = threading.Event()
        self._said = (1, "starting", "", time.monotonic(), stall_seconds)
        self._table: Table = {rank: self._mine()}
        self._failure_seen: float | None = None
        # What was last read under a key, and when it last changed.
        self._heard: dict[str, tuple[bytes, float]] = {}
        self._keys = []
        if store is not None and world_size > 1:
            self._server = store  # on rank 0 it is served as long as this reference lives
            self._store = dist.PrefixStore("heartbeat", store.clone())
            self._store.set_timeout(timedelta(seconds=gone_seconds))
            self._keys = [str(other) for other in range(1, world_size)] if rank == 0 else ["table"]
            for key in self._keys:
                self._store.compare_set(key, "", ABSENT)  # a key that is not there would block its reader
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self._leave)

    def at(self, phase: str, detail: str = "", limit: float | None = None) -> None:
        """This rank now does `phase` (with `detail`), for at most `limit` seconds; None: stall_seconds.

        Sets a variable and costs less than a microsecond. Call it alike on every rank: who called it least is behind.
        """
        self._said = (self._said[0] + 1, phase, detail, time.monotonic(), limit or self._stall_seconds)

    def failed(self, error: BaseException) -> None:
        """This rank is about to die of `error`: tell the others, and say where they are. Blocks for a few beats.

        It then has FAREWELL seconds to end by itself. Where there is one rank, the program may go on: nobody waits.
        """
        if not self._keys:
            return self.close()
        self._failure = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:300]
        where = self._mine().place
        self.at("failed in", where, FAREWELL)
        if self._keys and self._thread.is_alive():
            self._wake.set()
            time.sleep(LINGER * self._beat)
            gone = f"\nrank 0 is gone: its store does not answer ({self._lost})" if self._lost else ""
            _tell(f"rank {self._rank} failed in {where}: {self._failure}{gone}\n{self._where()}")

    def close(self) -> None:
        """The end of a run that went well. Rank 0, which may serve the store, waits here until all others closed."""
        self.at("waiting for the other ranks to close", limit=float("inf"))  # each of them is under its own limit
        self._closing = True
        self._wake.set()
        self._thread.join()
        atexit.unregister(self._leave)

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
        else:
            self.failed(error)

    def _mine(self) -> Entry:
        count, phase, detail, since, limit = self._said
        return Entry(count, phase, detail, time.monotonic() - since, limit, self._failure, self._closing)

    def _where(self) -> str:
        return describe(self._table, hush=HUSH * self._beat)

    def _watch(self) -> None:
        closed = False
        while not closed and not self._leaving:
            faulthandler.dump_traceback_later(self._stall_seconds + self._gone_seconds, exit=True)
            try:
                closed = not self._lost and self._exchange()
            except RuntimeError as error:
                self._lost = str(error).splitlines()[0]
            if not closed:
                self._judge()
                self._wake.wait(self._beat)
                self._wake.clear()
        faulthandler.cancel_dump_traceback_later()

    def _leave(self) -> None:
        """Python ends, after a failure: a thread that it froze inside a store call would abort the process."""
        self._leaving = True
        self._wake.set()
        self._thread.join(FAREWELL)
        faulthandler.dump_traceback_later(FAREWELL, exit=True)

    def _exchange(self) -> bool:
        """Publish where this rank is, read where the others are. True: this rank has closed and may leave."""
        mine = self._mine()
        if not self._keys:
            self._table = {self._rank: mine}
            return mine.closed
        if self._rank != 0:
            self._store.set(str(self._rank), json.dumps(astuple(mine)))
        heard, now = {}, time.monotonic()
        for key, raw in zip(self._keys, self._store.multi_get(self._keys)):
            before, changed = self._heard.get(key, (b"", now))
            self._heard[key] = (raw, changed if raw == before else now)
            heard[key] = None if raw == ABSENT.encode() else json.loads(raw)
        silent = {key: now - changed for key, (_, changed) in self._heard.items()}
        if self._rank == 0:
            others = {int(key): replace(Entry(*(entry or ())), silent=silent[key]) for key, entry in heard.items()}
            self._table = {0: mine, **others}
            self._store.set("table", json.dumps([astuple(entry) for entry in self._table.values()]))
            return mine.closed and all(entry.closed for entry in others.values())
        first, *rest = (Entry(*entry) for entry in heard["table"] or [()])
        self._table = dict(enumerate([replace(first, silent=silent["table"]), *rest])) | {self._rank: mine}
        return mine.closed

    def _judge(self) -> None:
        """End this process where it has waited too long, or another rank has failed or is gone."""
        mine, now = self._mine(), time.monotonic()
        others = {rank: entry for rank, entry in self._table.items() if rank != self._rank and not entry.closed}
        failures = [f"rank {rank} failed: {entry.failure}" for rank, entry in others.items() if entry.failure]
        gone = [
            f"rank {rank} is gone: not heard of for {entry.silent:.0f} s, last in {entry.place}"
            for rank, entry in others.items()
            if entry.silent > self._gone_seconds
        ]
        if mine.seconds > mine.limit:
            self._end(f"rank {self._rank} waited {mine.seconds:.0f} s in {mine.place}{self._hint()}", traceback=True)
        elif mine.failure:
            return
        elif failures:
            self._failure_seen = self._failure_seen or now
            if self._lost or now - self._failure_seen > GRACE * self._beat:
                self._end("\n".join(failures))
        elif gone:
            self._end("\n".join(gone))
        elif self._lost:
            self._end(f"rank 0 is gone: its store does not answer ({self._lost}), last in {self._table[0].place}")

    def _hint(self) -> str:
        behind = culprits(self._table, self._rank)
        if self._rank in behind:
            return "\nthe others likely wait for it: it came least far"
        if behind:
            return f"\nlikely for {name_ranks(behind)}, which came less far"
        if len(self._table) > 1:
            return "\nall ranks are at the same place: a collective that does not finish (network, device)?"
        return ""

    def _end(self, verdict: str, traceback: bool = False) -> None:
        # Whatever of the following should block.
        faulthandler.dump_traceback_later(2 * LINGER * self._beat + self._gone_seconds, exit=True)
        _tell(f"{verdict}\n{self._where()}\nrank {self._rank} ends with status {EXIT_CODE}")
        if traceback:
            faulthandler.dump_traceback(file=2, all_threads=True)
        if self._failure_seen is None and self._keys and not self._lost:
            self._failure = self._failure or verdict.splitlines()[0]
            with suppress(RuntimeError):
                for _ in range(LINGER):
                    self._exchange()
                    time.sleep(self._beat)
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, ValueError, OSError):
                stream.flush()
        os._exit(EXIT_CODE)


def _tell(text: str) -> None:
    """To the descriptor itself: sys.stderr may be captured, or locked by the thread that hangs."""
    with suppress(OSError):
        os.write(2, f"\n[heartbeat] {printable(text)}\n".encode())
