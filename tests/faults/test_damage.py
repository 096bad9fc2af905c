"""Files of checkpoints that are damaged, and disks that are full, through the trainer."""

import json
import subprocess

import pytest
from fault_injection import damages, resume_from_damaged
from forked import TINY, differences, iterations, newest, unsound

from egrpo_fast.distributed.world import free_port

SHORT = ["iterations=3", "evaluation.every=0"]


def checkpoint(folder, iteration):
    return folder / "checkpoints" / f"iteration-{iteration:06d}"


@pytest.mark.slow
def test_every_damage_to_every_file_goes_one_back_and_is_told(server, tmp_path, figures):
    run, log, told, port = tmp_path / "run", tmp_path / "log", tmp_path / "told.json", free_port()
    server.run(run, *SHORT, ranks=2)
    arguments = [*TINY, *SHORT, f"output_dir={run}", "resume=true"]
    forked = server.fork(resume_from_damaged, [(rank, 2, port, arguments, log, told) for rank in range(2)], log)
    assert forked.wait(300) == [0, 0], forked.told()[-4000:]
    rows = json.loads(told.read_text())
    files = {name for name, *_ in rows}
    assert files == {"checkpoint.json", "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"}
    for name, what, iteration, same, warned in rows:
        assert (iteration, same) == (2, True), (name, what)
        assert "iteration-000003 is damaged and passed over" in warned and name in warned, (name, what)
    figures["damaged checkpoint files"] = (
        f"{len(rows)} damages to {len(files)} files of 2 ranks' checkpoint: each told, each resumed from the one before"
    )


@pytest.mark.slow
def test_the_command_resumes_from_the_one_before(server, one_rank, tmp_path):
    run = tmp_path / "run"
    server.run(run, signal_at={0: (15, "update", 6)})  # whose update is then left
    (file,) = checkpoint(run, 5).glob("*.safetensors")
    dict(damages(file))["cut short"]()
    told = server.resume(run)
    assert "iteration-000005 is damaged and passed over" in told and file.name in told
    assert differences(run, one_rank) == []


@pytest.mark.slow
def test_all_damaged_is_refused_by_name(server, tmp_path):
    run = tmp_path / "run"
    server.run(run, *SHORT)
    for path in (run / "checkpoints").iterdir():
        (path / "checkpoint.json").unlink()
    told = server.resume(run, *SHORT, codes=[1])
    assert "error: resume: every checkpoint in" in told


@pytest.fixture
def small_disk(tmp_path):
    """Room for two checkpoints and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True
    )  # fmt: skip
    if mounted.returncode != 0:
        pytest.skip(f"no small filesystem: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    try:
        with (folder / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(1 << 18)):
                pass
    except OSError:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("freed", [True, False], ids=["for a while", "to the end"])
def test_a_full_disk(freed, server, tmp_path, small_disk, figures):
    settings = ["iterations=8", "optimizer.ema_decay=null", "checkpoint.best=null", "checkpoint.save_total_limit=1"]
    server.run(tmp_path / "reference", *settings)
    run = small_disk / "run"
    started = server.start(run, *settings)
    while newest(run) < 2:
        assert started.wait(0.02) == [None], started.told()
    fill(small_disk)
    (small_disk / "filler").open("r+b").truncate((small_disk / "filler").stat().st_size - (2 << 20))  # logs have room
    if freed:
        while "are needed" not in started.told() and started.wait(0.02) == [None]:
            pass
        (small_disk / "filler").unlink()
    codes, told = started.wait(), started.told()
    assert "is not written: rank 0: " in told and "bytes are free" in told, told[-3000:]
    assert unsound(run) == [] and newest(run) >= 2
    if freed:
        assert codes == [0]
    else:
        assert codes == [1] and "CheckpointError: iteration-000008 is not written" in told
        assert [line["iteration"] for line in iterations(run)] == list(range(1, 9)), "training went on"
        (small_disk / "filler").unlink()
        server.resume(run, *settings)
    assert differences(run, tmp_path / "reference") == []
    figures[f"disk full {'for a while' if freed else 'to the end'}"] = (
        f"told, training goes on, earlier checkpoints stand; status {codes[0]}; "
        f"{'the same end' if freed else 'resumed bit for bit when there is room'}"
    )
