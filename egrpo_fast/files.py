"""Files that a user names, read without hanging and without filling the memory; and files that are written whole."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

SMALL = 1 << 24
"""Bytes that a file of settings, of JSON or of the like may have."""
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


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file that is whole or as it was before, also where the power fails. OSError: it is as it was."""
    beside = path.with_name(f"{path.name}.tmp")
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
