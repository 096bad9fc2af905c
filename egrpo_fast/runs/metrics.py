"""What a run tells: progress bar, seconds by phase, JSONL, TensorBoard, W&B if asked for. Rank 0 only."""

import io
import json
import math
import resource
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.profiler import record_function
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from egrpo_fast.files import read_bytes, sync
from egrpo_fast.folder_lock import Claim
from egrpo_fast.terminal import Attempts

METRICS = "metrics.jsonl"
ITERATION = ("rollout", "rewards", "update", "tail check")
"""Phases of an iteration, without evaluation and checkpoint."""
BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


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


@dataclass(frozen=True)
class Work:
    """Of an iteration. images: of all ranks. flops: of one rank's model calls. peak: FLOP/s of its device, if known."""

    images: int
    flops: float = 0.0
    peak: float | None = None

    def speed(self, seconds: Mapping[str, float], device: torch.device) -> dict[str, float]:
        """seconds: of an iteration, by `Stopwatch.read`. What was done in them, and the peak memory of this rank."""
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        told = {"peak_memory_gib": memory / 2**30}
        if (spent := sum(seconds.get(f"seconds/{phase}", 0.0) for phase in ITERATION)) > 0:
            told["images_per_second"] = self.images / spent
            if self.flops:
                told["model_tflops_per_second"] = self.flops / spent / 1e12
            if self.flops and self.peak:
                told["share_of_peak"] = self.flops / spent / self.peak
        return {f"speed/{name}": value for name, value in told.items()}


class RunLog:
    """One line of JSON per iteration or evaluation in `metrics.jsonl`, mirrored to TensorBoard and the progress bar.

    start: iterations already done; lines of later ones, left by an interrupted run, are cut off, and so is that of the
    evaluation at `start` where it is not `evaluated`. claim: of the folder; nothing is written once it is another.

    What cannot be written ends no run: it is reported once, kept and written with the next line.
    ValueError: there is a log that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        iterations: int,
        start: int = 0,
        evaluated: bool = True,
        wandb_config: Mapping[str, Any] | None = None,
        claim: Claim | None = None,
    ):
        self._path, self._claim, self._attempt = folder / METRICS, claim, Attempts()
        ends = {True: start, False: start if evaluated else start - 1}  # by whether a line is an iteration's
        kept = [end for end, line in _finished_lines(self._path) if _is_line(line) and
                line["iteration"] <= ends["skipped_steps" in line]]  # fmt: skip
        self._end = max(kept, default=0)
        self._unwritten: list[str] = []
        self._unshown: list[tuple[int, Mapping[str, float]]] = []
        self._board: SummaryWriter | None = None
        self._purge: int | None = start + 1
        with self._attempt(METRICS):
            self._append()
        # A terminal is drawn at once, a file that somebody reads later now and then.
        pause = 0.1 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=iterations, initial=start, desc="training", bar_format=BAR, mininterval=pause, dynamic_ncols=True
        )
        self._wandb: Any = None
        if wandb_config is not None:
            with self._attempt("wandb"):
                import wandb

                name = folder / "wandb_id"
                if not start or not name.is_file():
                    name.write_text(uuid.uuid4().hex)
                self._wandb = wandb.init(
                    project="egrpo_fast", id=name.read_text(), dir=str(folder), config=dict(wandb_config),
                    resume="allow",
                )  # fmt: skip

    @staticmethod
    def read(folder: Path) -> list[dict[str, Any]]:
        """All lines of a run. One that a killed run did not finish is none; damaged ones are left out, with a warning.

        ValueError: the log cannot be read.
        """
        lines = [line for _, line in _finished_lines(folder / METRICS)]
        if damaged := sum(not _is_line(line) for line in lines):
            warnings.warn(f"{folder / METRICS}: {damaged} damaged line(s) are left out", stacklevel=2)
        return [line for line in lines if _is_line(line)]

    def write(self, iteration: int, values: Mapping[str, float], notes: Mapping[str, Any] | None = None) -> None:
        """iteration: iterations done so far. One JSON line, TensorBoard scalars, W&B; the notes in the line alone.

        Values that are not finite, which JSON does not know, are left out.
        """
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._unwritten.append(json.dumps({"iteration": iteration, **values, **(notes or {})}) + "\n")
        self._unshown.append((iteration, values))
        with self._attempt(METRICS):
            self._append()
        with self._attempt("tensorboard"):
            self._show()
        if self._wandb is not None:
            with self._attempt("wandb"):
                self._wandb.log(dict(values), step=iteration)

    def picture(self, iteration: int, name: str, png: bytes, caption: str) -> None:
        """A picture for TensorBoard and W&B."""
        with self._attempt("tensorboard"):
            self._show()
            assert self._board is not None
            self._board.add_image(name, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), iteration,
                                  dataformats="HWC")  # fmt: skip
        if self._wandb is not None:
            with self._attempt("wandb"):
                import wandb

                shown = wandb.Image(Image.open(io.BytesIO(png)), caption=caption)
                self._wandb.log({name: shown}, step=iteration)

    def sync(self) -> None:
        """Every line so far is on the disk and survives a power cut, or a warning said that it may not."""
        with self._attempt(METRICS):
            self._append()
            sync(self._path)
            sync(self._path.parent)

    def _append(self) -> None:
        """Write the lines that are not in the file yet, over what a failed attempt or an earlier run may have left."""
        if self._claim:
            self._claim.check()
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
        if self._claim:
            self._claim.check()
        try:
            if self._board is None:
                self._board = SummaryWriter(str(self._path.parent / "tensorboard"), purge_step=self._purge)
                self._purge = None
            for iteration, values in self._unshown:
                for name, value in values.items():
                    self._board.add_scalar(name, value, iteration)
            self._board.flush()
        except Exception:
            self._board = None
            raise
        self._unshown.clear()

    def advance(self, **shown: float) -> None:
        """Move the progress bar by one iteration, with these numbers beside it."""
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        self._bar.write(text)

    def end_bar(self) -> None:
        """No more iterations are to come: what is printed from now on stands below the bar."""
        self._bar.close()

    def close(self) -> None:
        """No more lines are to come. Lines that still cannot be written are lost, and a warning names them."""
        self.end_bar()
        with self._attempt("tensorboard"):
            self._show()
            if self._board is not None:
                self._board.close()
        if self._wandb is not None:
            with self._attempt("wandb"):
                self._wandb.finish()
        try:
            self._append()
        except OSError as error:
            at = ", ".join(str(json.loads(line)["iteration"]) for line in self._unwritten) or "none"
            message = f"{METRICS}: {error.strerror or error}; lost are the lines of these iterations: {at}"
            warnings.warn(message, stacklevel=2)


def _finished_lines(path: Path) -> list[tuple[int, Any]]:
    """Where every line with an end has it, in bytes, and what it says; None: it is not JSON. ValueError: unreadable."""
    try:
        raw = read_bytes(path, 1 << 32) if path.exists() else b""
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    lines, end = [], 0
    for line in raw.split(b"\n")[:-1]:
        end += len(line) + 1
        try:
            lines.append((end, json.loads(line)))
        except (ValueError, RecursionError):
            lines.append((end, None))
    return lines


def _is_line(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("iteration"), int)
