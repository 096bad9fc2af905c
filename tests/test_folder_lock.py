"""A folder that one process writes to: its lock, and whether it is still that folder."""

import os
import signal

import pytest

from egrpo_fast.folder_lock import Claim, lock


def test_one_holds_the_lock_until_it_is_closed(tmp_path):
    with lock(tmp_path / "lock"), pytest.raises(BlockingIOError):
        lock(tmp_path / "lock")
    lock(tmp_path / "lock").close()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """A reward's worker may live on after its run was killed; nor does its end free the lock of a run that goes on."""
    held, (there, here) = lock(tmp_path / "lock"), os.pipe()
    child = os.fork()
    if not child:
        os.write(here, b"forked")
        signal.pause()
        os._exit(0)
    try:
        assert os.read(there, 6) == b"forked"
        with pytest.raises(BlockingIOError):
            lock(tmp_path / "lock")
        held.close()
        lock(tmp_path / "lock").close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("kind", ["symlink", "hard link", "dangling", "pipe", "folder"])
def test_a_lock_that_leads_elsewhere_is_refused_and_left_alone(kind, tmp_path):
    target, path = tmp_path / "target", tmp_path / "lock"
    if kind != "dangling":
        target.write_text("mine")
    {
        "symlink": lambda: path.symlink_to(target),
        "hard link": lambda: path.hardlink_to(target),
        "dangling": lambda: path.symlink_to(target),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[kind]()
    with pytest.raises(OSError, match="Is a directory" if kind == "folder" else "lock is a link.*; delete it"):
        lock(path)
    assert not target.exists() if kind == "dangling" else target.read_text() == "mine"


def test_a_claim_ends_where_the_folder_is_another(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    claim = Claim(folder / "lock", "mark", "")
    claim.lock_file.write_text("mark")
    claim.check()
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(OSError, match="run is not the folder any more .*move it back"):
        claim.check()
    folder.mkdir()
    claim.lock_file.write_text("another run's")
    with pytest.raises(OSError, match="move it back"):
        claim.check()
    claim.lock_file.unlink()
    folder.rmdir()
    moved.rename(folder)
    claim.check()
