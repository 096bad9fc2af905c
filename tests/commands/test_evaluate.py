"""`egrpo evaluate` on the embedded pipeline against a perturbed copy of it, and its statistics against known values."""

import json
import multiprocessing
import re
import shutil
import socket
import sys
from html.parser import HTMLParser

import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats

from egrpo_fast import cli
from egrpo_fast.commands import evaluate
from egrpo_fast.commands.page import Shown, Table, write_page
from egrpo_fast.config import CHECKPOINTS, RewardConfig, load_config
from egrpo_fast.distributed.checkpoint import Checkpoints, Piece
from egrpo_fast.models.fingerprint import identity
from egrpo_fast.models.transformer import meta_transformer
from egrpo_fast.prompts.files import read_prompts
from egrpo_fast.runs.export import export
from egrpo_fast.shapes import CLIP, PIPELINE, PROMPTS

NUM_PROMPTS = 5
LABELS = ["shapes", "trained"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def perturb(file, seed):
    generator = torch.Generator().manual_seed(seed)
    save_file(
        {
            name: value + 0.1 * value.float().std(unbiased=False) * torch.randn(value.shape, generator=generator)
            for name, value in load_file(file).items()
        },
        file,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder whose pipeline is the embedded one, perturbed."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    shutil.copytree(PIPELINE, run / "pipeline")
    perturb(run / "pipeline" / WEIGHTS, 0)
    (run / "config.yaml").write_text("rewards: [{name: shapes_soft}, {name: clip, options: {model: shapes}}]\n")
    return run


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["egrpo", "evaluate", *map(str, arguments)])
    cli.main()


def command(trained, out, *more):
    count = "--num-prompts", NUM_PROMPTS, "--num-inference-steps", 4
    return "shapes", trained, "--prompts", "shapes", *count, "--out", out, *more


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluations") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, *command(trained, out))
    return out


def rows(out):
    return pyarrow.parquet.read_table(out / "scores.parquet").to_pylist()


def test_what_an_evaluation_leaves(evaluated):
    found = rows(evaluated)
    prompts = read_prompts(PROMPTS["held_out"])[:NUM_PROMPTS]
    assert [(row["model"], row["prompt_number"], row["prompt"]) for row in found] == [
        (label, number, prompt) for label in LABELS for number, prompt in enumerate(prompts)
    ]
    for row in found:
        assert 0 <= row["shapes_soft"] <= 1 and -1 <= row["clip"] <= 1 and row["shapes_strict"] in (0, 1)
        assert (evaluated / row["image"]).is_file()
    table = (evaluated / "table.md").read_text()
    for label in LABELS:
        mean = sum(row["clip"] for row in found if row["model"] == label) / NUM_PROMPTS
        assert re.search(rf"\| {label} +\|.* {mean:.4f} \[", table)
    assert any(a["clip"] != b["clip"] for a, b in zip(found[:NUM_PROMPTS], found[NUM_PROMPTS:]))


def test_scores_know_nothing_of_batches_and_parts(evaluated, trained, tmp_path, monkeypatch):
    """Two processes' parts, two images at a time: the same images to an 8-bit step, so the same scores."""
    for part in ("1/2", "0/2"):
        run(monkeypatch, *command(trained, tmp_path / "out", "--batch", 2, "--part", part))
    run(monkeypatch, *command(trained, tmp_path / "out", "--batch", 3))
    for ours, theirs in zip(rows(evaluated), rows(tmp_path / "out"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_the_base_draws_what_the_trainer_shows(evaluated):
    """Prompt n's noise is the trainer's held-out noise: an independent rollout of prompt 3 alone gives its image."""
    from egrpo_fast import noise, ops
    from egrpo_fast.config import ModelConfig
    from egrpo_fast.plan import ode_plan
    from egrpo_fast.policy import Policy
    from egrpo_fast.rollout import NoiseKey, Wavefront
    from egrpo_fast.schedule import make_schedule

    backbone = (
        Policy(ModelConfig(path=str(PIPELINE), height=32, width=32, max_sequence_length=24, dtype="float32"), PIPELINE)
        .load(torch.device("cpu"))
        .backbone
    )
    text = backbone.encode(read_prompts(PROMPTS["held_out"])[3:4])
    wavefront = Wavefront(ode_plan(make_schedule(4, 3.0)), 1, backbone.latent_shape, ops.choose("auto", "cpu"))
    latents = wavefront.run(
        lambda x, t, of: backbone.velocity(backbone.transformer, x, t, text, of),
        NoiseKey(0, 0, torch.tensor([3])), noise.EVALUATION,
    ).final_latents[:, 0]  # fmt: skip
    kept = evaluate._read_images([evaluated / "models/shapes/images/00003.png"], 32, 32)
    assert (backbone.decode(latents) - kept).abs().max() <= 1 / 255


def test_an_interrupted_evaluation_continues(evaluated, trained, tmp_path, monkeypatch):
    """Images missing, a score file cut in mid-line, a reward not begun: only that is done again, to the same end."""
    out = tmp_path / "out"
    shutil.copytree(evaluated, out)
    for name in ("scores.parquet", "table.md", "page.html", "models/trained/images/00002.png"):
        (out / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("models/*/images/*.png")}
    (out / "models/trained/scores/clip.jsonl").unlink()
    cut = out / "models/shapes/scores/shapes_soft.jsonl"
    cut.write_text(cut.read_text()[:-9])
    run(monkeypatch, *command(trained, out))
    for ours, theirs in zip(rows(out), rows(evaluated), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert (out / "table.md").exists() and (out / "page.html").exists()
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


def test_nothing_is_loaded_when_all_is_there(evaluated, trained, monkeypatch):
    monkeypatch.delattr(evaluate.Policy, "load")
    monkeypatch.delattr(evaluate, "make_reward")
    run(monkeypatch, *command(trained, evaluated))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--num-inference-steps", "5"], "num_inference_steps: 5 differs from 4 in .*settings.json"),
        (["--seed", "1"], "seed: 1 differs from 0"),
        (["--num-prompts", "4"], "prompts: 4, SHA-256 .* differs from 5, SHA-256"),
        (["--rewards", "clip={model: shapes, micro_batch: 2}"], "clip: .* differs from .* in .*rewards.json"),
        (["--rewards", "beauty"], "no reward 'beauty'"),
        (["--rewards", "clip={model: shapes"], "neither NAME nor NAME={option: value}"),
        (["--rewards", "clip"], "rewards.clip: missing a required argument: 'model'"),
        (["--rewards", "shapes_soft", "shapes_soft"], "rewards: at least one, each once"),
        (["--height", "30"], "model.height: 30 is not a multiple of 4"),
        (["--height", "64"], "shapes_soft: judges images of 32x32"),
        (["--prompts", "/nowhere.txt"], "--prompts: cannot read /nowhere.txt"),
        (["--prompts", "datasets:org/name"], "--prompts: datasets:org/name is not datasets:ORG/NAME:SPLIT"),
    ],
)
def test_another_evaluation_or_bad_input_is_refused_by_name(evaluated, trained, more, told, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in evaluated.rglob("*.png")}
    with pytest.raises(SystemExit, match=told):
        run(monkeypatch, *command(trained, evaluated, *more))
    assert before == {path: path.stat().st_mtime_ns for path in evaluated.rglob("*.png")}


def test_scores_of_other_weights_are_not_mixed(tmp_path):
    """A reward's weights that changed between two halves of an evaluation."""
    clip = shutil.copytree(CLIP, tmp_path / "clip")
    rewards = [RewardConfig(name="clip", options={"model": f"local-dir:{clip}"})]
    settings = evaluate.Settings(("a red circle", "a blue square"), height=32, width=32)
    folder, model = evaluate.Folder(tmp_path / "out"), evaluate.Model("shapes", str(PIPELINE))
    for place in range(2):
        folder.image(model, place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "red").save(folder.image(model, place))

    def judge():
        return evaluate.judge(folder, [model], settings, rewards, 1, torch.device("cpu"))

    before = judge()
    folder.scores_file(model, "clip").unlink()
    assert torch.equal(judge(), before), "the same weights"
    other = folder.scores_file(evaluate.Model("other", ""), "clip")
    other.parent.mkdir(parents=True)
    folder.scores_file(model, "clip").rename(other)
    weights = load_file(clip / "open_clip_model.safetensors")
    weights["text_projection"] *= 2
    save_file(weights, clip / "open_clip_model.safetensors")
    told = r"rewards.clip: .* differs from .*reward_fingerprints.json; choose another --out, or delete .*/models/\*/s"
    with pytest.raises(ValueError, match=told):
        judge()
    other.unlink()
    recorded = (folder.path / "reward_fingerprints.json").read_text()
    judge()
    assert (folder.path / "reward_fingerprints.json").read_text() != recorded, "no score of the other weights is left"


def test_a_reward_mended_between_two_parts_loses_no_image(trained, tmp_path, monkeypatch, capsys):
    """Its source is told; other weights are refused before anything more is drawn."""
    out, source = tmp_path / "out", tmp_path / "mended_reward.py"
    source.write_text("def it(images, prompts):\n    return images.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = command(trained, out, "--rewards", "mended_reward:it", "clip={model: shapes}")
    run(monkeypatch, *arguments)
    gone = sorted(out.rglob("*.png"))[0]
    gone.unlink()
    source.write_text(source.read_text() + "# mended\n")
    run(monkeypatch, *arguments)
    told = r"warning: the source of rewards.mended_reward:it has changed .* delete .*/mended_reward:it.jsonl\n"
    assert len(re.findall(told, capsys.readouterr().err)) == 1
    assert gone.exists()
    gone.unlink()
    fingerprints = out / "reward_fingerprints.json"
    fingerprints.write_text(json.dumps({**json.loads(fingerprints.read_text()), "rewards.clip": "another"}))
    with pytest.raises(SystemExit, match=r"rewards.clip: .* or delete .*/models/\*/scores/clip.jsonl to score"):
        run(monkeypatch, *arguments)
    assert not gone.exists(), "refused before it is drawn"
    sys.modules.pop("mended_reward", None)


def test_a_folder_with_settings_nested_too_deeply_is_told(strangers):
    folder = strangers("[" * 100_000)
    with pytest.raises(ValueError, match="models: .*config.yaml cannot be read: .*nested too deeply"):
        evaluate.find_model(str(folder))


def test_a_reward_that_cannot_be_loaded_is_told_before_anything_is_drawn(trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="rewards.clip: "):
        run(monkeypatch, *command(trained, out, "--rewards", "shapes_soft", "clip={model: 'local-dir:/nowhere'}"))
    assert not list(out.rglob("*.png"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--num-inference-steps", "1"], "--num-inference-steps: '1' is no number from 2 to 1000"),
        (["--shift", "nan"], "--shift: 'nan' is no number"),
        (["--seed", "-1"], "--seed: '-1' is no number from 0"),
        (["--part", "2/2"], "--part: '2/2' is not I/N"),
        (["--part", "x"], "--part: 'x' is not I/N"),
    ],
)
def test_numbers_out_of_range_are_told_by_the_parser(trained, tmp_path, more, told, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *command(trained, tmp_path / "out"), *more)
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_models_that_cannot_be_compared(trained, tmp_path):
    with pytest.raises(ValueError, match="two are called trained; give LABEL=PATH"):
        evaluate.find_models([str(trained), str(trained / "pipeline")])
    assert [m.label for m in evaluate.find_models([f"a={trained}", f"b={trained}"])] == ["a", "b"]
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("rewards: []\n")
    with pytest.raises(ValueError, match="has no pipeline/ yet"):
        evaluate.find_models([str(unfinished)])
    with pytest.raises(ValueError, match="some are of the Shapes world"):
        evaluate.find_models(["shapes", "black-forest-labs/FLUX.1-dev"])


STRANGE = "from pathlib import Path\nPath(__file__).with_name('it_ran').touch()\ndef it(images, prompts): 1 / 0\n"


@pytest.fixture
def strangers(trained, tmp_path, monkeypatch):
    """A run's folder from somebody else, and a way to say which rewards its file names."""
    (tmp_path / "strangers_code.py").write_text(STRANGE)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "strangers"
    shutil.copytree(trained, folder)

    def named(rewards):
        (folder / "config.yaml").write_text(f"rewards: {rewards}\n")
        return folder

    yield named
    sys.modules.pop("strangers_code", None)


def alone(folder, out, *more):
    return command(folder, out, *more)[1:]  # the embedded pipeline would bring rewards of its own


@pytest.mark.parametrize("part", [(), ("--part", "0/2")])
def test_a_strangers_folder_runs_no_code_and_sends_nothing(strangers, tmp_path, monkeypatch, part):
    """It is data, until the user says --trust-run or names the rewards."""
    monkeypatch.setenv("EGRPO_REWARD_TOKEN", "a-secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        http = f"{{name: http/x, options: {{reward: x, url: '{url}', retries: 0, timeout: 0.1}}}}"
        for rewards, wary in (
            (f"[{{name: shapes_soft}}, {http}]", "http/x"),
            ("[{name: 'strangers_code:it'}, {name: clip, options: {model: shapes}}]", "strangers_code:it"),
        ):
            told = (
                f"error: rewards: .*strangers/config.yaml asks for {wary}. .*--trust-run; or name the rewards yourself"
            )
            with pytest.raises(SystemExit, match=told):
                run(monkeypatch, *alone(strangers(rewards), tmp_path / "out", *part))
        assert not (tmp_path / "it_ran").exists() and not (tmp_path / "out").exists()
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_with_the_users_word_a_runs_own_rewards_are_used(strangers, tmp_path, monkeypatch):
    """And a mistake in one is told, with its line, before anything is drawn."""
    folder = strangers("[{name: 'strangers_code:it'}]")
    run(monkeypatch, *alone(folder, tmp_path / "named", "--rewards", "shapes_soft"))
    assert not (tmp_path / "it_ran").exists()
    for more in (["--trust-run"], ["--rewards", "strangers_code:it"]):
        told = r"(?s)Traceback.*strangers_code.py.*error: .* ZeroDivisionError: .* \(strangers_code.py, line 3\)"
        with pytest.raises(SystemExit, match=told):
            run(monkeypatch, *alone(folder, tmp_path / "trusted", *more))
    assert (tmp_path / "it_ran").exists() and not list((tmp_path / "trusted").rglob("*.png"))


def test_a_name_that_a_terminal_would_obey_is_none(strangers, tmp_path):
    folder = strangers('[{name: "jpeg/\\e[2J"}]')
    with pytest.raises(ValueError, match="config.yaml cannot be read: .* a name of printable characters"):
        evaluate.find_model(str(folder))
    strangers("[{name: jpeg}]")
    moved = folder.rename(tmp_path / "a\x1b[2J")
    with pytest.raises(ValueError, match="is no name for a folder; give LABEL=PATH"):
        evaluate.find_model(str(moved / "pipeline"))


def test_weights_that_changed_since_are_refused(evaluated, trained, tmp_path, monkeypatch):
    copy = tmp_path / "out"
    shutil.copytree(evaluated, copy)
    moved = tmp_path / "trained"
    shutil.copytree(trained, moved)
    run(monkeypatch, *command(moved, copy))
    told = json.loads((copy / "models/trained/model.json").read_text())
    assert told == {**evaluate.find_model(str(trained)).identity, "path": str(moved / "pipeline")}
    perturb(moved / "pipeline" / "vae/diffusion_pytorch_model.safetensors", 1)
    with pytest.raises(SystemExit, match="vae: .* differs from .*models/trained/model.json; choose another --out"):
        run(monkeypatch, *command(moved, copy))


def test_a_base_that_a_run_did_not_begin_with_is_told(trained, tmp_path):
    found = evaluate.find_models(["shapes", str(trained)])
    assert not list(evaluate.comparability_warnings(found)), "a run that has no record"
    shutil.copytree(trained, tmp_path / "trained")

    def comparability_warnings(**changed):
        record = json.dumps({"base": {**found[0].identity, **changed}})
        (tmp_path / "trained" / "run.json").write_text(record)
        given = ["shapes", str(tmp_path / "trained")]
        backwards = evaluate.comparability_warnings(evaluate.find_models(given[::-1]))
        return list(evaluate.comparability_warnings(evaluate.find_models(given))), list(backwards)

    assert comparability_warnings() == ([], [])
    other, nothing = comparability_warnings(transformer="another")
    assert other == ["trained: began with another transformer than shapes's; its gain is not training's alone"]
    assert nothing == [], "compared with a run, there is no base"
    for told in comparability_warnings(vae="another"):
        assert told == ["trained: another vae than it was trained with; export it again"]


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """A run of adapters over a copy of the embedded pipeline, exported as a run does when it ends; and fused."""
    folder = tmp_path_factory.mktemp("lora")
    base, run = folder / "base", folder / "adapters"
    shutil.copytree(PIPELINE, base)
    lora = "model.lora={rank: 4, alpha: 5, target_modules: [to_q, to_out.0]}"
    config = load_config("shapes", [f"model.path={base}", f"output_dir={run}", lora])
    run.mkdir()
    (run / "config.yaml").write_text(config.yaml())
    (run / "run.json").write_text(json.dumps({"base": identity(base)}))
    transformer, weights = meta_transformer(base, config.model.lora)
    generator = torch.Generator().manual_seed(0)
    pieces = [
        Piece(
            name, "weight", 0, tuple(value.shape), weights(name) + 0.05 * torch.randn(value.shape, generator=generator)
        )
        for name, value in transformer.named_parameters()
        if value.requires_grad
    ]
    Checkpoints(run / CHECKPOINTS, asynchronous=False).save(1, pieces, {}, {}, "a")
    export(run, run / "pipeline")
    export(run, folder / "fused", fuse=True)
    return run


def test_a_lora_run_draws_as_its_fused_pipeline_and_not_as_its_base(lora_run, tmp_path, monkeypatch):
    base, fused = lora_run.parent / "base", lora_run.parent / "fused"
    out = tmp_path / "out"
    run(monkeypatch, base, lora_run, fused, "--prompts", "shapes", "--num-prompts", 2,
        "--num-inference-steps", 3, "--out", out,
        "--rewards", "shapes_soft")  # fmt: skip
    drawn = {
        label: evaluate._read_images(sorted((out / "models" / label / "images").iterdir()), 32, 32)
        for label in ("base", "adapters", "fused")
    }
    assert torch.equal(drawn["adapters"], drawn["fused"])
    assert (drawn["adapters"] - drawn["base"]).abs().max() > 20 / 255
    told = json.loads((out / "models/adapters/model.json").read_text())
    assert told["path"] == str(base) and told["lora"] == str(lora_run / "pipeline")


def test_adapters_on_another_base_or_without_one_are_refused(lora_run, tmp_path, monkeypatch):
    (model,) = evaluate.find_models([str(lora_run / "pipeline")])
    assert (model.label, model.lora) == ("adapters", str(lora_run / "pipeline"))
    copy = tmp_path / "copy"
    shutil.copytree(lora_run, copy)
    perturb(copy / "pipeline" / evaluate.ADAPTERS, 1)
    assert evaluate.find_model(str(copy)).identity["transformer"] != model.identity["transformer"]
    began = json.loads((copy / "run.json").read_text())["base"]
    (copy / "run.json").write_text(json.dumps({"base": {**began, "transformer": "another"}}))
    with pytest.raises(SystemExit, match="copy: model.path: .* is not the model this run began with: another transf"):
        run(monkeypatch, *command(copy, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    shutil.copytree(lora_run / "pipeline", tmp_path / "alone")
    with pytest.raises(
        ValueError, match=r"alone holds adapters without their base; name the run.*export RUN OUT --fuse"
    ):
        evaluate.find_model(str(tmp_path / "alone"))
    (copy / "run.json").unlink()
    save_file({"transformer.x.lora_A.weight": torch.zeros(4, 8)}, copy / "pipeline" / evaluate.ADAPTERS)
    with pytest.raises(SystemExit, match="copy: models: .*cannot be read as a LoRA of this transformer"):
        run(monkeypatch, *command(copy, tmp_path / "out"))


def test_defaults_are_the_papers_for_flux_and_the_recipes_for_shapes(trained):
    flux, shapes = (evaluate.find_model(name) for name in ("black-forest-labs/FLUX.1-dev", str(trained)))
    protocol = evaluate.Settings(("a",), **evaluate.default_settings(flux))
    assert (protocol.height, protocol.width, protocol.num_inference_steps) == (1024, 1024, 50)
    assert (protocol.guidance_scale, protocol.shift, protocol.max_sequence_length) == (3.5, 3.0, 512)
    small = evaluate.Settings(("a",), **evaluate.default_settings(shapes))
    assert (small.height, small.num_inference_steps, small.max_sequence_length, small.dtype) == (32, 16, 24, "float32")
    assert [reward.name for reward in evaluate.default_rewards([flux])] == [
        "hps", "clip", "pick_score", "image_reward"
    ]  # fmt: skip
    own = evaluate.Model("x", "x", (RewardConfig(name="clip", options={"model": "ours"}), RewardConfig(name="jpeg")))
    named = {reward.name: reward.options for reward in evaluate.default_rewards([flux, own])}
    assert set(named) == {"clip", "jpeg", "hps", "pick_score", "image_reward"} and named["clip"] == {"model": "ours"}


def test_the_bootstrap_is_the_percentile_interval():
    """Means of resampled zeros and ones are binomial: their percentiles are known. A constant has no width."""
    for ones, count in ((50, 100), (9, 30)):
        values = torch.tensor([1.0] * ones + [0.0] * (count - ones), dtype=torch.float64)
        known = stats.binom.ppf([0.025, 0.975], count, ones / count) / count
        assert evaluate.bootstrap(values).tolist() == pytest.approx(known, abs=1 / count + 1e-9)
    both = evaluate.bootstrap(torch.tensor([[3.0, 3.0], [0.0, 1.0]], dtype=torch.float64))
    assert both.tolist() == [[3.0, 3.0], [0.0, 1.0]]


def test_one_prompt_has_an_interval_of_no_width():
    assert evaluate.bootstrap(torch.tensor([[2.0], [3.0]])).tolist() == [[2.0, 2.0], [3.0, 3.0]]


def open_folder(out, barrier, told):
    barrier.wait()
    for _ in range(5):
        try:
            model = evaluate.Model("shapes", str(PIPELINE))
            evaluate.Folder(out).open(evaluate.Settings(("a",)), [model], [RewardConfig(name="jpeg")])
        except Exception as error:
            told.put(repr(error))


def test_parts_of_one_evaluation_may_begin_together(tmp_path):
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    for trial in range(3):
        barrier = context.Barrier(4)
        parts = [context.Process(target=open_folder, args=(tmp_path / f"{trial}", barrier, told)) for _ in range(4)]
        for part in parts:
            part.start()
        for part in parts:
            part.join()
        assert told.empty(), told.get()
        assert not list((tmp_path / f"{trial}").rglob("*.tmp"))


def test_the_bootstrap_covers():
    """95% intervals of 400 samples of 60 normals hold the true mean about 95 times in 100; 50% ones do not."""
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(400, 60, generator=generator, dtype=torch.float64)

    def covered(level):
        low, high = evaluate.bootstrap(samples, level, resamples=1000).unbind(-1)
        return ((low < 0) & (high > 0)).double().mean().item()

    assert 0.91 < covered(0.95) < 0.98 and covered(0.5) < 0.6


def test_win_rates_and_gains_by_hand():
    base, ours = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 2.0, 1.0, 5.0])
    assert evaluate.wins(ours, base).tolist() == [1.0, 0.5, 0.0, 1.0]
    mean, gain, rate = evaluate.tables(torch.stack((base, ours)).unsqueeze(1).double(), ["a", "b"], ["r"])
    assert [row[1].split()[0] for row in mean.rows] == ["2.5000", "2.5000"]
    assert gain.rows[0][1].startswith("+0.0000 [") and rate.rows[0][1].startswith("62.5 [")


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_nothing_and_escapes_everything(evaluated, tmp_path):
    png = (evaluated / "models/shapes/images/00000.png").read_bytes()
    evil = '<script>alert("1")</script> & <img src=x onerror=alert(1)>'
    table = Table(evil, ["model", evil], [[evil, "1.0 [0.0, 2.0]"]])
    write_page(tmp_path / "page.html", evil, evil, [table], [(evil, [Shown(evil, png, {evil: 1.0})])])
    for file in (tmp_path / "page.html", evaluated / "page.html"):
        page = Tags()
        page.feed(file.read_text())
        used = {tag for tag, _ in page.tags}
        assert not used & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
        for tag, attributes in page.tags:
            assert not any(name.startswith("on") or name in ("srcset", "href") for name in attributes)
            if tag == "img":
                assert attributes["src"].startswith("data:image/png;base64,")
        assert not re.search(r"https?://|url\(|@import", file.read_text().replace(evil, ""))
    shown = Tags()
    shown.feed((tmp_path / "page.html").read_text())
    assert sum(evil in text for text in shown.text) >= 5
    ours = Tags()
    ours.feed((evaluated / "page.html").read_text())
    assert sum(tag == "img" for tag, _ in ours.tags) == 2 * NUM_PROMPTS


def test_markdown_cells_cannot_break_their_table():
    lines = Table("t", ["model", "r"], [["a|b\nc", "1"]]).markdown().splitlines()
    assert lines[-1].startswith("| a\\|b c |") and len({line.count("|") - line.count("\\|") for line in lines[2:]}) == 1


def test_a_hub_id_is_downloaded_when_all_else_is_known_to_be_right(monkeypatch, tmp_path):
    asked = []

    def download(path, **patterns):
        asked.append(path)
        raise OSError("no network")

    monkeypatch.setattr("egrpo_fast.models.folder.snapshot_download", download)
    models = evaluate.find_models(["some/model"])
    settings = evaluate.Settings(("a red circle",), 32, 32)
    for reward, told in (("beauty", "no reward 'beauty'"), ("jpeg", "model.path: some/model is no folder here")):
        assert not asked
        with pytest.raises(ValueError, match=told):
            evaluate.evaluate(models, settings, [RewardConfig(name=reward)], tmp_path / "out")
    assert asked == ["some/model"]
