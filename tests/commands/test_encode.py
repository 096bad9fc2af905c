"""`egrpo encode` and the text encoders: the pipeline's numbers, live and from the cache."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from egrpo_fast import cli
from egrpo_fast.commands import encode as encoding
from egrpo_fast.config import ModelConfig
from egrpo_fast.models.flux.text import FluxTextEncoder
from egrpo_fast.models.text import SHOWN, CachedText
from egrpo_fast.prompts.embeddings import EmbeddingCache
from egrpo_fast.prompts.files import read_prompts
from egrpo_fast.shapes import PIPELINE, PROMPTS

TOKENS = 24
REAL = Path(__file__).parents[1] / "data" / "prompts.txt"
CAPTIONS = read_prompts(PROMPTS["held_out"])


@pytest.fixture(scope="module")
def encoder():
    return FluxTextEncoder(PIPELINE, model())


def model(tokens=TOKENS, dtype="float32", quantization="none"):
    return ModelConfig(path="shapes", max_sequence_length=tokens, dtype=dtype, text_encoder_quantization=quantization)


def fingerprint(folder=PIPELINE, **settings):
    return FluxTextEncoder.fingerprint(folder, model(**settings))


def cached(embeddings, folder=PIPELINE, **settings):
    return CachedText(embeddings, FluxTextEncoder, folder, model(**settings))


@pytest.fixture
def pipeline(tmp_path):
    """A copy to break, without transformer and VAE."""
    folder = tmp_path / "pipeline"
    shutil.copytree(PIPELINE, folder, ignore=shutil.ignore_patterns("transformer", "vae"))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [TOKENS, 40])
def test_the_encoder_gives_the_pipelines_numbers(dtype, tokens):
    prompts = [*CAPTIONS[:5], *read_prompts(REAL)[:5], ""]
    theirs = FluxPipeline.from_pretrained(PIPELINE, dtype=getattr(torch, dtype))
    with torch.no_grad():  # with gradients, attention takes another path and rounds otherwise
        t5, pooled, _ = theirs.encode_prompt(prompts, max_sequence_length=tokens)
    ours = FluxTextEncoder(PIPELINE, model(tokens, dtype)).encode(prompts)
    assert torch.equal(ours["t5"], t5) and torch.equal(ours["pooled"], pooled)
    assert ours["t5"].dtype == getattr(torch, dtype) and not ours["t5"].requires_grad
    assert FluxTextEncoder.shapes(PIPELINE, model(tokens)) == {"t5": t5.shape[1:], "pooled": pooled.shape[1:]}


def test_truncation_is_told_with_what_was_cut(encoder):
    short, long = "a red circle", "a red circle and " * 8 + "more"
    assert encoder.truncated([short]) == []
    t5, clip = encoder.truncated([short, long])
    for found, length in ((t5, TOKENS), (clip, TOKENS)):
        assert found.prompt == long and found.limit == length < found.tokens and long.endswith(found.cut) and found.cut
        seen = long.removesuffix(found.cut)
        assert not [one for one in encoder.truncated([seen]) if one.encoder == found.encoder], "all of it is seen"
    cut_too = encoder.encode([long.removesuffix(t5.cut)])
    assert torch.equal(cut_too["t5"], encoder.encode([long])["t5"]), "nothing but what was cut is unseen"
    assert "T5 sees 24 of " in str(t5)


@pytest.mark.parametrize(("quantization", "error"), [("int8", 0.03), ("nf4", 0.3)])
def test_quantized_weights_are_near(encoder, quantization, error):
    pytest.importorskip("bitsandbytes")
    quantized = FluxTextEncoder(PIPELINE, model(quantization=quantization))
    exact, found = (one.encode(CAPTIONS[:8])["t5"] for one in (encoder, quantized))
    assert 0 < (found - exact).norm() / exact.norm() < error


def test_the_fingerprint_covers_what_decides_the_embeddings(pipeline):
    same = fingerprint()
    assert same == fingerprint(pipeline), "the place does not matter"
    settings = [{"tokens": 32}, {"quantization": "int8"}, {"dtype": "bfloat16"}]
    found = {same, *(fingerprint(**some) for some in settings)}
    for name in ("text_encoder", "text_encoder_2"):
        path = pipeline / name / "model.safetensors"
        weights = load_file(path)
        weights[min(weights)].mul_(1.001)
        save_file(weights, path)
        found.add(fingerprint(pipeline))
    for name in ("tokenizer/tokenizer.json", "tokenizer_2/tokenizer_config.json", "text_encoder_2/config.json"):
        (pipeline / name).write_text((pipeline / name).read_text() + "\n")
        found.add(fingerprint(pipeline))
    assert len(found) == 1 + len(settings) + 2 + 3, "each change is seen"


def test_the_fingerprint_does_not_see_how_weights_are_split(pipeline):
    before = fingerprint(pipeline)
    folder = pipeline / "text_encoder_2"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(weights, reverse=True), {}
    for part, file in (
        (names[:9], "model-00001-of-00002.safetensors"),
        (names[9:], "model-00002-of-00002.safetensors"),
    ):
        save_file({name: weights[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert fingerprint(pipeline) == before


def drop_a_weight(folder):
    path = folder / "text_encoder_2" / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def truncate(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: shutil.rmtree(folder / "text_encoder_2"), "lacks text_encoder_2/config.json"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "lacks tokenizer"),
        (lambda folder: (folder / "text_encoder" / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "text_encoder" / "config.json").write_text("[]"), "clip_text_model is expected"),
        (lambda folder: shutil.copytree(folder / "text_encoder", folder / "text_encoder_2", dirs_exist_ok=True),
         "text_encoder_2 holds a clip_text_model; t5 is expected"),
        (lambda folder: (folder / "tokenizer_2" / "tokenizer.json").write_text("{}"), "tokenizer_2 could not be"),
        (truncate, "text_encoder/model.safetensors .*bytes"),
        (drop_a_weight, "text_encoder_2 lacks 1 weights of its encoder, first encoder.final_layer_norm.weight"),
    ],
    ids=["no T5", "no tokenizer", "no JSON", "no object", "wrong kind", "bad tokenizer", "truncated", "a weight less"],
)  # fmt: skip
def test_a_bad_pipeline_is_refused_by_name(pipeline, damage, told):
    damage(pipeline)
    with pytest.raises(ValueError, match=f"model.path: .*{told}"):
        FluxTextEncoder(pipeline, model())


def encode(out, files=("shapes",), **options):
    options = {"max_sequence_length": TOKENS, "dtype": "float32", **options}
    return encoding.encode(files, out, "shapes", **options)


def test_cached_rows_equal_those_on_the_fly_bit_for_bit_in_the_same_batches(tmp_path, encoder):
    """And in other batches to rounding: matrix products of other shapes add in another order."""
    assert encode(tmp_path / "e", files=[PROMPTS["held_out"]], batch=16) == len(CAPTIONS)
    text = cached(tmp_path / "e")
    for size in (16, 1, 5):
        for start in range(0, min(64, len(CAPTIONS)), size):
            some = CAPTIONS[start : start + size]
            found, live = text.encode(some), encoder.encode(some)
            torch.testing.assert_close(found, live, rtol=0, atol=0 if size == 16 else 1e-5)


def test_the_cache_of_another_encoder_is_refused(tmp_path, pipeline):
    encode(tmp_path / "e", files=[PROMPTS["held_out"]])
    cached(tmp_path / "e", pipeline)
    for settings in ({"tokens": 32}, {"dtype": "bfloat16"}, {"quantization": "nf4"}):
        with pytest.raises(ValueError, match=r"embeddings: .* was made by encoder \w+ \(model shapes, .*max_sequence"):
            cached(tmp_path / "e", pipeline, **settings)
    weights = load_file(pipeline / "text_encoder_2" / "model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, pipeline / "text_encoder_2" / "model.safetensors")
    with pytest.raises(ValueError, match="not by encoder .* of .*pipeline"):
        cached(tmp_path / "e", pipeline)


CHILD = """
import sys, time
from egrpo_fast.commands import encode as encoding
from egrpo_fast.models.flux.text import FluxTextEncoder
encode, calls = FluxTextEncoder.encode, []
def hang(self, prompts):
    calls.append(prompts)
    if len(calls) == 8:
        time.sleep(1800)
    return encode(self, prompts)
FluxTextEncoder.encode = hang
encoding.encode([sys.argv[1]], sys.argv[2], "shapes", 24, "float32", shard_bytes=2**17)
"""


def test_a_killed_encode_goes_on_and_ends_where_an_uninterrupted_one_does(tmp_path):
    """Killed in its eighth batch of 16, with three shards of 32 written, the third perhaps not yet in the index."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, PROMPTS["held_out"], tmp_path / "killed"])
    deadline = time.monotonic() + 600
    while not (tmp_path / "killed" / "shard-00002.safetensors").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = len(CAPTIONS) - len(EmbeddingCache(tmp_path / "killed").missing(CAPTIONS))
    assert 64 <= kept <= 96
    files = [PROMPTS["held_out"]]
    assert encode(tmp_path / "killed", files, shard_bytes=2**17) == len(CAPTIONS) - kept
    assert encode(tmp_path / "whole", files, shard_bytes=2**17) == len(CAPTIONS)
    killed, whole = (EmbeddingCache(tmp_path / name) for name in ("killed", "whole"))
    assert len(killed) == len(whole) == len(CAPTIONS) and killed.fingerprint == whole.fingerprint
    torch.testing.assert_close(killed.encode(CAPTIONS), whole.encode(CAPTIONS), rtol=0, atol=0)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["egrpo", "encode", *map(str, arguments)])
    cli.main()


def test_the_command(tmp_path, monkeypatch, capsys):
    twice = tmp_path / "twice.jsonl"
    twice.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in [*read_prompts(REAL), CAPTIONS[0]] * 2))
    out = tmp_path / "e"
    run(monkeypatch, twice, "shapes", out, "--model", "shapes", "--column", "text", "--device", "cpu")
    told = capsys.readouterr().out
    count = len(read_prompts(REAL)) + 1
    assert f"warning: prompts: {twice} holds {count} of its prompts again (line {count + 1} repeats 1, " in told
    assert "prompts are longer than T5's 24 tokens, and are cut" in told and "CLIP" in told
    assert told.count("  T5 sees 24 of ") == told.count("  CLIP sees ") == SHOWN
    cache = EmbeddingCache(out)
    for file in PROMPTS.values():
        cache.require(read_prompts(file))
    cached(out)  # made with what the recipe asks for
    run(monkeypatch, twice, "shapes", out, "--model", "shapes", "--column", "text")
    assert ": 0 to encode, the others are there already or repeated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.txt", "OUT", "--model", "shapes"], "error: prompts: cannot read none.txt"),
        (["shapes", "OUT", "--model", "/nowhere/at/all"], "error: model.path: no folder /nowhere/at/all"),
        (["shapes", "OUT", "--model", "."], "error: model.path: . has no model_index.json"),
        (["shapes", str(REAL), "--model", "shapes"], "error: embeddings: cannot write into"),
        (["shapes", "OUT", "--model", "shapes", "--device", "nonsense"], "error: --device: 'nonsense'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert str(ended.value).startswith(told) and "\n" not in str(ended.value)
    assert not (tmp_path / "OUT").exists()


def test_prompts_that_do_not_fit_name_the_batch(tmp_path, monkeypatch):
    def full(self, prompts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FluxTextEncoder, "encode", full)
    with pytest.raises(ValueError, match="--batch: 8 prompts do not fit on cpu; try 4"):
        encode(tmp_path / "e", batch=8)
