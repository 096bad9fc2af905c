"""The embedding cache: what is written is read, whatever is damaged is refused, whatever interrupts is made good."""

import json
import os
import resource
import shutil
import tracemalloc
from collections import namedtuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from egrpo_fast.prompts.embeddings import EmbeddingCache, EmbeddingWriter, Index

PROMPTS = [f"prompt {place}" for place in range(23)]
SHAPES = {"t5": (3, 4), "pooled": (5,)}
INDEX = Index(encoder="abc123", made_with={"model": "some", "dtype": "float32"}, shapes=SHAPES, dtype="float32")


def embedding(prompts, dtype=torch.float32):
    """A function of the prompt, so that a row in the wrong place is seen."""
    seeds = [torch.Generator().manual_seed(hash(tuple(prompt.encode())) % 2**31) for prompt in prompts]
    t5 = torch.stack([torch.randn(3, 4, generator=seed) for seed in seeds])
    pooled = torch.stack([torch.randn(5, generator=seed) for seed in seeds])
    return {"t5": t5.to(dtype), "pooled": pooled.to(dtype)}


def make(folder, prompts=PROMPTS, index=INDEX, batch=2, shard_prompts=4, verify=False):
    """What `egrpo encode` does, without a model. Returns (prompts made, shards dropped)."""
    with EmbeddingWriter(folder, index, shard_prompts * index.row_bytes, verify) as writer:
        places = [int(place) for place in writer.missing(prompts)]
        for start in range(0, len(places), batch):
            some = [prompts[place] for place in places[start : start + batch]]
            writer.add(some, embedding(some, getattr(torch, index.dtype)))
    return len(places), writer.dropped


def assert_holds(folder, prompts=PROMPTS, dtype=torch.float32):
    torch.testing.assert_close(EmbeddingCache(folder).encode(prompts), embedding(prompts, dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_come_back_in_any_order(tmp_path, dtype):
    assert make(tmp_path / "new" / "cache", index=INDEX.model_copy(update={"dtype": dtype})) == (23, [])
    cache = EmbeddingCache(tmp_path / "new" / "cache")
    assert len(cache) == 23 and cache.fingerprint == "abc123" and len(cache.index.shards) == 6
    for asked in (PROMPTS, PROMPTS[::-1], [PROMPTS[20], PROMPTS[1], PROMPTS[20]], PROMPTS[:0]):
        if asked:
            assert_holds(tmp_path / "new" / "cache", asked, getattr(torch, dtype))
        assert cache.missing(asked).tolist() == []
    assert cache.missing(["new", PROMPTS[3], "newer"]).tolist() == [0, 2]
    told = r"prompts.train: 2 of 3 prompts are not in .*cache, the first is 'new'; `egrpo encode`"
    with pytest.raises(ValueError, match=told):
        cache.require(["new", PROMPTS[3], "newer"], "prompts.train")
    with pytest.raises(ValueError, match="1 of 2 prompts are not in"):
        cache.encode([PROMPTS[0], "new"])


def test_an_empty_cache_lacks_everything(tmp_path):
    assert make(tmp_path, prompts=[]) == (0, [])
    assert EmbeddingCache(tmp_path).missing(PROMPTS).tolist() == list(range(23))


def test_prompts_are_made_once_and_added_to(tmp_path):
    assert make(tmp_path, prompts=[*PROMPTS[:5], *PROMPTS[:5]]) == (5, [])
    assert make(tmp_path, prompts=PROMPTS) == (18, [])
    assert make(tmp_path, prompts=PROMPTS) == (0, [])
    assert_holds(tmp_path)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_at", range(0, 40, 3))
def test_an_interrupted_writer_goes_on_and_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch, killed_at):
    """Stopped at any system call that makes a file last: before it, and after it."""
    calls = 0

    def counted(call):
        def replacement(*arguments):
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise Killed
            return call(*arguments)

        return replacement

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(os, "fsync", counted(os.fsync))
        try:
            make(tmp_path)
        except Killed:
            assert 0 < killed_at <= calls
    make(tmp_path)
    assert_holds(tmp_path)
    named = {shard.file for shard in EmbeddingCache(tmp_path).index.shards}
    assert {file.name for file in tmp_path.iterdir()} == {*named, "index.json", "lock"}, "nothing is left over"
    assert sum(len(load_file(tmp_path / name)["sums"]) for name in named) == 23, "no prompt twice"


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
        lambda path: save_file({**load_file(path), "t5": torch.zeros(4, 3, 5)}, path),
        lambda path: save_file({**load_file(path), "sums": torch.zeros(4, dtype=torch.int64)}, path),
    ],
    ids=["gone", "truncated", "empty", "longer", "other width", "other sums"],
)
def test_a_damaged_shard_is_refused_by_name_and_made_again(tmp_path, damage):
    make(tmp_path)
    damage(tmp_path / "shard-00002.safetensors")
    with pytest.raises(ValueError, match=r"embeddings: .*shard-00002.safetensors is damaged .*`egrpo encode`"):
        EmbeddingCache(tmp_path)
    assert make(tmp_path) == (4, ["shard-00002.safetensors"])
    assert_holds(tmp_path)
    named = {shard.file for shard in EmbeddingCache(tmp_path).index.shards}
    assert {file.name for file in tmp_path.glob("shard-*")} == named, "the damaged one is gone"


def test_a_changed_row_is_found_when_it_is_read(tmp_path):
    make(tmp_path)
    path = tmp_path / "shard-00001.safetensors"
    rows = load_file(path)
    rows["t5"][2, 0, 0] += 1e-3
    save_file(rows, path)
    cache = EmbeddingCache(tmp_path)
    cache.encode(PROMPTS[4:6])
    with pytest.raises(ValueError, match="shard-00001.safetensors is damaged .wrong checksum of row 2"):
        cache.encode(PROMPTS)
    assert make(tmp_path) == (0, []), "rows are read only when asked for"
    assert make(tmp_path, verify=True) == (4, ["shard-00001.safetensors"])
    assert_holds(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "damaged or of another version"),
        ("{}", "damaged or of another version"),
        ('{"format": 1}', r"damaged or of another version \(format"),
        (b"\xff\xfe", "damaged or of another version"),
        (None, "holds no index.json; make the folder with `egrpo encode`"),
    ],
)
def test_a_bad_index_is_refused(tmp_path, text, told):
    make(tmp_path)
    if text is None:
        (tmp_path / "index.json").unlink()
    else:
        (tmp_path / "index.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for use in (lambda: EmbeddingCache(tmp_path), lambda: make(tmp_path)):
        with pytest.raises(ValueError, match=f"embeddings: .*{told}"):
            use()
    assert (tmp_path / "shard-00000.safetensors").exists(), "a folder that is not understood is left as it is"


def test_an_index_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "index.json")
    with pytest.raises(ValueError, match="embeddings: cannot read .*index.json: it is a pipe"):
        EmbeddingCache(tmp_path)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    make(tmp_path / "cache")
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    index["shards"][0]["file"] = "../shard-00000.safetensors"
    (tmp_path / "cache" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json is damaged .*shards.0.file"):
        EmbeddingCache(tmp_path / "cache")


def test_another_encoder_is_refused(tmp_path):
    make(tmp_path)
    cache = EmbeddingCache(tmp_path)
    cache.check("abc123", SHAPES)
    with pytest.raises(ValueError, match=r"made by encoder abc123 \(model some.*not by encoder fff of model.path"):
        cache.check("fff", SHAPES)
    for shapes in ({"t5": (3, 9)}, {"t5": (9, 4)}, {"pooled": (9,)}):
        with pytest.raises(ValueError, match=r"t5 3 x 4, pooled 5\); model.path needs t5 \d x \d, pooled \d"):
            cache.check("abc123", SHAPES | shapes)
    for shapes in ({"t5": (3, 4)}, {**SHAPES, "mask": (3,)}):
        with pytest.raises(ValueError, match=r"model.path needs t5 3 x 4"):
            cache.check("abc123", shapes)
    with pytest.raises(ValueError, match="made by encoder abc123 .*not by encoder fff .*choose another"):
        make(tmp_path, index=INDEX.model_copy(update={"encoder": "fff"}))
    assert_holds(tmp_path)


def test_a_folder_of_something_else_is_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds no index.json"):
        make(tmp_path)
    with pytest.raises(ValueError, match="cannot write into .*Not a directory|cannot write into .*File exists"):
        make(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_two_writers_do_not_meet(tmp_path):
    with EmbeddingWriter(tmp_path, INDEX), pytest.raises(ValueError, match="another process is writing into"):
        make(tmp_path)
    make(tmp_path)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "lock").symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match="embeddings: cannot write into .*cache: lock is a link; delete it"):
        make(tmp_path / "cache")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_too_little_room_is_told_before_and_during(tmp_path, monkeypatch):
    with EmbeddingWriter(tmp_path, INDEX) as writer:
        writer.check_space(1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(1000 * 92 - 1))
        assert INDEX.row_bytes == 92  # (3 * 4 + 5) * 4 + 16 + 8
        with pytest.raises(ValueError, match="1,000 prompts need .* GB free; make room"):
            writer.check_space(1000)
    make(tmp_path, prompts=PROMPTS[:6])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        with pytest.raises(ValueError, match="cannot write .*shard.*File too large; .* after the 6 prompts"):
            make(tmp_path, shard_prompts=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_holds(tmp_path, PROMPTS[:6])
    make(tmp_path)
    assert_holds(tmp_path)


def test_what_is_not_finite_is_not_kept(tmp_path):
    tensors = embedding(["a", "b"])
    tensors["pooled"][1, 0] = float("nan")
    told = "'b' is not finite"
    with EmbeddingWriter(tmp_path, INDEX) as writer, pytest.raises(ValueError, match=told):
        writer.add(["a", "b"], tensors)


def test_memory_per_prompt_is_small(tmp_path):
    """What a reader keeps: 32 bytes a prompt, whatever a row takes (here 20,480 bytes of T5 alone)."""
    index, count = INDEX.model_copy(update={"shapes": {"t5": (40, 128)}}), 3000
    prompts = [f"{place}" for place in range(count)]
    with EmbeddingWriter(tmp_path, index, 300 * index.row_bytes) as writer:
        for start in range(0, count, 100):
            writer.add(prompts[start : start + 100], {"t5": torch.ones(100, 40, 128)})
    tracemalloc.start()
    cache = EmbeddingCache(tmp_path)
    assert not len(cache.missing(prompts))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 32 * count + 100_000 and peak < 32 * count + 600_000, (kept, peak)


QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make(folder, prompts=PROMPTS[:6])
    return folder


@QUICK
@given(
    name=st.sampled_from(["index.json", "shard-00000.safetensors", "shard-00001.safetensors"]),
    place=st.floats(0, 1, exclude_max=True),
    piece=st.binary(max_size=9),
    cut=st.booleans(),
)
def test_a_mutilated_cache_gives_the_same_rows_or_is_refused_and_repaired(tmp_path, whole, name, place, piece, cut):
    folder = tmp_path / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    content = (folder / name).read_bytes()
    at = int(place * len(content))
    (folder / name).write_bytes(content[:at] if cut else content[:at] + piece + content[at + len(piece) :])
    try:
        assert_holds(folder, PROMPTS[:6])
    except ValueError as error:
        assert str(error).startswith(("embeddings: ", "prompts: ")) and str(folder) in str(error)
    if name != "index.json":
        make(folder, prompts=PROMPTS[:6], verify=True)
        assert_holds(folder, PROMPTS[:6])
