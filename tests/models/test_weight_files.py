"""Weight files: their headers tell what is wrong before any weight is read."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from egrpo_fast.files import fingerprint
from egrpo_fast.models.weight_files import WeightFiles, new_adapter

STEM = "diffusion_pytorch_model"
TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.ones(3),
    "b.weight": torch.arange(4, dtype=torch.bfloat16),
}


def sharded(folder, shards=(("a.weight", "a.bias"), ("b.weight",))):
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"{STEM}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: TENSORS[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("files", [1, 2])
def test_what_was_written_is_read(files, tmp_path):
    if files == 1:
        save_file(TENSORS, tmp_path / f"{STEM}.safetensors")
    else:
        sharded(tmp_path)
    weights = WeightFiles(tmp_path)
    assert weights.shapes == {name: tuple(value.shape) for name, value in TENSORS.items()}
    assert weights.largest_file == max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    for name in (*TENSORS, *reversed(TENSORS)):
        assert torch.equal(weights.read(name), TENSORS[name]) and weights.read(name).dtype == TENSORS[name].dtype
    weights.check(weights.shapes)
    weights.close()


def test_samples_see_a_tensor_that_was_touched_and_not_how_files_are_split(tmp_path, monkeypatch):
    def sampled(name, **changed):
        (folder := tmp_path / name).mkdir()
        save_file({**TENSORS, "c.weight": large, **changed}, folder / f"{STEM}.safetensors")
        return WeightFiles(folder).samples()

    large = torch.arange(100_000.0).reshape(100, 1000)
    whole = sampled("whole")
    assert [len(part) for part in whole if part.startswith(b"c.weight torch.float32 (100, 1000)")] == [34 + 16 * 4096]
    monkeypatch.setitem(TENSORS, "c.weight", large)
    assert WeightFiles(sharded(tmp_path, (("c.weight", "a.weight"), ("b.weight", "a.bias")))).samples() == whole
    assert sampled("scaled", **{"c.weight": large * 1.001}) != whole
    assert sampled("other shape", **{"c.weight": large.reshape(1000, 100)}) != whole
    assert sampled("other dtype", **{"b.weight": TENSORS["b.weight"].view(torch.float16)}) != whole
    (between := large.clone()).view(-1)[1500] += 1
    assert sampled("between the samples", **{"c.weight": between}) == whole, "as its docstring says"
    for place in (0, -1):
        (end := large.clone()).view(-1)[place] += 1
        assert sampled(f"end {place}", **{"c.weight": end}) != whole


def test_a_fingerprint_knows_where_parts_end():
    assert len({fingerprint(parts) for parts in ([b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"c", b"ab"])}) == 4


def header(text, body=b""):
    return struct.pack("<Q", len(text)) + text + body


def first_shard(folder):
    return min(folder.glob("*.safetensors"))


def cut(by):
    return lambda folder: first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:-by])


def write(content):
    return lambda folder: first_shard(folder).write_bytes(content)


def index(text):
    return lambda folder: (folder / f"{STEM}.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        pytest.param(cut(1), "00001-of-00002.safetensors has .*, its header asks for .*: download it again", id="cut"),
        pytest.param(cut(60), "00001-of-00002.safetensors", id="cut into the header"),
        pytest.param(write(b""), "00001-of-00002.safetensors cannot be read as safetensors", id="empty"),
        pytest.param(write(b"\0" * 100), "00001-of-00002.safetensors cannot be read as safetensors", id="zeros"),
        pytest.param(write(b"\xff" * 100), "no safetensors header", id="not safetensors"),
        pytest.param(write(header(b"[1, 2]")), "cannot be read as safetensors", id="another header"),
        pytest.param(write(header(b'{"a.weight": {"shape": [1]}}')), "cannot be read as safetensors", id="no offsets"),
        pytest.param(lambda f: first_shard(f).unlink(), "lacks .*00001-of-00002.safetensors", id="absent shard"),
        pytest.param(index("{"), "index.json cannot be read", id="broken index"),
        pytest.param(index("[]"), "index.json cannot be read", id="another index"),
        pytest.param(index('{"weight_map": {}}'), "index.json names no file", id="empty index"),
        pytest.param(index('{"weight_map": {"a": 3}}'), "index.json cannot be read", id="index of numbers"),
        *(
            pytest.param(index(json.dumps({"weight_map": {"a": name}})), "names .* file in its own folder", id=name)
            for name in ("../../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..")
        ),
        pytest.param(
            lambda f: (f / f"{STEM}.safetensors.index.json").unlink(),
            f"neither {STEM}.safetensors nor {STEM}.safetensors.index.json", id="no index",
        ),
    ],
)  # fmt: skip
def test_damage_is_told_by_the_files_name(damage, told, tmp_path):
    damage(sharded(tmp_path))
    with pytest.raises(ValueError, match=told):
        WeightFiles(tmp_path)


def test_what_safetensors_itself_refuses_is_told_on_reading(tmp_path):
    """A header whose sizes add up, of a type that does not exist."""
    content = header(b'{"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}', bytes(8))
    (tmp_path / f"{STEM}.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"{STEM}.safetensors: a cannot be read"):
        WeightFiles(tmp_path).read("a")


def test_weights_of_another_model_are_told_by_tensor(tmp_path):
    weights = WeightFiles(sharded(tmp_path))
    shapes = weights.shapes
    with pytest.raises(ValueError, match=r"lack 1 \(c.weight, ...\)$"):
        weights.check(shapes | {"c.weight": (1,)})
    with pytest.raises(ValueError, match=r"of 1 tensors they lack 1 \(c, ...\) and add 3 \(a.bias, ...\)"):
        weights.check({"c": (1,)})
    with pytest.raises(ValueError, match=r"a.weight is \(2, 3\), not \(3, 2\)"):
        weights.check(shapes | {"a.weight": (3, 2)})


def test_a_new_adapter_is_a_function_of_seed_and_name():
    a = new_adapter("x.lora_A.default.weight", (4, 100), 0)
    assert torch.equal(a, new_adapter("x.lora_A.default.weight", (4, 100), 0))
    assert not torch.equal(a, new_adapter("y.lora_A.default.weight", (4, 100), 0))
    assert not torch.equal(a, new_adapter("x.lora_A.default.weight", (4, 100), 1))
    assert 0.09 < a.abs().max() <= 0.1 and abs(a.mean()) < 0.02
    assert not new_adapter("x.lora_B.default.weight", (100, 4), 0).any(), "a new adapter changes nothing"
