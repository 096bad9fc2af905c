"""Prompt files, and the order in which ranks draw from them."""

import json
import resource
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from egrpo_fast.prompts import PromptOrder, read_prompts, read_split
from egrpo_fast.shapes import PROMPTS

FEW_REAL_PROMPTS = Path(__file__).parent / "data" / "prompts.txt"
ALL_REAL_PROMPTS = Path(__file__).parents[2] / "shared" / "data" / "hpd_test_prompts.txt"


@pytest.fixture(params=[FEW_REAL_PROMPTS, ALL_REAL_PROMPTS], ids=["few", "all"])
def prompt_file(request):
    if not request.param.exists():
        pytest.skip(f"{request.param.name} does not come with the repository")
    return request.param


def test_a_split_is_the_file_that_is_named_or_the_embedded_captions():
    for split, file in PROMPTS.items():
        assert list(read_split("shapes", split)) == file.read_text().splitlines()
        assert list(read_split(str(FEW_REAL_PROMPTS), split)) == list(read_prompts(FEW_REAL_PROMPTS))
    with pytest.raises(ValueError, match="prompts.held_out: cannot read /nowhere"):
        read_split("/nowhere", "held_out")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_real_prompts_are_drawn_once_per_epoch_over_all_ranks(prompt_file, world_size):
    prompts = list(read_prompts(prompt_file))
    assert len(prompts) == len([line for line in prompt_file.read_text().splitlines() if line.strip()])
    order, per_iteration = PromptOrder(prompts, seed=3), 8
    drawn = {}
    for iteration in range(3 * len(prompts) // per_iteration):
        ranks = [order.iteration(iteration, per_iteration, rank, world_size) for rank in range(world_size)]
        assert len({len(rank) for rank in ranks}) == 1, "every rank draws the same number"
        drawn |= {prompt.number: prompt.text for rank in ranks for prompt in rank}
    epochs = [[drawn[number] for number in range(e * len(prompts), (e + 1) * len(prompts))] for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(prompts), "a prompt was repeated or lost"
    assert epochs[0] != epochs[1] != prompts, "not shuffled anew"


def test_the_order_is_a_function_of_seed_and_number():
    prompts = [str(i) for i in range(50)]
    one, same, other = (PromptOrder(prompts, seed) for seed in (1, 1, 2))
    assert [one[n] for n in (120, 3, 99)] == [same[n] for n in (120, 3, 99)], "whatever was asked before"
    assert [one[n].text for n in range(50)] != [other[n].text for n in range(50)]
    assert [PromptOrder(prompts, 1, shuffle=False)[n].text for n in range(50)] == prompts


def test_blank_lines_and_padding_are_dropped(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeff\n  a cat \r\n\nzwei Häuser\u2028am Fluss\n   \n".encode())
    assert list(read_prompts(tmp_path / "p.txt")) == ["a cat", "zwei Häuser\u2028am Fluss"]


def write(path, prompts, column="prompt"):
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": range(len(prompts)), column: list(prompts)})
        pyarrow.parquet.write_table(table, path, row_group_size=max(3, len(prompts) // 4))
    elif path.suffix == ".txt":
        path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps({"id": 1, column: prompt}) + "\n\n" for prompt in prompts))
    return path


@pytest.mark.parametrize("name", ["p.txt", "p", "p.jsonl", "p.NDJSON", "p.parquet"])
def test_every_kind_of_file_gives_the_same_prompts(tmp_path, name):
    expected = ["a cat", "zwei Häuser", "\N{CAT FACE} {", '"quoted"', "five"]
    path = tmp_path / name
    write(path if path.suffix else tmp_path / "p.txt", expected)
    if not path.suffix:
        (tmp_path / "p.txt").rename(path)
    prompts = read_prompts(path)
    assert list(prompts) == expected and len(prompts) == 5
    assert (prompts[-1], prompts[1:3], prompts[:2]) == (expected[-1], expected[1:3], expected[:2])
    with pytest.raises(IndexError):
        prompts[5]
    path.write_text("changed under way")
    assert list(prompts) == expected, "a file that is edited while a run reads it changes nothing"


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_another_column_may_hold_the_prompts(tmp_path, name):
    path = write(tmp_path / name, ["a", "b"], column="caption")
    assert list(read_prompts(path, column="caption")) == ["a", "b"]
    with pytest.raises(ValueError, match=r"prompts: .*lacks (field|column) 'prompt'.*there are: id, caption"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"fine\n\xff\xfe", "not UTF-8 .byte 5, line 2."),
        ("p.txt", "a cat".encode("utf-16-le"), "is not text: a NUL character in line 1"),
        ("p.txt", None, "cannot read"),
        ("p.parquet", None, "cannot read"),
        ("p.parquet", b"PAR1 and nothing else", "cannot be read as Parquet"),
        ("p.jsonl", b"", "holds no prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', "holds no JSON in line 2"),
        ("p.jsonl", b"[" * 100_000, "holds no JSON in line 1"),
        ("p.jsonl", b'["a"]', "holds no JSON object in line 1"),
        ("p.jsonl", b'\n{"prompt": 3}', "holds int instead of a string in line 2"),
        ("p.jsonl", b'{"prompt": " "}', "holds an empty prompt in line 1"),
        ("p.jsonl", b'{"prompt": "\\ud83d"}', "half a character .a lone surrogate. in line 1"),
        ("p.jsonl", b"{}", "lacks field 'prompt' in line 1; there are: none"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, told):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"prompts.train: .*{told}"):
        read_prompts(path, "prompts.train")


@pytest.mark.parametrize(("values", "told"), [(["a", None], "NoneType .* row 2"), ([1], "int .* row 1")])
def test_parquet_of_something_else_is_refused(tmp_path, values, told):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": values}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=f"p.parquet holds {told}"):
        read_prompts(tmp_path / "p.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "p.parquet", ["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        read_prompts(path)


def test_repeated_prompts_are_told_once_and_kept(tmp_path):
    path = write(tmp_path / "p.txt", ["a", "", "b", "a ", "b", "a", "a"])
    with pytest.warns(UserWarning) as told:
        assert list(read_prompts(path, "prompts.train")) == ["a", "b", "a", "b", "a", "a"]
    (warning,) = told
    expected = "holds 4 of its prompts again (line 4 repeats 1, line 5 repeats 3, line 6 repeats 1, ...)"
    assert str(warning.message) == f"prompts.train: {path} {expected}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_prompts(write(path, ["a", "b"]))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_length_of_the_prompts(tmp_path, suffix):
    count = 20_000
    path = write(tmp_path / f"p{suffix}", [f"{place} {'long ' * 60}" for place in range(count)])
    tracemalloc.start()
    prompts = read_prompts(path)
    order = PromptOrder(prompts, seed=0)
    drawn = sum(len(order[number].text) for number in range(0, count, 100))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert drawn > 200 * 300 and len(prompts) == count
    assert kept < 20 * count + 300_000 and peak < 120 * count, (kept, peak)  # the prompts alone are 300 bytes each


@pytest.mark.slow
def test_100_000_prompts_stream_in_flat_memory(tmp_path):
    """Resident memory, as the system counts it: 100,000 prompts of 3,000 bytes are 300 MB, the reader takes a tenth."""
    path = write(tmp_path / "p.txt", (f"{place} {'x' * 3000}" for place in range(100_000)))
    code = (
        "import resource, sys; from egrpo_fast.prompts import *; "
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = used(); "
        "order = PromptOrder(read_prompts(sys.argv[1]), 0); assert all(order[n].text for n in range(100_000)); "
        "print(used() - before)"
    )
    told = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(told.stdout) < 30 * 1024, f"{told.stdout} KiB"


QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PIECES = st.sampled_from(
    [b'{"prompt": "a"}\n', b'"prompt"', b"{", b"}", b"\n", b"\xff", b"\\u", b"\0", b"d83d", b"[1]"]
)


def read_or_refuse(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            prompts = read_prompts(path)
        except ValueError as error:
            assert str(error).startswith("prompts: ") and path.name in str(error)
        else:
            assert all(prompt == prompt.strip() != "" for prompt in prompts)


@QUICK
@given(suffix=st.sampled_from([".txt", ".jsonl"]), content=st.one_of(st.binary(), st.lists(PIECES).map(b"".join)))
def test_any_bytes_are_read_or_refused(tmp_path, suffix, content):
    path = tmp_path / f"p{suffix}"
    path.write_bytes(content)
    read_or_refuse(path)


@QUICK
@given(place=st.floats(0, 1, exclude_max=True), piece=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_a_mutilated_parquet_file_is_read_or_refused(tmp_path, place, piece, cut):
    path = write(tmp_path / "p.parquet", ["a cat", "a dog", "a fish", "a bird"])
    content = path.read_bytes()
    at = int(place * len(content))
    path.write_bytes(content[:at] if cut else content[:at] + piece + content[at + len(piece) :])
    read_or_refuse(path)


@QUICK
@given(prompts=st.lists(st.text(min_size=1).map(str.strip).filter(lambda text: text and "\0" not in text), min_size=1))
def test_what_is_written_is_read(tmp_path, prompts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for suffix in (".jsonl", ".parquet"):
            assert list(read_prompts(write(tmp_path / f"p{suffix}", prompts))) == prompts


def test_a_full_disk_is_told(tmp_path):
    path = write(tmp_path / "p.txt", [f"{place} {'x' * 100}" for place in range(2000)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(ValueError, match="prompts: cannot read .*File too large"):
            read_prompts(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
