"""What a run reads beside its model: a resumed run is held to what it began with."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from egrpo_fast.config import RUN_FILE, load_config
from egrpo_fast.files import FILE_SAMPLES, SAMPLE_BYTES
from egrpo_fast.rewards import make_reward
from egrpo_fast.runs.inputs import compare, of_files, of_rewards
from egrpo_fast.shapes import CLIP, PIPELINE

PROMPTS = ["a cat", "a dog", "a bird"]


def files(*overrides, train=PROMPTS, held_out=PROMPTS, package="1"):
    config = load_config("shapes", ["evaluation.num_prompts=2", *overrides])
    return of_files(config, train, held_out, package)


def changed(before, after):
    assert before.keys() == after.keys()
    return [name for name in before if before[name] != after[name]]


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"train": PROMPTS[::-1]}, ["prompts.train"]),
        ({"train": ["a cata", " dog", "a bird"]}, ["prompts.train"]),
        ({"held_out": ["a cat", "a dog."]}, ["prompts.held_out"]),
        ({"held_out": ["a cat", "a dog", "never drawn"]}, []),
        ({"package": "2"}, ["source of egrpo_fast"]),
    ],
)
def test_other_prompts_are_seen_where_they_are_used(change, seen):
    assert changed(files(), files(**change)) == seen


def write_lora(path, value=1.0):
    path.parent.mkdir(exist_ok=True)
    save_file({"transformer.x.lora_A.weight": torch.full((4, 8), value)}, path)


def copy_part(part, folder):
    folder.mkdir(parents=True)
    for file in (PIPELINE / part).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def change_weights(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights[min(weights)] *= 1.001
    save_file(weights, file)


@pytest.mark.parametrize("field", ["model.lora.path", "tail.lora"])
@pytest.mark.parametrize("given", ["lora", "lora/pytorch_lora_weights.safetensors"], ids=["folder", "file"])
def test_another_lora_is_seen(field, given, tmp_path):
    write_lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    setting = f"{field}={tmp_path / given}"
    before = files(setting)
    assert field in before and changed(before, files(setting)) == []
    write_lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors", 1.0001)
    assert changed(before, files(setting)) == [field]
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{field}: (no file or folder|.* holds 0 safetensors files)"):
        files(setting)


def test_only_the_file_of_a_loras_folder_that_is_read_is_looked_at(tmp_path):
    for name in ("pytorch_lora_weights", "aside"):
        write_lora(tmp_path / "lora" / f"{name}.safetensors")
    before = files(f"tail.lora={tmp_path / 'lora'}")
    write_lora(tmp_path / "lora" / "aside.safetensors", 2.0)
    assert changed(before, files(f"tail.lora={tmp_path / 'lora'}")) == []


@pytest.mark.parametrize(
    ("setting", "part"), [("tail.path={}", "transformer"), ("tail.decoder={}/transformer", "transformer")]
)
def test_another_model_of_the_tail_is_seen(setting, part, tmp_path):
    copy_part("transformer", tmp_path / "tail" / part)
    setting = setting.format(tmp_path / "tail")
    field = setting.partition("=")[0]
    before = files(setting)
    assert field in before and changed(before, files(setting)) == []
    change_weights(tmp_path / "tail" / part)
    assert changed(before, files(setting)) == [field]


def test_a_large_file_is_read_in_pieces(tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    with path.open("wb") as file:
        file.truncate(4 * FILE_SAMPLES * SAMPLE_BYTES)
    setting = f"tail.lora={path}"
    before, pieces, read = files(setting), [], os.pread

    def noted(file, count, place):
        pieces.append(count)
        return read(file, count, place)

    monkeypatch.setattr(os, "pread", noted)
    assert changed(before, files(setting)) == [] and sum(pieces) == FILE_SAMPLES * SAMPLE_BYTES
    with path.open("r+b") as file:
        file.seek(2**24)
        file.write(b"x" * 4 * SAMPLE_BYTES)
    assert changed(before, files(setting)) == ["tail.lora"]


def test_other_weights_of_a_reward_are_seen(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in CLIP.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    def read():
        return of_rewards({"clip": make_reward("clip", {"model": f"local-dir:{folder}"})})

    before = of_rewards({"clip": make_reward("clip", {"model": "shapes"})})
    assert list(before) == ["rewards.clip"] and read() == before, "wherever they lie"
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["logit_scale"] *= 1.001
    save_file(weights, folder / "open_clip_model.safetensors")
    assert changed(before, read()) == ["rewards.clip"]


def test_the_source_of_a_users_reward_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_reward_of_a_test.py").write_text(
        "def bright(images, prompts):\n    return images.mean((1, 2, 3))\n"
    )
    name = "my_reward_of_a_test:bright"
    rewards = {f"{name}": make_reward(name, {}), "jpeg": make_reward("jpeg", {})}
    before = of_rewards(rewards)
    assert list(before) == [f"source of rewards.{name}"]
    with (tmp_path / "my_reward_of_a_test.py").open("a") as file:
        file.write("# mended\n")
    assert changed(before, of_rewards(rewards)) == list(before)
    (tmp_path / "my_reward_of_a_test.py").unlink()
    with pytest.warns(UserWarning, match=f"rewards.{name}: its source .*test.py cannot be read .No such file .*not be"):
        assert of_rewards(rewards) == {}
    del sys.modules["my_reward_of_a_test"]


def test_a_resumed_run_is_refused_or_told_what_changed(tmp_path):
    (tmp_path / RUN_FILE).write_text(
        json.dumps({"inputs": {"prompts.train": "a", "tail.lora": "b", "source of x": "c"}})
    )
    same = {"prompts.train": "a", "tail.lora": "b", "source of x": "c"}
    assert compare(tmp_path, same) == []
    with pytest.raises(
        ValueError, match="prompts.train, tail.lora: not the same as when the run in .* began; put that"
    ):
        compare(tmp_path, {"prompts.train": "b", "tail.lora": "a", "source of x": "d"})
    assert compare(tmp_path, {**same, "source of x": "d"}) == [
        "resume: the source of x has changed since this run began"
    ]


def test_what_an_old_run_did_not_record_is_told(tmp_path):
    (tmp_path / RUN_FILE).write_text("{}")
    (told,) = compare(tmp_path, {"prompts.train": "a", "rewards.clip": "b"})
    assert told.endswith("run.json does not say what prompts.train, rewards.clip was; it is taken to be the same")
