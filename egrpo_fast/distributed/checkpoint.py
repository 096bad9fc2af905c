"""Checkpoints as files: every rank writes its own pieces beside, and one atomic rename makes them current.

    <folder>/iteration-000050/rank-00000-of-00002.safetensors    tensors "<kind>/<name>" and "local/<name>"
                              rank-00001-of-00002.safetensors
                              checkpoint.json                    state, where every piece lies, size and CRC-32 of files
    <folder>/iteration-000060.<attempt>.partial/                 being written, or left by a run that was killed
    <folder>/iteration-000060.<attempt>.failed                   why a rank gave this attempt up, for the others to read
    <folder>/iteration-000050.old/                               stands in while a repeated iteration-000050 takes over
    <folder>/iteration-000030.<word>.deleted/                    on its way out

What is saved comes from `Engine.state_shards` (weights, averages, moments) and `TrainingLoop.save` (the state).

Ranks meet in the files alone, never in a collective, so that a thread may write while training goes on; they must
share the filesystem. Safetensors and JSON only: reading a checkpoint executes nothing.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from egrpo_fast.files import follow_umask, read_bytes, sync, write_whole
from egrpo_fast.folder_lock import Claim

FORMAT = 1
INDEX = "checkpoint.json"
LOCAL = "local"
POLL = 0.02  # seconds between two looks at what other ranks have written
_COMPLETE = re.compile(r"iteration-(\d{6,})(\.old)?")
_DEBRIS = re.compile(r"iteration-\d{6,}\..*(partial|failed|deleted)")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""


@dataclass(frozen=True)
class Piece:
    """One rank's contiguous part [start, start + tensor.numel()) of the flattened tensor `name` of `shape`.

    kind: "weight", "ema", or an optimizer state's key such as "exp_avg". Over all ranks the pieces of one (kind, name)
    tile the tensor exactly; a rank may hold none, and gives at most one.
    """

    name: str
    kind: str
    start: int
    shape: tuple[int, ...]
    tensor: Tensor


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _checksum(path: Path) -> int:
    """CRC-32: sees every flipped bit and burst of up to 32, and is several times faster to compute than SHA-256."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sealed(content: Mapping[str, Any]) -> bytes:
    """JSON with a checksum of itself."""
    return json.dumps({**content, "crc32": zlib.crc32(json.dumps(content).encode())}).encode()


def _write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, _sealed(content))


def _read_sealed(path: Path) -> dict[str, Any]:
    """What `_write_sealed` wrote. ValueError: the file is missing, or a byte of it is not what was written."""
    try:
        raw = read_bytes(path, 1 << 30)
        content = json.loads(raw)
        del content["crc32"]
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path.name}: damaged (it is not the JSON that was written)") from None
    if _sealed(content) != raw:
        raise ValueError(f"{path.name}: damaged (its checksum differs)")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path.name}: format {content.get('format')}, this version reads format {FORMAT}")
    return content


def _wrong_size(path: Path, size: int) -> str | None:
    """What is wrong with a file at first sight; None: nothing."""
    try:
        found = path.stat().st_size
    except OSError as error:
        return f"{path.name}: cannot be read ({error.strerror})"
    return None if found == size else f"{path.name}: {found} bytes, {size} were written"


@contextlib.contextmanager
def _or_warn(path: Path) -> Iterator[None]:
    """What cannot be deleted, such as a file that another machine has open, costs space and no run."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"checkpoint: {path} could not be deleted and takes up space: {error.strerror}", stacklevel=4)


def _discard(path: Path) -> None:
    """Delete a checkpoint; killed halfway, nothing is left that looks like one."""
    going = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.deleted")
    with _or_warn(path):
        path.rename(going)
        shutil.rmtree(going)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep a complete checkpoint from being pruned while it is read. Any number of processes may hold one.

    ValueError: it is gone. Or, at the end: it was deleted or written anew meanwhile, so what was read may be of two. A
    run that repeats an iteration does that, and pruning on a filesystem that has no locks.
    """

    def is_there() -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(index.fileno()), (path / INDEX).stat())
        return False

    try:
        index = (path / INDEX).open("rb")
    except OSError as error:
        raise ValueError(f"checkpoint: {path / INDEX} cannot be read: {error.strerror}") from None
    with index:
        with contextlib.suppress(OSError):
            fcntl.flock(index, fcntl.LOCK_SH)
        if not is_there():
            raise ValueError(f"checkpoint: {path} was deleted by its run just now")
        try:
            yield
        except (OSError, ValueError):
            if is_there():
                raise
        if not is_there():
            raise ValueError(f"checkpoint: {path} was deleted or written anew by its run while it was read; try again")


def _discard_unless_held(path: Path) -> None:
    with contextlib.ExitStack() as stack:
        try:
            index = stack.enter_context((path / INDEX).open("r+b"))  # for writing: network filesystems want it
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # the pruning after the next checkpoint finds it again
        except OSError:
            pass  # no checkpoint.json, or no locks
        _discard(path)


def _memory_available() -> float:
    """Bytes of host memory that programs can still take; where the system does not say, infinitely many."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else math.inf


def _stage(
    pieces: Iterable[Piece], local: Mapping[str, Tensor], local_ranks: int
) -> tuple[dict[str, Tensor], list[list[Any]]]:
    """Copies on the host under their names in the file, and rows [kind, name, shape, dtype, start, stop].

    CheckpointError: host memory does not hold the copies of `local_ranks` such ranks and a twentieth to spare.
    """
    available, needed, fits = _memory_available(), 0, True
    tensors: dict[str, Tensor] = {}
    rows: list[list[Any]] = []

    def copy(key: str, tensor: Tensor) -> None:
        """Looks before every tensor, for other ranks' copies grow too; what does not fit is counted to the end."""
        nonlocal needed, fits
        needed += tensor.nbytes
        fits = fits and available / 20 + tensor.nbytes * local_ranks <= _memory_available()
        if fits:
            tensors[key] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        else:
            tensors.clear()

    seen: set[str] = set()
    for piece in pieces:
        stop, whole, key = piece.start + piece.tensor.numel(), math.prod(piece.shape), f"{piece.kind}/{piece.name}"
        if piece.kind == LOCAL or "/" in piece.kind:
            raise ValueError(f"kind: {piece.kind!r} of {piece.name}; it must not be {LOCAL!r} nor contain a slash")
        if not 0 <= piece.start <= stop <= whole:
            raise ValueError(f"pieces: [{piece.start}, {stop}) of {key} is outside its {whole} elements")
        if key in seen:
            raise ValueError(f"pieces: a second piece of {key}; a rank gives at most one")
        if stop > piece.start or whole == 0:
            seen.add(key)
            copy(key, piece.tensor.reshape(-1))
            rows.append([piece.kind, piece.name, list(piece.shape), _dtype(piece.tensor), piece.start, stop])
    for name, tensor in local.items():
        copy(f"{LOCAL}/{name}", tensor)
    if not fits:
        raise CheckpointError(
            f"{needed * local_ranks:,} bytes of host memory are needed for the copies of {local_ranks} rank(s) on this "
            f"machine, {available:,} were available, of which a twentieth stays free"
        )
    return tensors, rows


def _table(rows_of_ranks: Iterable[Iterable[Sequence[Any]]]) -> dict[str, dict[str, Any]]:
    """Kind -> name -> shape, dtype, and pieces [rank, start, stop] in order; CheckpointError where they do not tile."""
    table: dict[str, dict[str, Any]] = {}
    for rank, rows in enumerate(rows_of_ranks):
        for kind, name, shape, dtype, start, stop in rows:
            about = {"shape": shape, "dtype": dtype}
            entry = table.setdefault(kind, {}).setdefault(name, {**about, "pieces": []})
            if any(entry[key] != value for key, value in about.items()):
                raise CheckpointError(f"{kind}/{name}: rank {rank} has another shape or dtype than the ranks before it")
            entry["pieces"].append([rank, start, stop])
    for kind, entries in table.items():
        for name, entry in entries.items():
            entry["pieces"].sort(key=lambda piece: piece[1:])
            starts, stops = zip(*(piece[1:] for piece in entry["pieces"]))
            if (*starts, math.prod(entry["shape"])) != (0, *stops):
                raise CheckpointError(f"{kind}/{name}: pieces {entry['pieces']} do not tile shape {entry['shape']}")
    return table


class _Attempt:
    """One rank's part in writing one checkpoint."""

    def __init__(
        self, folder: Path, iteration: int, attempt: str, rank: int, world_size: int, timeout: float,
        claim: Claim | None,
    ) -> None:  # fmt: skip
        self.rank, self.world_size, self.timeout, self.attempt = rank, world_size, timeout, attempt
        self._claim = claim
        self.current = folder / f"iteration-{iteration:06d}"
        self.partial = folder / f"{self.current.name}.{attempt}.partial"
        self.failed = folder / f"{self.current.name}.{attempt}.failed"
        self._file = self.partial / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
        self._announced = False  # from here on rank 0 may make the file current

    def run(self, tensors: Mapping[str, Tensor], rows: list[list[Any]], index: dict[str, Any]) -> None:
        """Write, verify, and return when the whole checkpoint is current. CheckpointError, on every rank: it is not."""
        try:
            if self.failed.exists():
                raise CheckpointError("another rank gave it up")
            self._make_folder(self.partial)
            if self.rank == 0:
                self._clear()
            self._write(tensors, rows)
            if self.rank == 0:
                self._assemble(index)
                self._publish()
            else:
                self._until(lambda: not self.partial.exists())
                if _read_sealed(self.current / INDEX)["attempt"] != self.attempt:
                    raise CheckpointError("rank 0 gave it up")
        except Exception as error:
            raise self.given_up(error) from error

    def _write(self, tensors: Mapping[str, Tensor], rows: list[list[Any]]) -> None:
        # All ranks hold about as much and write to one disk; a hundredth is for headers and checkpoint.json.
        needed = self.world_size * sum(tensor.nbytes for tensor in tensors.values()) * 101 // 100
        free = shutil.disk_usage(self.partial).free
        written = sum(512 * path.stat().st_blocks for path in self.partial.glob("*.safetensors"))
        if free + written < needed:
            raise CheckpointError(
                f"{free + written:,} bytes are free under {self.partial.parent}, {needed:,} are needed "
                f"for the {self.world_size} rank(s)"
            )
        file = self._file
        save_file(dict(tensors), file)
        follow_umask(file)
        sync(file)
        with safe_open(file, "pt") as staged:
            for key, tensor in tensors.items():
                # As bytes: NaN is equal to itself.
                found, meant = (t.reshape(-1).view(torch.uint8) for t in (staged.get_tensor(key), tensor))
                if not torch.equal(found, meant):
                    raise CheckpointError(f"{key} reads back other than it was written to {file.name}")
        about = {"name": file.name, "bytes": file.stat().st_size, "crc32": _checksum(file)}
        self._announced = True
        _write_sealed(self._sidecar(self.rank), {"format": FORMAT, "file": about, "rows": rows})

    def _clear(self) -> None:
        """Remove what killed and failed saves have left; other ranks may be writing this one."""
        for path in self.partial.parent.glob("iteration-*"):
            if _DEBRIS.fullmatch(path.name) and not path.name.startswith(f"{self.partial.stem}."):
                with _or_warn(path):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _make_folder(self, folder: Path) -> None:
        """OSError: the run's folder was moved away, so that its old place would come back with this alone in it."""
        if self._claim:
            self._claim.check()
        folder.mkdir(parents=True, exist_ok=True)

    def _sidecar(self, rank: int) -> Path:
        return self.partial / f"rank-{rank:05d}.json"

    def _until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.timeout
        while not done():
            if self.failed.exists():
                raise CheckpointError("another rank gave it up")
            if time.monotonic() > deadline:
                silent = [str(rank) for rank in range(self.world_size) if not self._sidecar(rank).exists()] or ["0"]
                raise CheckpointError(f"waited {self.timeout:g} s in vain for rank {', '.join(silent)}")
            time.sleep(POLL)

    def _assemble(self, index: dict[str, Any]) -> None:
        sidecars = [self._sidecar(rank) for rank in range(self.world_size)]
        self._until(lambda: all(sidecar.exists() for sidecar in sidecars))
        parts = [_read_sealed(sidecar) for sidecar in sidecars]
        files = [each["file"] for each in parts]
        if wrong := [bad for file in files if (bad := _wrong_size(self.partial / file["name"], file["bytes"]))]:
            raise CheckpointError("; ".join(wrong))
        table = _table(each["rows"] for each in parts)
        _write_sealed(self.partial / INDEX, {**index, "attempt": self.attempt, "files": files, "tensors": table})
        for sidecar in sidecars:
            sidecar.unlink()
        sync(self.partial)

    def _publish(self) -> None:
        old = self.current.with_name(f"{self.current.name}.old")
        if self.current.exists():
            if old.exists():
                _discard(old)
            self.current.rename(old)
        self.partial.rename(self.current)
        sync(self.current.parent)
        if old.exists():
            _discard(old)

    def given_up(self, error: Exception) -> CheckpointError:
        """Leave nothing of this attempt but the first rank's reason, which is also returned.

        Files that were announced are rank 0's to remove: it may just be making them current.
        """
        reason = f"rank {self.rank}: {error}"
        with contextlib.suppress(OSError):  # a disk may be too full even for this; then the others say less
            self._make_folder(self.failed.parent)
            if not self.failed.exists():
                beside = self.failed.with_name(f"{self.failed.stem}.{self.rank}.failed")
                beside.write_text(reason)
                beside.replace(self.failed)
            reason = self.failed.read_text()
        if self.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        elif not self._announced:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)
                self.partial.rmdir()  # where it is empty
        return CheckpointError(f"{self.current.name} is not written: {reason}")


class Checkpoints:
    """The checkpoints of a run, in a folder that all ranks share.

    keep: newest ones kept beside the best. asynchronous: write in a thread while training goes on. timeout: seconds
    that a rank which has written waits for the others, the slowest disk's writing and reading back included.
    local_ranks: the ranks on this machine, who share its memory. claim: of the run's folder; what is written bears its
    `run`, and nothing is written once the folder is another.
    """

    def __init__(
        self,
        folder: Path,
        rank: int = 0,
        world_size: int = 1,
        keep: int = 2,
        asynchronous: bool = True,
        timeout: float = 1800.0,
        local_ranks: int = 1,
        claim: Claim | None = None,
    ) -> None:
        self.folder, self.rank, self.world_size, self.keep, self.timeout = folder, rank, world_size, keep, timeout
        self.local_ranks, self.claim = local_ranks, claim
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None

    def save(
        self,
        iteration: int,
        pieces: Iterable[Piece],
        local: Mapping[str, Tensor],
        state: Mapping[str, Any],
        attempt: str,
        best: bool = False,
    ) -> None:
        """Write this rank's part; every rank calls it. Tensors are copied to host memory first, and may then change.

        local: what only this rank, of this many, can read back. state: JSON of the trainer; rank 0's counts. attempt: a
        word that no other save has had, equal on all ranks. best: keep this one until another best.

        Waits for the save before it, and raises CheckpointError if that one failed: this one is then not begun; and
        where host memory does not hold the copies.
        """
        if not re.fullmatch(r"[\w-]+", attempt):
            raise ValueError(f"attempt: {attempt!r}; letters, digits, _ and - are allowed")
        self.wait()
        index = {
            "format": FORMAT,
            "iteration": iteration,
            "run": self.claim.run if self.claim else "",
            "world_size": self.world_size,
            "best": best,
            "state": json.loads(json.dumps(state)),
        }
        part = _Attempt(self.folder, iteration, attempt, self.rank, self.world_size, self.timeout, self.claim)
        try:
            tensors, rows = _stage(pieces, local, self.local_ranks)
        except CheckpointError as error:
            raise part.given_up(error) from error
        if self._writer is None:
            self._write(part, tensors, rows, index)
        else:
            self._pending = self._writer.submit(self._write, part, tensors, rows, index)

    def wait(self) -> None:
        """Until the last save is current, on all ranks. CheckpointError, once: it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> Path | None:
        """The complete checkpoint of the highest iteration; whether it is sound is for `problems` to say."""
        return next(reversed(self.all()), None)

    def all(self) -> list[Path]:
        """The complete checkpoints by iteration. ValueError: whether there are any cannot be seen."""
        try:
            return [path for _, path in sorted(self._complete().items())]
        except OSError as error:
            raise ValueError(f"checkpoint: {self.folder} cannot be read: {error.strerror}") from None

    def _complete(self) -> dict[int, Path]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            if self.folder.is_symlink():
                raise  # where it leads to is away: a disk that is not mounted
            names = []
        # Reversed: the checkpoint itself comes after its stand-in.
        found = [(match, name) for name in sorted(names, reverse=True) if (match := _COMPLETE.fullmatch(name))]
        return {int(match[1]): self.folder / name for match, name in found}

    def _write(
        self, part: _Attempt, tensors: Mapping[str, Tensor], rows: list[list[Any]], index: dict[str, Any]
    ) -> None:
        part.run(tensors, rows, index)
        if self.rank == 0:
            with _or_warn(self.folder):
                self._prune(index["iteration"])

    def _prune(self, iteration: int) -> None:
        """Newer ones than this are left alone: a run that went back has not come to them yet."""

        def marked(path: Path) -> bool:
            with contextlib.suppress(ValueError):
                return is_best(path)
            return False

        older = [path for at, path in sorted(self._complete().items()) if at <= iteration]
        best = next((path for path in reversed(older) if marked(path)), None)
        for path in older[: -self.keep]:
            if path != best:
                _discard_unless_held(path)


def is_best(path: Path) -> bool:
    """Whether a complete checkpoint was the best when it was written. ValueError: its checkpoint.json is damaged."""
    return _read_sealed(path / INDEX)["best"]


def problems(path: Path, files: Collection[str] | None = None) -> list[str]:
    """What is wrong with a complete checkpoint, each starting with a file's name; []: it is sound.

    Reads checkpoint.json and every file whole, or only `files`, so that ranks can share the work.
    """
    try:
        index = _read_sealed(path / INDEX)
    except ValueError as error:
        return [str(error)]
    found = []
    for file in index["files"]:
        name = file["name"]
        if files is None or name in files:
            try:
                if wrong := _wrong_size(path / name, file["bytes"]):
                    found.append(wrong)
                elif _checksum(path / name) != file["crc32"]:
                    found.append(f"{name}: damaged (its checksum differs)")
            except OSError as error:
                found.append(f"{name}: cannot be read ({error.strerror})")
    return found


def check_sound(path: Path) -> None:
    """ValueError where a complete checkpoint has `problems`."""
    if found := problems(path):
        raise ValueError(f"checkpoint: {path} is damaged; choose another ({'; '.join(found)})")


class CheckpointReader:
    """A complete checkpoint, opened: `iteration`, `world_size`, `best`, `state`, names of its `files`, and its tensors.

    run: whose it is (`Claim.run`).

    ValueError, with the reason: checkpoint.json is damaged, or a file is missing or of another size. Whether the bytes
    of the others are what was written is for `problems` to say. Files are opened for each read only, so that memory
    holds what was asked for and nothing else.
    """

    def __init__(self, path: Path) -> None:
        try:
            index = _read_sealed(path / INDEX)
        except ValueError as error:
            raise ValueError(f"checkpoint: {path}: {error}") from None
        if wrong := [bad for file in index["files"] if (bad := _wrong_size(path / file["name"], file["bytes"]))]:
            raise ValueError(f"checkpoint: {path}: {'; '.join(wrong)}")
        self.path = path
        self.iteration: int = index["iteration"]
        self.run: str = index.get("run", "")  # older ones do not say
        self.world_size: int = index["world_size"]
        self.best: bool = index["best"]
        self.state: dict[str, Any] = index["state"]
        self.files: list[str] = [file["name"] for file in index["files"]]
        self._tensors: dict[str, dict[str, Any]] = index["tensors"]

    def kinds(self) -> list[str]:
        return sorted(self._tensors)

    def names(self, kind: str = "weight") -> list[str]:
        """The tensors that have this kind; none: []."""
        return sorted(self._tensors.get(kind, {}))

    def shape(self, name: str, kind: str = "weight") -> tuple[int, ...]:
        return tuple(self._entry(name, kind)["shape"])

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        return getattr(torch, self._entry(name, kind)["dtype"])

    def read(self, name: str, kind: str = "weight", start: int = 0, stop: int | None = None) -> Tensor:
        """[start, stop) of the flattened tensor, from whichever files hold it; only these bytes are read."""
        size = math.prod(self.shape(name, kind))
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise ValueError(f"checkpoint: [{start}, {stop}) of {kind}/{name} is outside its {size} elements")
        result = torch.empty(stop - start, dtype=self.dtype(name, kind))
        for rank, first, last in self._entry(name, kind)["pieces"]:
            low, high = max(first, start), min(last, stop)
            if low < high:
                with self._open(rank) as file:
                    piece = file.get_slice(f"{kind}/{name}")[low - first : high - first]
                    result[low - start : high - start] = piece
        return result

    def tensor(self, name: str, kind: str = "weight") -> Tensor:
        """The whole tensor in its shape."""
        return self.read(name, kind).reshape(self.shape(name, kind))

    def rank_local_state(self, rank: int, world_size: int) -> dict[str, Tensor]:
        """The local tensors of this rank. ValueError: the run that wrote them had another number of ranks."""
        if world_size != self.world_size:
            raise ValueError(
                f"checkpoint: {self.path} was written by {self.world_size} ranks, this run has {world_size}; its local "
                f"tensors (such as a quantised optimizer's state) resume on {self.world_size} ranks only"
            )
        with self._open(rank) as file:
            keys = [key for key in file.keys() if key.startswith(f"{LOCAL}/")]  # noqa: SIM118 (not a mapping)
            return {key.removeprefix(f"{LOCAL}/"): file.get_tensor(key).clone() for key in keys}

    def _entry(self, name: str, kind: str) -> dict[str, Any]:
        try:
            return self._tensors[kind][name]
        except KeyError:
            raise ValueError(f"checkpoint: {self.path} has no {kind} of {name}") from None

    def _open(self, rank: int) -> safe_open:
        file = self.path / self.files[rank]
        try:
            return safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"checkpoint: {file}: damaged ({error})") from None
