"""Files that a user names: read without hanging or filling the memory, and recognised; and files written whole."""

import errno
import hashlib
import json
import os
import re
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

SMALL = 1 << 24
"""Bytes that a file of settings, of JSON or of the like may have."""
SAMPLES, SAMPLE_BYTES = 16, 4096
"""What a fingerprint reads of a tensor: so many pieces, evenly spaced, or all of a small one."""
FILE_SAMPLES = 4096
"""The same of a file."""
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, or a link to one, open for reading.

    OSError says what is wrong with anything else: a pipe would wait for its writer, a device may have no end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe opens without waiting
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise OSError(errno.EINVAL, f"it is {kind}; a regular file is expected")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, most: int = SMALL) -> bytes:
    """All of a regular file of at most `most` bytes. OSError otherwise."""
    content = bytearray()
    with open_regular(path) as file:
        while piece := file.read(1 << 16):
            content += piece
            if len(content) > most:
                raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes, which no such file should be")
    return bytes(content)


def read_text(path: str | Path, most: int = SMALL) -> str:
    """`read_bytes` as UTF-8, without its byte order mark. OSError also where it is something else."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, f"it is not UTF-8 (byte {error.start})") from None


def read_json(path: str | Path) -> Any:
    """What a JSON file says. OSError: `read_text`. json.JSONDecodeError: it is not JSON, or nested too deeply."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None


def fingerprint(parts: Iterable[bytes]) -> str:
    """SHA-256, in hex, of the parts' own SHA-256: where one ends and the next begins counts, too."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


def sampled(size: int, samples: int = SAMPLES) -> list[slice]:
    """Where in `size` bytes `samples` evenly spaced pieces of 4 KiB lie; where they would fill it, all of it."""
    if size <= samples * SAMPLE_BYTES:
        return [slice(0, size)]
    starts = (place * (size - SAMPLE_BYTES) // (samples - 1) for place in range(samples))
    return [slice(start, start + SAMPLE_BYTES) for start in starts]


def file_fingerprint(path: Path) -> str:
    """Of a file's size, and of its content: all of up to 16 MiB, of a larger one 16 MiB in pieces of 4 KiB. OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        pieces = [os.pread(file.fileno(), at.stop - at.start, at.start) for at in sampled(size, FILE_SAMPLES)]
    return fingerprint([str(size).encode(), *pieces])


def follow_umask(path: Path) -> None:
    """Give a file, or a folder and all that is in it, the permissions that a new one gets where it lies.

    safetensors writes files that nobody but their owner can read, and a copy has the permissions of its original.
    """
    probe = path.with_name(f".{path.name}.new")
    probe.mkdir() if path.is_dir() else probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir() if path.is_dir() else probe.unlink()
    path.chmod(mode)
    if path.is_dir():
        for inside in list(path.iterdir()):
            if not inside.is_symlink():
                follow_umask(inside)


def sync(path: Path) -> None:
    """A file's content, or a folder's list of names, survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes | str, alone: bool = True) -> None:
    """Write a file that is whole or as it was before, also where the power fails. OSError: it is as it was.

    alone: no other process writes the same file at this moment.
    """
    beside = path.with_name(f"{path.name}.tmp" if alone else f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    beside.unlink(missing_ok=True)  # what a killed process left; a link that lies there is not followed
    try:
        with beside.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        sync(beside)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def expanded(path: str) -> str:
    """A path as a user writes it, with `~` and variables such as `$HOME` filled in; `$$` is a dollar sign.

    ValueError: it can name no file.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name == "$":
            return "$"
        if name not in os.environ:
            raise ValueError(f"the variable {found[0]} is not set; a dollar sign in a name is written $$")
        return os.environ[name]

    found = re.sub(r"\$(?:(\w+|\$)|\{([^}]*)\})", value, os.path.expanduser(path), flags=re.ASCII)
    if found.startswith("~"):
        raise ValueError(f"{found!r}: there is no such user")
    if not found or re.search(r"[\x00-\x1f\x7f]", found):
        raise ValueError(f"{found!r} is no path")
    if any(len(os.fsencode(part)) > 255 for part in found.split("/")) or len(os.fsencode(found)) >= 4096:
        raise ValueError("the path, or a name in it, is longer than any file's")
    return found


def is_hub_id(path: str) -> bool:
    """Whether `path` is taken for a hub id, `owner/name`: it is no folder and does not look like one."""
    return not Path(path).exists() and path.count("/") == 1 and not path.startswith((".", "/", "~"))
