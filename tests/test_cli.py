"""The command line: what comes at once, what may stand where, how training is started."""

import os
import subprocess
import sys

import pytest

from egrpo_fast import __version__, cli
from egrpo_fast.commands import launch
from egrpo_fast.config import ConfigError
from egrpo_fast.distributed import world
from egrpo_fast.train import check_launcher

HEAVY = ("torch", "numpy", "transformers", "diffusers", "deepspeed", "matplotlib", "pyarrow")


@pytest.mark.parametrize(
    "words", ["--help", "--version", "train --help", "settings", "train shapes seed=x"]
)
def test_what_needs_no_tensor_does_not_wait_for_torch(words):
    code = f"import sys, atexit; atexit.register(lambda: print('loaded', *{{*{HEAVY!r}}} & {{*sys.modules}}))\n"
    code += "from egrpo_fast.cli import main; main()"
    told = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)
    assert told.stdout.splitlines()[-1] == "loaded", told
    if words == "--version":
        assert told.stdout.splitlines()[0] == f"egrpo_fast {__version__}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("plan shapes --gpus 1 seed=2", {"recipe": "shapes", "overrides": ["seed=2"], "gpus": 1}),
        ("plan --json shapes seed=2 --gpus 1 iterations=3", {"overrides": ["seed=2", "iterations=3"], "json": True}),
        ("train --num_gpus 2 shapes --hostfile hosts seed=2", {"num_gpus": 2, "hostfile": "hosts", "recipe": "shapes"}),
        ("encode a.txt b.txt --model shapes OUT", {"prompts": ["a.txt", "b.txt"], "model": "shapes"}),
        ("fidelity shapes --num-prompts 2 seed=2", {"recipe": "shapes", "overrides": ["seed=2"], "num_prompts": 2}),
        ("evaluate a --prompts shapes b", {"models": ["a", "b"], "prompts": "shapes"}),
        ("export RUN --weights ema OUT", {"weights": "ema"}),
    ],
)
def test_options_stand_before_between_or_after(words, expected):
    parsed = vars(cli.parse(words.split()))
    assert expected.items() <= parsed.items()


@pytest.mark.parametrize(
    "words", ["", "trian shapes", "train", "plan shapes --gpus 0", "train shapes --master_port 99999"]
)
def test_a_wrong_command_line_is_told(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse(words.split())
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err


def test_paths_of_the_command_line_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parsed = cli.parse(["evaluate", "~/run", "--prompts=$HOME/p.txt", "--out=~/out"])
    assert (parsed.models, parsed.prompts, str(parsed.out)) == (["/home/me/run"], "/home/me/p.txt", "/home/me/out")
    assert cli.parse(["evaluate", "mine=~/m", "other=a$$1", "--prompts=p"]).models == ["mine=/home/me/m", "other=a$1"]


@pytest.mark.parametrize("path", ["a" * 300, "a/" * 3000, "", "a\nb", "$NOT_SET/x"])
@pytest.mark.parametrize(
    "words", ["export {} OUT", "export RUN {}", "encode {} out --model shapes", "plan shapes --plot {}", "fidelity {}"]
)
def test_paths_that_no_file_can_have_are_refused(words, path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse([path if word == "{}" else word for word in words.split()])
    assert ended.value.code == 2 and "error: argument" in capsys.readouterr().err


def test_train_becomes_the_launcher_with_its_options(monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *arguments: made.append(arguments))
    made = []
    words = "train shapes --num_gpus 2 seed=3 --launcher_args=-v --no_ssh --node_rank 0"
    monkeypatch.setattr(sys, "argv", ["egrpo", *words.split()])
    cli.main()
    ((program, command),) = made
    assert program == command[0] == sys.executable and command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert command[3:7] == ["--num_gpus=2", "--node_rank=0", "--launcher_args=-v", "--no_ssh"]
    assert command[7:] == ["--quiet", str(launch.SCRIPT), "shapes", "seed=3"] and launch.SCRIPT.is_file()


def test_a_wrong_setting_is_told_before_the_launcher_starts(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["egrpo", "train", "shapes", "schedule.etta=1"])
    with pytest.raises(SystemExit, match=r"^error: schedule.etta: unknown key; did you mean schedule.eta\?$"):
        cli.main()


def test_the_launchers_own_parser_knows_the_options():
    from deepspeed.launcher.runner import parse_args

    values = dict.fromkeys(launch.OPTIONS, "1")
    options = [f"--{name}={value}" for name, value in values.items()] + [f"--{name}" for name in launch.FLAGS]
    parsed = vars(parse_args([*options, "train.py", "shapes", "--local_rank=0"]))
    assert all(str(parsed[name]) == "1" for name in values) and all(parsed[name] for name in launch.FLAGS)
    assert parsed["user_script"] == "train.py" and parsed["user_args"] == ["shapes", "--local_rank=0"]


def port(monkeypatch, **variables):
    for name in ("MASTER_PORT", "WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return world._meeting_port()


def test_runs_of_one_machine_do_not_share_a_port(monkeypatch):
    """The deepspeed launcher gives every run 29500 where it is told no other."""
    given = {"MASTER_PORT": "29500", "WORLD_SIZE": "2"}
    ours = port(monkeypatch, **given, LOCAL_SIZE="2")
    assert ours == port(monkeypatch, **given, LOCAL_SIZE="2") != "29500", "all ranks of a launcher agree"
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert port(monkeypatch, **given, LOCAL_SIZE="2") not in (ours, "29500"), "and another run's do on another"
    assert port(monkeypatch, **given, LOCAL_SIZE="1") == "29500", "several machines have no other way to agree"
    assert port(monkeypatch, **given) == "29500", "torchrun's store is there"
    assert port(monkeypatch, MASTER_PORT="29611", WORLD_SIZE="2", LOCAL_SIZE="2") == "29611", "as was asked"
    alone = [port(monkeypatch, MASTER_PORT="29500", WORLD_SIZE="1") for _ in range(2)]
    assert "29500" not in alone


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_that_do_not_know_of_each_other_are_refused(variable, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, "4")
    with pytest.raises(ConfigError, match=f"{variable}: 4 processes were started without ranks"):
        check_launcher()
    monkeypatch.setenv("RANK", "0")
    check_launcher()
