"""Which model it is: the same wherever it lies and however it is split; another where a part of it was changed."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from egrpo_fast.config import RUN_FILE
from egrpo_fast.models.fingerprint import base_of, check_base, differing, identity
from egrpo_fast.shapes import PIPELINE


@pytest.fixture
def pipeline(tmp_path):
    shutil.copytree(PIPELINE, tmp_path / "moved")
    return tmp_path / "moved"


@pytest.fixture(scope="module")
def base():
    return identity(PIPELINE)


def change(file):
    weights = load_file(file)
    weights[min(weights)] *= 1.001
    save_file(weights, file)


def set_key(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


CHANGES = {
    "transformer weights": (
        "transformer",
        lambda folder: change(folder / "transformer/diffusion_pytorch_model.safetensors"),
    ),
    "transformer config": ("transformer", lambda folder: set_key(folder / "transformer/config.json", axes_dims_rope=1)),
    "VAE weights": ("vae", lambda folder: change(folder / "vae/diffusion_pytorch_model.safetensors")),
    "VAE config": ("vae", lambda folder: set_key(folder / "vae/config.json", scaling_factor=0.5)),
    "T5 weights": ("text encoders", lambda folder: change(folder / "text_encoder_2/model.safetensors")),
    "tokenizer": ("text encoders", lambda folder: (folder / "tokenizer/merges.txt").write_text("")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_part_is_seen_and_named(what, pipeline, base):
    part, make = CHANGES[what]
    make(pipeline)
    found = identity(pipeline)
    assert [name for name in base if found[name] != base[name]] == [part]
    assert differing(base, found) == part


def test_neither_its_place_nor_its_writer_nor_its_age_matters(pipeline, base):
    set_key(pipeline / "transformer/config.json", _diffusers_version="9.9", _name_or_path="elsewhere")
    for file in pipeline.rglob("*.safetensors"):
        file.touch()
    assert identity(pipeline) == base


def make_run(folder, told):
    folder.mkdir()
    (folder / RUN_FILE).write_text(told)
    return folder


def test_a_run_keeps_to_the_model_it_began_with(pipeline, base, tmp_path):
    run = make_run(tmp_path / "run", json.dumps({"world_size": 1, "base": base}))
    assert base_of(run) == base
    check_base(run, pipeline)
    for what in ("VAE weights", "transformer weights"):
        CHANGES[what][1](pipeline)
    told = "model.path: .*moved is not the model this run began with: another transformer and vae; put that one back"
    with pytest.raises(ValueError, match=told):
        check_base(run, pipeline)


def test_a_run_without_a_record_is_taken_on_trust(tmp_path):
    for name, told in (("old", "{}"), ("older", None)):
        run = make_run(tmp_path / name, told or "")
        if told is None:
            (run / RUN_FILE).unlink()
        assert base_of(run) == {}
        check_base(run, tmp_path / "nowhere")


@pytest.mark.parametrize("told", ["", "[]", "{", "[" * 1_000_000], ids=["empty", "list", "cut", "deep"])
def test_a_damaged_record_is_named(told, tmp_path):
    with pytest.raises(ValueError, match="run/run.json cannot be read"):
        base_of(make_run(tmp_path / "run", told))


@pytest.mark.parametrize("name", ["transformer/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer"])
def test_what_is_missing_is_named(name, pipeline):
    path = pipeline / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=f"model.path: .*{name.partition('/')[0]}"):
        identity(pipeline)
