"""Files that a user names: what would hang or fill the memory is refused; what is written follows the umask."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from egrpo_fast.files import follow_umask, open_regular, read_bytes, read_json, read_text, write_whole


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize(
    ("path", "told"),
    [("pipe", "a pipe"), ("/dev/zero", "a device"), ("/", "a folder"), ("/nowhere", "No such file")],
)
def test_what_is_no_regular_file_is_refused_at_once(path, told, pipe):
    path = pipe if path == "pipe" else path
    for read in (open_regular, read_bytes, read_text):
        with pytest.raises(OSError, match=told):
            read(path)


@pytest.mark.parametrize("content", ["[" * 1_000_000, "[", ""])
def test_json_that_is_none_or_nested_too_deeply_is_refused(content, tmp_path):
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match="line 1 column"):
        read_json(tmp_path / "file")


def test_a_link_to_a_file_is_that_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbfH\xc3\xa4user")
    assert read_text(tmp_path / "link") == "Häuser"
    assert open_regular(tmp_path / "link").read() == b"\xef\xbb\xbfH\xc3\xa4user"


def test_more_than_expected_and_what_is_no_text_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"four")
    assert read_bytes(tmp_path / "file", 4) == b"four"
    with pytest.raises(OSError, match="larger than 3 bytes"):
        read_bytes(tmp_path / "file", 3)
    (tmp_path / "file").write_bytes("four".encode("utf-16"))
    with pytest.raises(OSError, match="not UTF-8 .byte 0"):
        read_text(tmp_path / "file")


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_written_files_follow_the_umask(umask, file, folder, tmp_path):
    before = os.umask(umask)
    try:
        inside = tmp_path / "folder" / "inside"
        inside.mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, inside / "a.safetensors")
        (inside / "copied").touch(0o444)
        inside.chmod(0o500)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.touch(0o640)
        inside.with_name("link").symlink_to(elsewhere)
        follow_umask(tmp_path / "folder")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in (inside.parent, inside, *inside.iterdir())}
    assert modes == {"folder": folder, "inside": folder, "a.safetensors": file, "copied": file}
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o640 & ~umask, "what a link names is somebody else's"


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    file, precious = tmp_path / "file", tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "file.tmp").symlink_to(precious)
    write_whole(file, "one")
    assert file.read_text() == "one" and precious.read_text() == "mine"

    def fails(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, b"two")
    assert file.read_text() == "one" and sorted(tmp_path.iterdir()) == [file, precious]
