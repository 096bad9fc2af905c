"""Checkpoints as files: round trips between numbers of ranks, and everything that can happen to a file or a process.

`python tests/distributed/test_checkpoint.py FOLDER KILLS SEED` is the kill -9 part alone, with its figures as JSON.
"""

import errno
import fcntl
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from egrpo_fast.distributed.checkpoint import (
    CheckpointError,
    CheckpointReader,
    Checkpoints,
    Piece,
    _Attempt,
    _memory_available,
    held,
    problems,
)

SHAPES = {"blocks.0.weight": (7, 11), "blocks.0.bias": (11,), "scale": (), "none": (0, 3)}
KINDS = ("weight", "exp_avg")


def tensors_of(iteration, shapes=SHAPES):
    """Contents that only this iteration has: (kind, name) -> tensor."""
    generator = torch.Generator().manual_seed(iteration)
    return {(kind, name): torch.randn(shape, generator=generator) for kind in KINDS for name, shape in shapes.items()}


def even(size, world_size):
    """Boundaries of nearly equal parts."""
    return [size * rank // world_size for rank in range(world_size + 1)]


def pieces_of(whole, rank, world_size, split=even):
    for (kind, name), tensor in whole.items():
        edges = split(tensor.numel(), world_size)
        part = tensor.reshape(-1)[edges[rank] : edges[rank + 1]]
        yield Piece(name, kind, edges[rank], tuple(tensor.shape), part)


def local_of(iteration, rank):
    return {"quantised": torch.arange(5, dtype=torch.uint8) + iteration + rank, "step": torch.tensor(float(iteration))}


def opened(folder, world_size, **options):
    return [Checkpoints(folder, rank, world_size, **{"timeout": 20, **options}) for rank in range(world_size)]


def save(ranks, iteration, attempt="a", best=False, whole=None, split=even):
    """One checkpoint of all ranks, complete on return."""
    whole = tensors_of(iteration) if whole is None else whole
    for rank, checkpoints in enumerate(ranks):
        pieces, local = pieces_of(whole, rank, len(ranks), split), local_of(iteration, rank)
        checkpoints.save(iteration, pieces, local, {"iteration": iteration}, attempt, best)
    for checkpoints in ranks:
        checkpoints.wait()


def mismatches(path):
    """What in a checkpoint is not the content of its iteration."""
    reader = CheckpointReader(path)
    whole = tensors_of(reader.iteration)
    wrong = [key for key, tensor in whole.items() if not torch.equal(reader.tensor(key[1], key[0]), tensor)]
    for rank in range(reader.world_size):
        local = reader.rank_local_state(rank, reader.world_size)
        wrong += [
            name for name, tensor in local_of(reader.iteration, rank).items() if not torch.equal(local[name], tensor)
        ]
    return wrong + ([] if reader.state == {"iteration": reader.iteration} else ["state"])


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_round_trip(world_size, tmp_path):
    ranks = opened(tmp_path / "checkpoints", world_size)
    assert ranks[0].newest() is None and ranks[0].all() == []
    save(ranks, 50)
    path = ranks[-1].newest()
    assert path == tmp_path / "checkpoints" / "iteration-000050" and ranks[0].all() == [path]
    assert problems(path) == [] and mismatches(path) == []
    reader = CheckpointReader(path)
    assert (reader.iteration, reader.world_size, len(reader.files)) == (50, world_size, world_size)
    assert listing(path) == sorted([*reader.files, "checkpoint.json"]) and listing(path.parent) == [path.name]
    assert reader.kinds() == sorted(KINDS) and reader.names() == sorted(SHAPES) and reader.names("ema") == []
    whole = tensors_of(50)
    for readers in (1, 2, 3, 5):
        for (kind, name), tensor in whole.items():
            edges = even(tensor.numel(), readers)
            parts = [reader.read(name, kind, *bounds) for bounds in itertools.pairwise(edges)]
            assert torch.equal(torch.cat(parts).reshape(reader.shape(name)), tensor)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_pieces_read_back_at_any_range(data):
    world_size = data.draw(st.integers(1, 4))
    size = data.draw(st.integers(0, 40))
    cuts = sorted(data.draw(st.lists(st.integers(0, size), min_size=world_size - 1, max_size=world_size - 1)))
    whole = {("weight", "x"): torch.arange(size, dtype=data.draw(st.sampled_from([torch.bfloat16, torch.float32])))}
    with tempfile.TemporaryDirectory() as folder:
        save(opened(Path(folder), world_size), 1, whole=whole, split=lambda *_: [0, *cuts, size])
        reader = CheckpointReader(Path(folder) / "iteration-000001")
        start = data.draw(st.integers(0, size))
        stop = data.draw(st.integers(start, size))
        part = reader.read("x", start=start, stop=stop)
        assert torch.equal(part, whole["weight", "x"][start:stop]) and part.dtype == whole["weight", "x"].dtype


def test_training_goes_on_while_it_writes(tmp_path):
    weights, state = torch.zeros(1 << 20), {"history": [1.5]}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, [Piece("w", "weight", 0, (1 << 20,), weights)], {"l": weights}, state, "a")
    weights.fill_(1.0)
    state["history"].append(2.5)
    checkpoints.wait()
    reader = CheckpointReader(checkpoints.newest())
    assert not reader.tensor("w").any() and not reader.rank_local_state(0, 1)["l"].any()
    assert reader.state == {"history": [1.5]}


def test_files_can_be_read_by_whom_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        save(opened(tmp_path, 2), 1)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o644}


def test_synchronous_and_non_finite(tmp_path):
    checkpoints = Checkpoints(tmp_path, asynchronous=False)
    whole = torch.tensor([[1.0, float("nan")], [float("inf"), -0.0]]).T  # not contiguous
    checkpoints.save(1, [Piece("w", "weight", 0, (2, 2), whole)], {}, {}, "a")
    found = CheckpointReader(checkpoints.newest()).tensor("w")
    assert torch.equal(found.view(torch.int32), whole.contiguous().view(torch.int32))


def test_the_newest_and_the_best_are_kept(tmp_path):
    (checkpoints,) = ranks = opened(tmp_path, 1, keep=2)
    kept = []
    for iteration in range(1, 8):
        save(ranks, iteration, f"a{iteration}", best=iteration in (2, 5))
        kept.append([int(path.name[-6:]) for path in checkpoints.all()])
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [4, 5], [5, 6], [5, 6, 7]]
    assert len(listing(tmp_path)) == 3


def test_a_run_that_went_back_prunes_nothing_ahead_of_it(tmp_path):
    ranks = opened(tmp_path, 1, keep=1)
    save(ranks, 10)
    save(ranks, 5, "b")
    assert [path.name for path in ranks[0].all()] == ["iteration-000005", "iteration-000010"]


def test_what_is_read_is_pruned_once_nobody_reads_it(tmp_path):
    ranks = opened(tmp_path, 1, keep=1)
    save(ranks, 1)
    with held(ranks[0].newest()), held(ranks[0].newest()):
        save(ranks, 2)
        assert listing(tmp_path) == ["iteration-000001", "iteration-000002"]
        assert mismatches(tmp_path / "iteration-000001") == []
    save(ranks, 3)
    assert listing(tmp_path) == ["iteration-000003"]
    with pytest.raises(ValueError, match="checkpoint: .*iteration-000001/checkpoint.json cannot be read"):
        held(tmp_path / "iteration-000001").__enter__()


def test_a_filesystem_without_locks_prunes_and_the_reader_says_so(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    ranks = opened(tmp_path, 1, keep=1)
    save(ranks, 1)
    with (
        pytest.raises(ValueError, match="iteration-000001 was deleted or written anew by its run while it was read"),
        held(tmp_path / "iteration-000001"),
    ):
        reader = CheckpointReader(tmp_path / "iteration-000001")
        save(ranks, 2)
        assert problems(reader.path)
        reader.tensor("scale")
    assert listing(tmp_path) == ["iteration-000002"]


def test_a_repeated_iteration_replaces(tmp_path):
    ranks = opened(tmp_path, 2)
    save(ranks, 1, whole=tensors_of(99))
    save(ranks, 1, "b")
    assert mismatches(ranks[0].newest()) == [] and listing(tmp_path) == ["iteration-000001"]


def test_a_replacement_never_leaves_the_run_without_a_checkpoint(tmp_path, monkeypatch):
    ranks, seen, rename = opened(tmp_path, 1), [], Path.rename
    save(ranks, 1)

    def watched(self, target):
        rename(self, target)
        newest = ranks[0].newest()
        seen.append(newest is not None and mismatches(newest) == [])

    monkeypatch.setattr(Path, "rename", watched)
    save(ranks, 1, "b")
    assert seen == [True] * 3, "aside, in its place, and the old one away"


def test_killed_between_the_renames_of_a_replacement(tmp_path):
    ranks = opened(tmp_path, 1)
    save(ranks, 1)
    ranks[0].newest().rename(tmp_path / "iteration-000001.old")
    assert ranks[0].newest().name == "iteration-000001.old" and mismatches(ranks[0].newest()) == []
    save(ranks, 1, "b")
    assert listing(tmp_path) == ["iteration-000001"]


def test_what_killed_saves_left_is_cleared(tmp_path):
    ranks = opened(tmp_path, 2)
    save(ranks, 1)
    for name in ("iteration-000002.x.partial", "iteration-000000.deleted"):
        shutil.copytree(ranks[0].newest(), tmp_path / name)
    (tmp_path / "iteration-000002.x.failed").write_text("rank 1: disk")
    (tmp_path / "notes").mkdir()
    assert [path.name for path in ranks[0].all()] == ["iteration-000001"]
    save(ranks, 2, "y")
    assert listing(tmp_path) == ["iteration-000001", "iteration-000002", "notes"]


def damages(path):
    """(what, do it) for a file: missing, truncated, emptied, and a flipped bit at ten places."""
    size = path.stat().st_size

    def flip(position):
        raw = bytearray(path.read_bytes())
        raw[position] ^= 1 << random.Random(position).randrange(8)
        path.write_bytes(raw)

    yield "missing", path.unlink
    yield "truncated", lambda: os.truncate(path, size - 1)
    yield "emptied", lambda: os.truncate(path, 0)
    for position in sorted({size * part // 9 for part in range(9)} | {size - 1}):
        yield f"bit of byte {position}", lambda at=position: flip(at)


def test_every_damage_to_every_file_is_named(tmp_path):
    ranks = opened(tmp_path / "run", 2)
    save(ranks, 1)
    sound = ranks[0].newest()
    for name in listing(sound):
        for index, (what, damage) in enumerate(damages(sound / name)):
            path = shutil.copytree(sound, tmp_path / f"{name}-{index}")
            [(_, damage)] = [found for found in damages(path / name) if found[0] == what]
            damage()
            told = problems(path)
            assert len(told) == 1 and told[0].startswith(name), (name, what, told)
            if name == "checkpoint.json" or what in ("missing", "truncated", "emptied"):
                with pytest.raises(ValueError, match=name):
                    CheckpointReader(path)
            if name != "checkpoint.json":
                assert problems(path, [name]) == told
                assert problems(path, [other for other in CheckpointReader(sound).files if other != name]) == []
    assert problems(tmp_path / "nowhere") == ["checkpoint.json: cannot be read (No such file or directory)"]


def test_a_foreign_checkpoint_json_is_refused(tmp_path):
    for text in ("[]", "null", '{"crc32": 1}', "[" * 100_000, "\xff"):
        (tmp_path / "checkpoint.json").write_text(text, encoding="latin-1")
        assert problems(tmp_path)[0].startswith("checkpoint.json: damaged")
    (tmp_path / "checkpoint.json").unlink()
    os.mkfifo(tmp_path / "checkpoint.json")
    assert problems(tmp_path) == ["checkpoint.json: cannot be read (it is a pipe; a regular file is expected)"]


def test_local_tensors_want_the_same_number_of_ranks(tmp_path):
    ranks = opened(tmp_path, 2)
    save(ranks, 1)
    with pytest.raises(ValueError, match="was written by 2 ranks, this run has 3"):
        CheckpointReader(ranks[0].newest()).rank_local_state(0, 3)


def test_wrong_questions_are_refused(tmp_path):
    ranks = opened(tmp_path, 1)
    save(ranks, 1)
    reader = CheckpointReader(ranks[0].newest())
    with pytest.raises(ValueError, match="has no ema of scale"):
        reader.read("scale", "ema")
    with pytest.raises(ValueError, match=r"\[3, 12\) of weight/blocks.0.bias is outside its 11 elements"):
        reader.read("blocks.0.bias", start=3, stop=12)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Piece("w", "local", 0, (2,), torch.ones(2))], "kind: 'local'"),
        ([Piece("w", "weight", 1, (2,), torch.ones(2))], r"\[1, 3\) of weight/w is outside"),
        ([Piece("w", "weight", at, (2,), torch.ones(1)) for at in (0, 1)], "a second piece of weight/w"),
    ],
)
def test_wrong_pieces_are_refused(pieces, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path).save(1, pieces, {}, {}, "a")
    with pytest.raises(ValueError, match="attempt: 'a/b'"):
        Checkpoints(tmp_path).save(1, [], {}, {}, "a/b")


@pytest.mark.parametrize("edges", [[0, 3, 6, 6], [1, 3, 5, 7]], ids=["short", "late"])
def test_a_checkpoint_with_holes_is_not_written(edges, tmp_path):
    ranks, whole = opened(tmp_path, 3), {("weight", "x"): torch.arange(7.0)}
    with pytest.raises(CheckpointError, match="weight/x: pieces .* do not tile"):
        save(ranks, 1, whole=whole, split=lambda *_: edges)
    for checkpoints in ranks[1:]:  # each rank learns of it, and why
        with pytest.raises(CheckpointError, match="iteration-000001 is not written: rank 0: weight/x"):
            checkpoints.wait()
    assert ranks[0].newest() is None


def test_a_silent_rank_is_named(tmp_path):
    ranks = opened(tmp_path, 3, timeout=2)
    for rank in (0, 2):
        ranks[rank].save(1, [], {}, {}, "a")
    for rank in (0, 2):
        with pytest.raises(CheckpointError, match="waited 2 s in vain for rank 1"):
            ranks[rank].wait()
    ranks[0].wait()  # told once
    late = Checkpoints(tmp_path, 1, 3, timeout=600)
    late.save(1, [], {}, {}, "a")
    with pytest.raises(CheckpointError, match="waited 2 s in vain for rank 1"):  # it did not wait by itself
        late.wait()
    assert ranks[0].newest() is None


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no small filesystem: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_too_little_space_is_said_first(small_disk):
    ranks = opened(small_disk, 1)
    save(ranks, 1)
    with pytest.raises(CheckpointError, match=r"bytes are free under .*disk, 4,\d{3},\d{3} are needed"):
        save(ranks, 2, "b", whole={("weight", "x"): torch.zeros(1 << 20)})
    assert [path.name for path in ranks[0].all()] == ["iteration-000001"] and mismatches(ranks[0].newest()) == []
    save(ranks, 3, "c")
    assert listing(small_disk) == ["iteration-000001", "iteration-000003"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_disk_that_fills_while_it_is_written(world_size, small_disk, monkeypatch):
    ranks = opened(small_disk, world_size)
    save(ranks, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    with pytest.raises(CheckpointError, match="iteration-000002 is not written: rank .: .*No space left on device"):
        save(ranks, 2, "b", whole={("weight", "x"): torch.zeros(1 << 20)})
    for checkpoints in ranks[1:]:
        with pytest.raises(CheckpointError, match="No space left on device"):
            checkpoints.wait()
    assert [path.name for path in small_disk.iterdir() if path.is_dir()] == ["iteration-000001"]
    assert mismatches(ranks[0].newest()) == []
    save(ranks, 3, "c")
    assert listing(small_disk) == ["iteration-000001", "iteration-000003"]


def test_a_file_larger_than_allowed(tmp_path):
    """The same without a filesystem of its own: no file of this process may grow beyond 1 MiB."""
    ranks = opened(tmp_path, 1)
    save(ranks, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            save(ranks, 2, "b", whole={("weight", "x"): torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ranks[0].all() == [tmp_path / "iteration-000001"] and mismatches(ranks[0].newest()) == []


def test_the_space_for_all_ranks_is_asked_for_before_any_writes(tmp_path, monkeypatch):
    """On a disk with room for one rank of two; what a rank has already written of its share is not asked for again."""
    whole = {("weight", "x"): torch.zeros(1 << 18)}
    share = (1 << 19) * 101 // 100

    def room_for(shares):
        def usage(folder):
            used = sum(512 * path.stat().st_blocks for path in Path(folder).rglob("*") if path.is_file())
            return shutil._ntuple_diskusage(0, 0, int(shares * share) - used)

        monkeypatch.setattr("shutil.disk_usage", usage)

    room_for(1.5)
    ranks = opened(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"bytes are free under .*, 1,059,0\d\d are needed for the 2 rank\(s\)"):
        save(ranks, 1, whole=whole)
    with pytest.raises(CheckpointError, match="are needed for the 2"):
        ranks[1].wait()
    room_for(2.5)
    ranks = opened(tmp_path, 2, asynchronous=True)
    ranks[0].save(2, pieces_of(whole, 0, 2), {}, {}, "b")
    while not any(tmp_path.glob("*.b.partial/rank-00000.json")):
        time.sleep(0.01)
    ranks[1].save(2, pieces_of(whole, 1, 2), {}, {}, "b")
    for checkpoints in ranks:
        checkpoints.wait()
    assert listing(tmp_path) == ["iteration-000002"]


def test_copies_that_host_memory_does_not_hold_are_refused_on_all_ranks(tmp_path, monkeypatch):
    whole, free = {("weight", name): torch.zeros(1 << 18) for name in "xyz"}, 4_000_000
    taken = []
    monkeypatch.setattr("egrpo_fast.distributed.checkpoint._memory_available", lambda: free - sum(taken))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, _: taken.append(self.nbytes))
    told = "6,291,456 bytes of host memory are needed for the copies of 2 rank.* on this machine, 4,000,000 were"
    ranks = opened(tmp_path / "run", 2, local_ranks=2)
    with pytest.raises(CheckpointError, match=f"iteration-000001 is not written: rank 0: {told}"):
        ranks[0].save(1, pieces_of(whole, 0, 1), {}, {}, "a")
    assert sum(taken) == 2 << 20, "a third piece would leave too little for the other rank's"
    free = 1 << 40
    ranks[1].save(1, [], {}, {}, "a")
    with pytest.raises(CheckpointError, match=told):  # rank 0's reason, not that it waited in vain
        ranks[1].wait()
    assert ranks[0].newest() is None
    monkeypatch.undo()
    save(ranks, 2, "b")
    assert listing(tmp_path / "run") == ["iteration-000002"] and mismatches(ranks[0].newest()) == []


def test_host_memory_as_the_system_tells_it():
    told = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    assert _memory_available() == pytest.approx(1024 * int(told["MemAvailable:"]), rel=0.1)


def test_old_checkpoints_that_cannot_be_deleted_stop_nothing(tmp_path, monkeypatch):
    """As where another machine has a file of theirs open."""
    ranks, rmtree = opened(tmp_path, 1, keep=1, asynchronous=False), shutil.rmtree

    def held(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        rmtree(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", held)
    save(ranks, 1)
    for iteration, attempt in ((2, "b"), (3, "c"), (3, "d"), (3, "e")):
        with pytest.warns(UserWarning, match="checkpoint: .* could not be deleted .*: Device or resource busy"):
            save(ranks, iteration, attempt)
        assert [path.name for path in ranks[0].all()] == [f"iteration-{iteration:06d}"]
        assert mismatches(ranks[0].newest()) == []
    monkeypatch.undo()
    save(ranks, 4, "f")
    assert listing(tmp_path) == ["iteration-000004"]


def test_a_rank_that_waits_in_vain_removes_nothing(tmp_path, monkeypatch):
    """Rank 0 takes its time between reading what the others announced and making it current."""
    publish = _Attempt._publish

    def slowly(self):
        with pytest.raises(CheckpointError, match="waited 0.2 s in vain for rank 0"):
            ranks[1].wait()
        publish(self)

    monkeypatch.setattr(_Attempt, "_publish", slowly)
    ranks = [Checkpoints(tmp_path, 0, 2, asynchronous=False), Checkpoints(tmp_path, 1, 2, timeout=0.2)]
    whole = tensors_of(1)
    for rank in (1, 0):
        ranks[rank].save(1, pieces_of(whole, rank, 2), local_of(1, rank), {"iteration": 1}, "a")
    assert problems(ranks[0].newest()) == [] and mismatches(ranks[0].newest()) == []


def test_a_slice_reads_its_own_bytes(tmp_path):
    """Of 64 MiB, the pages of 4 KiB and what the kernel reads ahead."""
    numel = 16 << 20
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(
        1, [Piece(name, "weight", 0, (n,), torch.zeros(n)) for name, n in (("x", numel), ("y", 1))], {}, {}, "a"
    )
    checkpoints.wait()
    code = (
        "import re, sys; from pathlib import Path; from egrpo_fast.distributed.checkpoint import CheckpointReader\n"
        "status = lambda name: int(re.search(name + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) >> 10\n"
        "def grown(**part):\n"
        "    Path('/proc/self/clear_refs').write_text('5')\n"  # the peak counts from here
        "    before = status('VmRSS'); reader.read('x', **part); return status('VmHWM') - before\n"
        "reader = CheckpointReader(Path(sys.argv[1])); reader.read('y')\n"
        "print(grown(start=5 << 20, stop=(5 << 20) + 1024), grown())"
    )
    told = subprocess.check_output([sys.executable, "-c", code, checkpoints.newest()], text=True)
    piece, whole = map(int, told.split())
    assert piece < 8 and whole > 60, "MiB"


# kill -9 ------------------------------------------------------------------------------------------------------------


def save_forever(folder, rank, world_size, first, trial):
    """What a trainer does, and nothing else."""
    checkpoints = Checkpoints(folder, rank, world_size, timeout=20)
    for iteration in range(first, first + 10_000):
        pieces = pieces_of(tensors_of(iteration), rank, world_size)
        checkpoints.save(
            iteration, pieces, local_of(iteration, rank), {"iteration": iteration}, f"t{trial}-{iteration}",
            best=iteration % 7 == 0,
        )  # fmt: skip


def kill_ranks(folder, first, trial, world_size, rng):
    """Fork the ranks, let them save, and kill -9 one after the other at random moments."""
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            try:
                save_forever(folder, rank, world_size, first, trial)
            finally:
                os._exit(1)
        children.append(child)
    time.sleep(rng.uniform(0.0, 0.4))
    for child in rng.sample(children, len(children)):
        os.kill(child, signal.SIGKILL)
        time.sleep(rng.choice([0.0, rng.uniform(0.0, 0.02)]))
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def kill_loop(folder, kills, seed):
    """Kill -9 saving ranks at least `kills` times, resuming each time, until saves were hit, however slow they are.

    Figures, and what was wrong after which kill.
    """
    rng, wrong, at, killed, partial, repeated = random.Random(seed), [], 0, 0, 0, 0
    trial = 0
    while trial < 20 * kills and (killed < kills or at <= 10 or partial <= 3):
        trial += 1
        world_size = rng.choice([1, 2, 2])
        again = at > 0 and rng.random() < 0.5  # a resumed run may come to the same iteration again
        repeated += again
        codes = kill_ranks(folder, at + (not again), trial, world_size, rng)
        killed += sum(code == -signal.SIGKILL for code in codes)
        wrong += [f"trial {trial}: a rank exited with {code}" for code in codes if code != -signal.SIGKILL]
        complete = Checkpoints(folder).all()
        partial += any(path.name.endswith(".partial") for path in folder.glob("iteration-*"))
        for path in complete:
            wrong += [f"trial {trial}: {path.name}: {what}" for what in problems(path) or mismatches(path)]
        newest = CheckpointReader(complete[-1]).iteration if complete else 0
        wrong += [f"trial {trial}: iteration {at} is lost"] if newest < at else []
        at = newest
    return {"kills": killed, "iterations": at, "in_the_middle": partial, "repeated": repeated, "wrong": wrong}


def test_kill_9_at_random_moments(tmp_path):
    command = [sys.executable, __file__, tmp_path, "30", "0"]
    told = subprocess.check_output(command, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    figures = json.loads(told)
    assert figures["wrong"] == [] and figures["kills"] >= 30
    assert figures["iterations"] > 10 and figures["in_the_middle"] > 3, "the kills must hit saves"


if __name__ == "__main__":
    print(json.dumps(kill_loop(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
