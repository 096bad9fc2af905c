"""The whole trainer through its own command: ranks, resuming, refusals. Tiny settings, the embedded pipeline."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from egrpo_fast.config import CONFIG_FILE, RUN_FILE, ConfigError, load_config
from egrpo_fast.distributed.checkpoint import Checkpoints
from egrpo_fast.models.flux.text import FluxTextEncoder
from egrpo_fast.models.text import tell_truncated
from egrpo_fast.runs.folder import check_output, claim_output, identify, keep_inputs, record
from egrpo_fast.shapes import PIPELINE
from egrpo_fast.train import check_inputs, open_rewards

ROOT = Path(__file__).parents[1]
TINY = [
    "iterations=4", "schedule.num_steps=4", "rollout.group_size=3", "prompts.per_iteration=2",
    "evaluation.num_prompts=5", "evaluation.batch_size=2", "evaluation.num_inference_steps=4",
    "optimizer.warmup_steps=1",
    "checkpoint.every=2", "tail.stride=2", "tail.solver=ab2", "tail.check_every=3", "tail.target=0.01",
]  # fmt: skip


def command(output, *overrides, ranks=1):
    """`egrpo train shapes ...`, one thread per rank."""
    egrpo = [sys.executable, "-m", "egrpo_fast.cli", "train", "shapes"]
    arguments = [*egrpo, *TINY, "--num_gpus", str(ranks), f"output_dir={output}", *overrides]
    return {"args": arguments, "cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def launch(output, *overrides, **options):
    result = subprocess.run(**command(output, *overrides, **options), capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    Path(f"{output}.terminal").write_text(result.stdout + result.stderr)
    return Path(output)


def weights(folder):
    return load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if not k.startswith(("seconds/", "speed/"))} for line in lines]
    return [line for line in timeless if "loss" in line], [line for line in timeless if "held_out/clip" in line]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("runs") / "uninterrupted")


def test_a_run_leaves_everything_it_promises(uninterrupted):
    iterations, evaluations = metrics(uninterrupted)
    assert [line["iteration"] for line in iterations] == [1, 2, 3, 4]
    assert [line["iteration"] for line in evaluations] == [0, 4]
    assert all(line["spread_by_step"]["shapes_soft"].keys() == {"0", "1"} for line in iterations)
    assert [line.get("tail/exact") for line in iterations] == [0, None, None, 0], "tail.check_every"
    for name in ("curve.png", "before_after.png", "config.yaml", "summary.json", "images/iteration-000000.png"):
        assert (uninterrupted / name).stat().st_size > 0
    assert len(list((uninterrupted / "checkpoints").glob("iteration-*"))) == 2, "checkpoint.save_total_limit"
    assert list((uninterrupted / "tensorboard").iterdir())
    (uninterrupted.parent / "new").touch()
    modes = {path.stat().st_mode for path in uninterrupted.rglob("*") if path.is_file()}
    assert modes == {(uninterrupted.parent / "new").stat().st_mode}, "the umask says who may read a run"
    told = json.loads((uninterrupted / "summary.json").read_text())
    assert told["held_out"]["clip"]["after"] == evaluations[-1]["held_out/clip"]
    base = load_file(PIPELINE / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = weights(uninterrupted)
    assert trained.keys() == base.keys() and any(not torch.equal(trained[k], base[k].float()) for k in base)


OURS = "rank 0: loaded|egrpo_fast |per iteration: |writes to |loading:|training [0-4]/4 |exporting:|held-out |warning: "
"""How the lines of a run begin; the table at its end has one for each reward."""
GLOO = r"\[Gloo\] Rank \d+ is connected"
"""What torch 2.10 prints from C++, past Python's streams; later ones do not."""


def test_a_terminal_shows_nothing_foreign(uninterrupted):
    shown = re.split("[\r\n]+", Path(f"{uninterrupted}.terminal").read_text())
    lines = [line for line in map(str.strip, shown) if line]
    known = f"{OURS}|{GLOO}|shapes_|clip |{uninterrupted}"
    assert lines and [line for line in lines if not re.match(known, line)] == []
    assert sum(line.startswith("held-out prompts after") for line in lines) == 2
    assert all(re.search(r"\d:\d\d<.*shapes_soft=", line) for line in lines if line.startswith("training 4/4"))


def test_the_ratio_is_one_before_the_first_update(tmp_path):
    """With an optimizer step per active step the reference is a forward of its own: bit-equal to the update's, under
    ZeRO-3 and with rollouts at another batch size. Later steps of the iteration see a policy that has moved."""
    run = launch(
        tmp_path / "steps", "objective.optimizer_step=active_step", "rollout.max_rows_per_call=5", "iterations=2",
        "rollout.group_size=6", "tail.stride=1", "tail.cache.name=taylor_seer", "tail.cache.interval=8",
        "tail.check_every=1", "tail.target=0.999",
    )  # fmt: skip
    approximated, exact = metrics(run)[0]
    assert approximated["tail/exact"] == 1 and approximated["tail/rank_correlation"] < 0.999, "given up at once"
    assert not any(name.startswith("tail/") for name in exact), "nothing is left to check"
    for line in (approximated, exact):
        assert line["log_ratio_before_update"] == 0.0 < line["max_log_ratio"]
        assert line["policy_mismatch"] < 1e-5


@pytest.mark.parametrize("rollout_weights", ["gathered", pytest.param("sharded", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(rollout_weights, uninterrupted, tmp_path):
    """The same prompts, dealt to two ranks: the same rewards, and the same weights to float32 tolerance. However the
    rollout finds its weights."""
    both = launch(tmp_path / "two", f"rollout.parameters={rollout_weights}", "deepspeed.overrides="
                  "{zero_optimization: {stage3_param_persistence_threshold: 0}}", ranks=2)  # fmt: skip
    for ours, theirs in zip(metrics(uninterrupted)[0], metrics(both)[0], strict=True):
        assert ours["reward/shapes_soft"] == pytest.approx(theirs["reward/shapes_soft"], rel=1e-5)
    for ours, theirs in zip(metrics(uninterrupted)[1], metrics(both)[1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    one, two = weights(uninterrupted), weights(both)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-6), name


def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path):
    """SIGKILL to the whole run once a checkpoint is there, wherever it then is; then `resume=true`."""
    run = tmp_path / "run"
    with subprocess.Popen(
        **command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 300
        while not Checkpoints(run / "checkpoints").newest():
            assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
    resumed = launch(run, "resume=true")
    assert metrics(resumed)[0] == metrics(uninterrupted)[0]
    assert metrics(resumed)[1] == metrics(uninterrupted)[1]
    one, two = weights(uninterrupted), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)


BAD = {
    "prompts.train=/nowhere.txt": "prompts.train: cannot read /nowhere.txt",
    "model.path=/nowhere": "model.path: no folder /nowhere",
    "model.height=30": "model.height: 30 is not a multiple of 4",
    "prompts.per_iteration=3 rollout.prompts_per_rollout=2": "prompts.per_iteration: 3 is not a multiple of 2",
    "model.height=36": "rewards.shapes_soft: judges images of 32x32 pixels, not 36x32",
    "rewards=[{name: beauty}]": "rewards: no reward 'beauty'; there are: clip",
    "rewards=[{name: shapes_soft, options: {sharp: 1}}]": "rewards.shapes_soft: .*unexpected keyword argument 'sharp'",
    "rewards=[{name: clip}]": "rewards.clip: missing a required argument: 'model'",
}


@pytest.mark.parametrize("overrides", BAD)
def test_bad_input_is_refused_before_anything_is_written(overrides, tmp_path):
    with pytest.raises(ValueError, match=BAD[overrides]):
        check_inputs(load_config("shapes", [f"output_dir={tmp_path / 'run'}", *re.split(r" (?=\w+\.)", overrides)]))
    assert not (tmp_path / "run").exists()


def test_prompts_that_a_reward_cannot_judge_are_refused(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match="rewards.shapes_soft: .*a cat"):
        check_inputs(load_config("shapes", [f"output_dir={tmp_path / 'run'}", f"prompts.train={tmp_path / 'p.txt'}"]))


def test_an_output_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output_dir: .*file is not a folder that can be written"):
        check_inputs(load_config("shapes", [f"output_dir={tmp_path / 'file' / 'run'}"]))


def test_another_run_is_never_overwritten(uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    with pytest.raises(ValueError, match="output_dir: .* is not empty"):
        check_inputs(load_config("shapes", [*TINY, f"output_dir={uninterrupted}"]))
    with pytest.raises(ValueError, match="schedule.eta: differs from the run"):
        check_inputs(load_config("shapes", [*TINY, f"output_dir={uninterrupted}", "resume=true", "schedule.eta=0.5"]))
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}


ALONE = SimpleNamespace(is_main=True, size=1, broadcast=lambda value: value, gather=lambda value: [value])


def output(folder, *overrides):
    return load_config("shapes", [f"output_dir={folder}", *overrides])


def test_a_folder_that_a_run_is_writing_to_is_refused_to_another(tmp_path):
    config = output(tmp_path / "run")
    _, _, held = claim_output(config, ALONE)
    with held, pytest.raises(ValueError, match=f"output_dir: another run is writing to .*: process {os.getpid()} on "):
        claim_output(config, ALONE)
    claim_output(config, ALONE)[2].close()


def test_a_folder_that_some_rank_does_not_see_is_refused(tmp_path):
    apart = SimpleNamespace(is_main=True, broadcast=lambda value: value, gather=lambda seen: [seen, False])
    with pytest.raises(ValueError, match="output_dir: rank 1 does not see"):
        claim_output(output(tmp_path / "run"), apart)
    claim_output(output(tmp_path / "run"), ALONE)[2].close()


def test_a_lock_file_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / "run.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match="output_dir: .* cannot be written .run.lock is a link; delete it"):
        claim_output(output(tmp_path / "run"), ALONE)
    assert (tmp_path / "mine").read_text() == "mine"


KILLED = {
    "at once": [],
    "while loading": ["run.lock"],
    "recording": ["run.lock", "run.json.tmp"],
    "between the two records": ["run.lock", "run.json", "config.yaml.tmp"],
}


@pytest.mark.parametrize("resume", ["false", "true"])
@pytest.mark.parametrize("when", KILLED)
def test_a_run_that_was_killed_before_it_began_begins(when, resume, tmp_path):
    """Plainly, and with resume=true, which a script gives until the command returns 0."""
    run = tmp_path / "run"
    for name in KILLED[when]:
        run.mkdir(exist_ok=True)
        (run / name).write_text("{")
    config = output(run, f"resume={resume}")
    assert not check_output(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config, claim, held = claim_output(config, ALONE)
    with held:
        assert not config.resume and bool(caught) == (resume == "true")
        record(config, {}, {}, 1, claim.run)
    assert check_output(output(run, "resume=true"))
    again, later, held = claim_output(output(run, "resume=true"), ALONE)
    with held:
        assert again.resume and later.run == claim.run and later.mark != claim.mark
    with pytest.raises(ConfigError, match="is not empty; resume=true continues the run in it"):
        check_output(output(run))


@pytest.mark.parametrize("resume", ["false", "true"])
def test_a_folder_with_something_else_in_it_is_refused(resume, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="output_dir: .* holds no run: thesis.tex is there .*; choose another folder"):
        check_output(output(tmp_path / "run", f"resume={resume}"))


@pytest.mark.parametrize("content", ["", "a: [", "iterations: 3", "\0"])
def test_settings_that_are_damaged_are_refused_with_the_way_out(content, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match="resume: .*config.yaml cannot be read .*; put the run's settings back, or"):
        check_output(output(tmp_path, "resume=true"))


def test_a_backend_that_cannot_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("egrpo_fast.kernels.triton.unavailable", lambda device: "it is ill")
    with pytest.raises(ValueError, match=r"^rollout.backend: 'triton' cannot run on .*: it is ill"):
        check_inputs(output(tmp_path / "run", "rollout.backend=triton"))


REFUSING = """
from egrpo_fast import train, trainer

def refuse(settings):
    raise ValueError("guards: refused at the last moment")

trainer.Guard = refuse
train.main()
"""


@pytest.mark.slow
def test_a_run_that_nobody_listens_to_comes_to_its_end(tmp_path):
    """As `2>&1 | head -1` does: the reader of all that it tells is gone after the first line."""
    arguments = [
        sys.executable,
        "egrpo_fast/train.py",
        "shapes",
        *TINY,
        "iterations=1",
        f"output_dir={tmp_path / 'run'}",
    ]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(600) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 1
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


@pytest.mark.slow
def test_a_run_that_is_refused_while_it_loads_leaves_none_behind(tmp_path):
    """The same folder then takes a run with other settings."""
    arguments = [*TINY, f"output_dir={tmp_path / 'run'}"]
    told = subprocess.run([sys.executable, "-c", REFUSING, "shapes", *arguments], capture_output=True, text=True)
    assert told.returncode == 1 and "error: guards: refused at the last moment" in told.stderr, told.stderr[-3000:]
    assert os.listdir(tmp_path / "run") == ["run.lock"]
    assert not check_output(output(tmp_path / "run", "guards.bad_steps=3"))


SILENT = SimpleNamespace(at=lambda *place, **limit: None)
TABLE = "def color(images, prompts):\n    return images.new_tensor([{'red': 1.0}[prompt] for prompt in prompts])\n"
COLOR = "rewards=[{name: 'mine_alone:color'}]"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text(TABLE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine_alone", None)


def test_a_reward_that_fails_is_told_by_rank_and_line(mine, capsys):
    """Every rank ends, with the first one's message; rank 0 prints the traceback of the user's own code."""
    config = load_config("shapes", ["output_dir=x", COLOR])
    others = SimpleNamespace(device="cpu", size=2, is_main=True)
    told = r"rewards.mine_alone:color: KeyError: 'green' \(mine_alone.py, line 2\)"
    for gather, rank in ((lambda value: [value, value], ""), (lambda value: [None, value], "rank 1: ")):
        others.gather = gather
        with pytest.raises(ConfigError, match=f"^{rank}{told}$"):
            open_rewards(config, others, SILENT, "green")
        printed = capsys.readouterr().err
        assert printed.startswith("Traceback") and 'mine_alone.py", line 2, in color' in printed
    others.gather = lambda value: [value, ("rewards.x: gone", "")]
    with pytest.raises(ConfigError, match="rank 1: rewards.x: gone"):
        open_rewards(config, others, SILENT, "red")


def test_where_images_are_dropped_a_reward_may_raise_for_one(mine):
    world = SimpleNamespace(**vars(ALONE), device="cpu")
    config = load_config("shapes", ["output_dir=x", COLOR, "objective.on_error=drop"])
    with pytest.warns(UserWarning, match="(?s)Traceback.*line 2.*KeyError: 'green' .*called on an image of noise"):
        assert open_rewards(config, world, SILENT, "green").keys() == {"mine_alone:color"}


@pytest.mark.slow
def test_a_mistake_in_a_reward_is_told_before_the_model_is_looked_for(mine, tmp_path):
    """There is no such model; yet the error is the reward's."""
    entry = [sys.executable, "egrpo_fast/train.py", "shapes", "model.path=nobody/nothing", COLOR,
             f"output_dir={tmp_path / 'run'}"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(entry, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert re.search(r'File ".*mine_alone.py", line 2, in color\n', result.stderr)
    last = result.stderr.splitlines()[-1]
    assert re.fullmatch(r"error: rewards.mine_alone:color: KeyError: '.*' \(mine_alone.py, line 2\)", last)


@pytest.fixture
def begun(tmp_path):
    """A run that has begun with a pipeline in a folder of its own, and that folder."""
    base = tmp_path / "base"
    shutil.copytree(PIPELINE, base)
    config = load_config("shapes", [f"output_dir={tmp_path / 'run'}", f"model.path={base}"])
    record(config, identify(config, base, ALONE), {}, ALONE.size)
    return config.output_dir, base


def resumed(run, base):
    config = load_config("shapes", [f"output_dir={run}", f"model.path={base}", "resume=true"])
    check_output(config)
    assert identify(config, base, ALONE) == {}
    record(config, {}, {}, ALONE.size)
    return load_config(str(run / CONFIG_FILE))


def test_a_run_resumes_with_its_model_wherever_that_lies_now(begun):
    run, base = begun
    before = (run / CONFIG_FILE).read_text()
    assert resumed(run, base).model.path == str(base) and (run / CONFIG_FILE).read_text() == before
    moved = base.rename(base.with_name("moved"))
    assert resumed(run, moved).model.path == str(moved), "where an export of the run will look"
    assert (run / CONFIG_FILE).read_text() == before.replace(str(base), str(moved))


def test_a_run_resumes_with_what_it_took_from_a_lora_file(tmp_path):
    """A file's rank is not given again; one that is given must be the run's."""
    given = [f"output_dir={tmp_path}", "model.lora={path: anywhere}"]
    config = load_config("shapes", given)
    record(config.with_lora(config.model.lora.model_copy(update={"rank": 5, "alpha": 7.5})), {}, {}, ALONE.size)
    assert load_config(str(tmp_path / CONFIG_FILE)).model.lora.alpha == 7.5
    check_output(load_config("shapes", [*given, "resume=true"]))
    with pytest.raises(ConfigError, match="^model.lora.rank: differs from the run"):
        check_output(load_config("shapes", [*given, "resume=true", "model.lora.rank=6"]))


def test_a_run_does_not_resume_with_other_adapters_than_it_began_with(tmp_path):
    """Of a run that began when a file's alpha was not read, the record says another one than the file."""
    architecture = json.loads((PIPELINE / "transformer" / "config.json").read_text())
    width = architecture["num_attention_heads"] * architecture["attention_head_dim"]
    layer = "transformer.transformer_blocks.0.attn.to_q"
    factors = {f"{layer}.lora_A.weight": torch.ones(4, width), f"{layer}.lora_B.weight": torch.ones(width, 4)}
    save_file(factors, tmp_path / "lora.safetensors")
    given = [*TINY, f"output_dir={tmp_path / 'run'}", f"model.lora={{path: {tmp_path / 'lora.safetensors'}}}"]
    config = load_config("shapes", given)
    recorded = {"rank": 4, "alpha": 64.0, "target_modules": ["0.attn.to_k"]}
    record(config.with_lora(config.model.lora.model_copy(update=recorded)), {}, {}, ALONE.size)
    entry = [sys.executable, "egrpo_fast/train.py", "shapes", *given, "resume=true"]
    result = subprocess.run(entry, cwd=ROOT, capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1
    assert last.startswith(f"error: model.lora.alpha: 4 by {tmp_path}/lora.safetensors, 64 by")
    assert "model.lora.target_modules: " in last and f"egrpo export {tmp_path}/run OUT" in last
    assert "model.lora.rank" not in last


def test_an_input_that_cannot_be_read_is_told_on_all_ranks():
    """The other ranks wait for what rank 0 tells them."""
    told = []
    world = SimpleNamespace(is_main=True, broadcast=lambda value: told.append(value) or value)

    def find():
        raise PermissionError(13, "Permission denied", "a file")

    with pytest.raises(ConfigError, match="Permission denied: 'a file'"):
        keep_inputs(load_config("shapes"), find, world)
    assert len(told) == 1


def test_a_lora_that_does_not_fit_is_told_before_anything_loads(tmp_path):
    told = [(["model.lora={target_modules: [to_q, to_x]}"], "model.lora.target_modules: 'to_x' is neither"),
            (["model.lora={path: /nowhere}"], "model.lora.path: no file or folder /nowhere")]  # fmt: skip
    for overrides, expected in told:
        with pytest.raises(ValueError, match=expected):
            check_inputs(load_config("shapes", [*overrides, f"output_dir={tmp_path / 'run'}"]))


def test_a_run_does_not_resume_with_another_model(begun):
    run, base = begun
    config = base / "transformer" / "config.json"
    config.write_text(config.read_text().replace("true", "false"))
    with pytest.raises(ConfigError, match="model.path: .*base is not the model this run began with: another transform"):
        resumed(run, base)


def test_a_run_that_did_not_record_its_model_keeps_its_path(begun):
    run, base = begun
    (run / RUN_FILE).write_text("{}")
    resumed(run, base)
    with pytest.raises(ConfigError, match="model.path: differs from the run"):
        resumed(run, base.rename(base.with_name("moved")))


@pytest.mark.slow
def test_a_run_resumes_with_what_it_began_with(uninterrupted, tmp_path):
    """Told before the model is loaded, and nothing is changed."""
    run = tmp_path / "run"
    run.mkdir()
    about = json.loads((uninterrupted / RUN_FILE).read_text())
    assert about["inputs"].keys() == {"prompts.train", "prompts.held_out", "source of egrpo_fast", "rewards.clip"}
    for name in ("prompts.held_out", "rewards.clip"):
        changed = {**about, "inputs": {**about["inputs"], name: "another"}}
        (run / RUN_FILE).write_text(json.dumps(changed))
        (run / CONFIG_FILE).write_bytes((uninterrupted / CONFIG_FILE).read_bytes())
        entry = [sys.executable, "egrpo_fast/train.py", "shapes", *TINY, f"output_dir={run}", "resume=true"]
        result = subprocess.run(entry, cwd=ROOT, capture_output=True, text=True)
        told = f"error: {name}: not the same as when the run in {run} began"
        assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith(told), result.stderr
        assert {path.name for path in run.iterdir()} == {RUN_FILE, CONFIG_FILE, "run.lock"}


def test_prompts_that_are_cut_are_told(capsys):
    text = FluxTextEncoder(PIPELINE, load_config("shapes").model)
    tell_truncated(text, ["a red circle", "a red circle " * 20], "prompts.train")
    told = capsys.readouterr().out
    assert "prompts.train: 1 prompts are longer than T5's 24 tokens, and are cut\n  T5 sees 24 of" in told
    tell_truncated(text, ["a red circle"], "prompts.train")
    assert not capsys.readouterr().out


def test_the_command_tells_one_line_and_fails():
    entry = [sys.executable, "egrpo_fast/train.py", "shapes", "schedule.etta=1"]
    result = subprocess.run(entry, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["error: schedule.etta: unknown key; did you mean schedule.eta?"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["method={name: mix_grpo, window: 2, every: 2}", "objective.on_error=drop"], id="moving window"),
        pytest.param(["method={name: dance_grpo, fraction: 0.4}", "objective.scale_rewards=none"], id="random steps"),
    ],
)
def test_a_plan_that_changes_over_training(overrides, tmp_path):
    """The ratio starts at 1 under every iteration's plan; a resumed run goes on with the plan it would have had."""
    run = launch(tmp_path / "whole", *overrides)
    lines = metrics(run)[0]
    assert all(line["log_ratio_before_update"] == 0.0 < line["grad_norm"] for line in lines)
    assert len({tuple(line["spread_by_step"]["shapes_soft"]) for line in lines}) > 1, "other steps are trained"
    resumed = launch(tmp_path / "resumed", *overrides, "iterations=2")
    launch(resumed, *overrides, "resume=true")
    assert metrics(resumed)[0] == lines
