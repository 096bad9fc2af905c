"""Prompt files, and the order in which ranks draw from them."""

import csv
import gzip
import json
import os
import sys
import tracemalloc
import warnings
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from egrpo_fast.prompts import files as prompts_module
from egrpo_fast.prompts import formats as prompt_files
from egrpo_fast.prompts.files import read_prompts, read_split
from egrpo_fast.prompts.order import PromptOrder
from egrpo_fast.shapes import PROMPTS

FEW_REAL_PROMPTS = Path(__file__).parents[1] / "data" / "prompts.txt"
ALL_REAL_PROMPTS = Path(__file__).parents[3] / "shared" / "data" / "hpd_test_prompts.txt"


def test_a_list_is_its_own_prompts():
    assert list(read_split([" a cat ", "a dog"], "train")) == ["a cat", "a dog"]
    with pytest.warns(UserWarning, match=r"^prompts.train: the list holds 1 of its prompts again \(prompt 2 "):
        read_split(["a cat", "a cat"], "train")
    with pytest.raises(ValueError, match="^prompts.held_out: the list holds an empty prompt in prompt 2$"):
        read_split(["a cat", "  "], "held_out")


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
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    kind = kind.lower()
    if kind == ".parquet":
        table = pyarrow.table({"id": range(len(prompts)), column: list(prompts)})
        pyarrow.parquet.write_table(table, path, row_group_size=max(3, len(prompts) // 4))
    elif kind in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, "excel" if kind == ".csv" else "excel-tab")
            rows.writerows([("id", column), *((n, prompt) for n, prompt in enumerate(prompts))])
    elif kind == ".json":
        path.write_text(json.dumps([{"id": 1, column: prompt} for prompt in prompts], indent=1))
    elif kind in ("", ".txt"):
        path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps({"id": 1, column: prompt}) + "\n\n" for prompt in prompts))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


FILES = ["p.txt", "p", "p.jsonl", "p.NDJSON", "p.json", "p.csv", "p.tsv", "p.parquet"]


@pytest.mark.parametrize("name", [*FILES, *(f"{name}.gz" for name in FILES)])
def test_every_kind_of_file_gives_the_same_prompts(tmp_path, name):
    expected = ["a cat", "zwei Häuser", "\N{CAT FACE} {", '"quoted", and on', "five"]
    path = write(tmp_path / name, expected)
    prompts = read_prompts(path)
    assert list(prompts) == expected and len(prompts) == 5
    assert (prompts[-1], prompts[1:3], prompts[:2]) == (expected[-1], expected[1:3], expected[:2])
    with pytest.raises(IndexError):
        prompts[5]
    path.write_text("changed under way")
    assert list(prompts) == expected, "a file that is edited while a run reads it changes nothing"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("p.txt", ["a cat", "", "a dog"]),
        ("p.jsonl", ['{"prompt": "a cat"}', "", '{"prompt": "a dog"}']),
        ("p.json", ['{"prompt": "a cat"}', '{"prompt": "a dog"}']),
        ("p.json", ["", "[", '"a cat",', '{"prompt": "a dog"}', "]"]),
        ("p.csv", ["prompt", "a cat", "", '"a dog"']),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_end_and_files_begin_in_every_way_there_is(tmp_path, name, lines, end, mark):
    (tmp_path / name).write_text(mark + end.join(lines), encoding="utf-8", newline="")
    assert list(read_prompts(tmp_path / name)) == ["a cat", "a dog"]


def test_a_quoted_field_may_hold_what_separates(tmp_path):
    (tmp_path / "p.csv").write_text('id,prompt\n1,"a cat, sitting,\non ""a"" mat"\n2,a 5" disk\n')
    assert list(read_prompts(tmp_path / "p.csv")) == ['a cat, sitting,\non "a" mat', 'a 5" disk']


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.tsv", "p.parquet"])
def test_another_column_may_hold_the_prompts(tmp_path, name):
    path = write(tmp_path / name, ["a", "b"], column="caption")
    assert list(read_prompts(path, column="caption")) == ["a", "b"]
    with pytest.raises(ValueError, match=r"prompts: .*lacks (field|column) 'prompt'.*are: id, caption .prompts.column"):
        read_prompts(path)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), ("/dev/zero", "a device"), (tmp_path, "a folder")):
        with pytest.raises(
            ValueError, match=f"prompts.train: cannot read .*: it is {kind}; a regular file is expected"
        ):
            read_prompts(path, "prompts.train")


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "p.json"])
def test_a_file_without_line_ends_is_refused_in_little_memory(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.write(b"a")
        file.truncate(2**30)
    tracemalloc.start()
    with pytest.raises(ValueError, match="holds more than 1,048,576 characters in line 1"):
        read_prompts(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_what_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "MOST_JSON", 20)
    monkeypatch.setattr(prompt_files, "MOST_UNPACKED", 20)
    monkeypatch.setattr(prompts_module, "MOST_PROMPTS", 2)
    for name, told in (
        ("p.txt", "than 2 prompts"), ("p.txt.gz", "unpacks to more than 20 bytes"), ("p.json", "more than 20 bytes")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            read_prompts(write(tmp_path / name, ["a long prompt", "another", "and a third"]))


class DataSet:
    """What `datasets.load_dataset` returns, as far as this project uses it."""

    def __init__(self, columns):
        self.columns, self.column_names = columns, list(columns)

    def select_columns(self, names):
        return DataSet({name: self.columns[name] for name in names})

    def iter(self, size):
        whole = next(iter(self.columns.values()))
        for start in range(0, len(whole), size):
            yield {name: values[start : start + size] for name, values in self.columns.items()}


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("org/some-set:train", ("org/some-set", None, "train")),
        ("org/some.set/v1.0:train[:10%]", ("org/some.set", "v1.0", "train[:10%]")),
        ("./a/folder:test", ("./a/folder", None, "test")),
        ("/a/folder:test", ("/a/folder", None, "test")),
    ],
)
def test_a_data_set_of_the_hub(name, called, monkeypatch):
    """Without the network: what would be asked of `datasets`, and what becomes of its answer."""
    asked = []

    def load_dataset(path, config, *, split):
        asked.append((path, config, split))
        return DataSet({"id": list(range(1500)), "caption": [f"image {n} " for n in range(1500)]})

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    source = f"datasets:{name}"
    assert list(read_split(source, "train", "caption")) == [f"image {n}" for n in range(1500)] and asked == [called]
    with pytest.raises(ValueError, match="prompts.train: datasets:.* lacks column 'prompt'; there are: id, caption"):
        read_split(source, "train")
    with pytest.raises(ValueError, match="holds int instead of a string in row 1"):
        read_split(source, "train", "id")


def test_a_data_set_in_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train-00000.parquet", ["a cat", "a dog"], "caption")
    assert list(read_prompts(f"datasets:{tmp_path / 'set'}:train", column="caption")) == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="cannot be loaded: .*test"):
        read_prompts(f"datasets:{tmp_path / 'set'}:test")


@pytest.mark.parametrize(
    "name", ["org/name", "name:train", "org/name:", "org/name:train:2", "~/folder:train", ":train"]
)
def test_a_data_set_without_its_split_is_refused(name):
    with pytest.raises(ValueError, match=f"prompts.train: datasets:{name} is not datasets:ORG/NAME:SPLIT"):
        read_split(f"datasets:{name}", "train")


def test_without_datasets_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install 'egrpo_fast.datasets.'"):
        read_split("datasets:org/name:train", "train")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"fine\nso \xff\xfe", "not UTF-8 .byte 0xff at character 4 of line 2."),
        ("p.txt", "a cat".encode("utf-16-le"), "is not text: a NUL character in line 1"),
        ("p.txt", "a cat".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("p.csv", "prompt\na cat".encode("utf-16"), "is UTF-16"),
        ("p.json", '["a cat"]'.encode("utf-16"), "is UTF-16"),
        ("p.txt", b'{"prompt": "a cat"}\n', "is JSON in line 1; name it .json or .jsonl"),
        ("p.txt", b'\n[\n"a cat",\n"a dog"]', "is JSON in line 2"),
        ("p.txt", b"a" * 20_001, "holds a prompt of 20,001 characters in line 1; at most 20,000"),
        ("p.yaml", b"- a cat", "is of no kind that is read ..yaml.; there are: .txt, .csv, "),
        ("p.yaml.gz", b"", "is of no kind that is read ..yaml."),
        ("p.txt.gz", b"a cat", "is no whole gzip file"),
        ("p.txt.gz", gzip.compress(b"a cat", mtime=0)[:-9], "is no whole gzip file"),
        ("p.csv", b"a cat\na dog", "lacks column 'prompt'; there are: a cat .prompts.column, or --column"),
        ("p.csv", b"id;prompt\n1;a cat", "lacks column 'prompt'; there are: id;prompt"),
        ("p.csv", b"", "lacks column 'prompt'; there are: none"),
        ("p.csv", b"prompt\n", "holds no prompt"),
        ("p.csv", b"prompt,prompt\na,b", "holds more than one column 'prompt'"),
        ("p.csv", b"prompt\na cat, sitting", "holds 2 fields in line 2, its header 1; .* in double quotes"),
        ("p.csv", b'id,prompt\n"1\n",a\n2', "holds 1 fields in line 4, its header 2"),
        ("p.csv", b'prompt\na\n"a cat', "is no table in line 3"),
        ("p.tsv", b'prompt\n"Hello" on a sign', "is no table in line 2"),
        ("p.csv", b"prompt,b\n,b", "holds an empty prompt in line 2"),
        ("p.csv", b"prompt\n" + b"a" * 200_000, "is no table in line 2: field larger than"),
        ("p.json", b'{"prompts": ["a cat"]}', "lacks field 'prompt' in line 1; there are: prompts"),
        ("p.json", b'{\n"prompt": "a cat"\n}', "holds no JSON in line 1"),
        ("p.json", b'["a cat", ', "holds no JSON in it"),
        ("p.json", b'["a cat", ["a dog"]]', "holds no JSON object in entry 2"),
        ("p.json", b"[" * 100_000, "holds no JSON in it"),
        ("p.json", b"[1" + b"0" * 5000 + b"]", "holds no JSON in it"),
        ("p.json", b'["\xff"]', "is not UTF-8 .byte 2"),
        ("p.json", b"[]", "holds no prompt; one per entry"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', "holds 'prompt' twice in one object in line 1"),
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


QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PIECES = st.sampled_from(
    [
        b'{"prompt": "a"}\n',
        b'"prompt"',
        b"prompt\n",
        b",",
        b"\t",
        b"\r",
        b"{",
        b"}",
        b"\n",
        b"\xff",
        b"\\u",
        b"\0",
        b"d83d",
        b"[1]",
    ]
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
@given(
    suffix=st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".tsv"]),
    content=st.one_of(st.binary(), st.lists(PIECES).map(b"".join)),
)
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
        for suffix in (".jsonl", ".json", ".parquet"):
            assert list(read_prompts(write(tmp_path / f"p{suffix}", prompts))) == prompts
