"""A folder that one process at a time writes to: its lock, and whether it is still that folder."""

import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO


def lock(path: Path) -> IO[str]:
    """Take the lock file of a folder, and keep it until it is closed or this process ends. Forked children do not.

    BlockingIOError: another process holds it. OSError: it cannot be opened, or it is a link or no regular file; what it
    leads to is left alone.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, f"{path.name} is a link; delete it") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path.name} is a link or no regular file; delete it")
    file = os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    os.register_at_fork(after_in_child=file.close)  # else the lock lasts as long as any child of this process
    return file


@dataclass(frozen=True)
class Claim:
    """A run's folder, for all its ranks, as long as the lock file there holds their `mark`.

    run: the name that the run's checkpoints bear; "": the run began before there were such names.
    """

    lock_file: Path
    mark: str
    run: str

    def holds(self) -> bool:
        try:
            return self.lock_file.read_text(errors="replace") == self.mark
        except OSError:
            return False

    def check(self) -> None:
        """OSError: the folder was moved or deleted, or another run took its place; nothing may be written there."""
        if not self.holds():
            message = f"{self.lock_file.parent} is not the folder any more that this run began in; move it back"
            raise OSError(errno.ESTALE, message)
