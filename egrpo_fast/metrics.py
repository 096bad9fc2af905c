"""What a run tells: progress bar, seconds by phase, JSONL, TensorBoard, W&B if asked for. Rank 0 only."""

import json
import math
import os
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

METRICS = "metrics.jsonl"


class Stopwatch:
    """Seconds spent in named phases since the last `read`; a profiler's trace shows them by these names."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        with record_function(name):
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def read(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, {}
        return {f"seconds/{name}": value for name, value in seconds.items()}


class RunLog:
    """One line of JSON per iteration or evaluation in `metrics.jsonl`, mirrored to TensorBoard and the progress bar.

    start: iterations already done; lines of later ones, left by an interrupted run, are dropped, and so is that of the
    evaluation at `start` where it is not `evaluated`. A disk that takes no more ends no run: what is unwritten is told,
    kept and written with the next line; only `close` raises.
    """

    def __init__(
        self,
        folder: Path,
        iterations: int,
        start: int = 0,
        evaluated: bool = True,
        wandb_config: Mapping[str, Any] | None = None,
    ):
        self._path = folder / METRICS
        ends = {True: start, False: start if evaluated else start - 1}  # by whether a line is an iteration's
        kept = [line for line in self.read(folder) if line["iteration"] <= ends["skipped_steps" in line]]
        beside = self._path.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        beside.replace(self._path)
        self._end = self._path.stat().st_size
        self._unwritten: list[str] = []
        self._unshown: list[tuple[int, Mapping[str, float]]] = []
        self._board: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(total=iterations, initial=start, desc="training", unit="it", dynamic_ncols=True)
        self._wandb = None
        if wandb_config is not None:
            import wandb

            name = folder / "wandb_id"
            if not start or not name.is_file():
                name.write_text(uuid.uuid4().hex)
            self._wandb = wandb.init(
                project="egrpo_fast", id=name.read_text(), dir=str(folder), config=dict(wandb_config), resume="allow"
            )

    @staticmethod
    def read(folder: Path) -> list[dict[str, Any]]:
        """All lines of a run; a last one that a killed run did not finish is none."""
        path = folder / METRICS
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def write(self, iteration: int, values: Mapping[str, float], notes: Mapping[str, Any] | None = None) -> None:
        """iteration: iterations done so far. One JSON line, TensorBoard scalars, W&B; the notes in the line alone.

        Values that are not finite, which JSON does not know, are left out.
        """
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._unwritten.append(json.dumps({"iteration": iteration, **values, **(notes or {})}) + "\n")
        self._unshown.append((iteration, values))
        with self._or_warn():
            self._append()
            self._show()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=iteration)

    def sync(self) -> None:
        """Every line so far is on the disk and survives a power cut, or a warning says that it may not."""
        with self._or_warn():
            self._append()
            for path in (self._path, self._path.parent):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def _append(self) -> None:
        """Write the lines that are not in the file yet, over what a failed attempt may have left of them."""
        with self._path.open("ab", buffering=0) as file:
            file.truncate(min(file.tell(), self._end))
            rest = "".join(self._unwritten).encode()
            while rest:
                rest = rest[file.write(rest) :]
            end = file.tell()
        self._end = end
        self._unwritten.clear()

    def _show(self) -> None:
        """The same for TensorBoard. Its writer, once failed, fails for good: a new one goes on, in its own file."""
        try:
            if self._board is None:
                self._board = SummaryWriter(str(self._path.parent / "tensorboard"))
            for iteration, values in self._unshown:
                for name, value in values.items():
                    self._board.add_scalar(name, value, iteration)
            self._board.flush()
        except OSError:
            self._board = None
            raise
        self._unshown.clear()

    @contextmanager
    def _or_warn(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"{len(self._unshown)} line(s) wait in memory and are written with the next"
            warnings.warn(f"{METRICS} and tensorboard: {error.strerror or error}; {kept}", stacklevel=4)

    def advance(self, **shown: float) -> None:
        """Move the progress bar by one iteration, with these numbers beside it."""
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        self._bar.write(text)

    def close(self) -> None:
        """OSError: lines are lost, the disk would still not take them."""
        self._bar.close()
        with self._or_warn():
            self._show()
            if self._board is not None:
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        try:
            self._append()
        except OSError as error:
            lost = f"{METRICS}: {len(self._unwritten)} line(s) could not be written: {error.strerror or error}"
            raise OSError(error.errno, lost) from error
