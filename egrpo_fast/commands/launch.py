"""`egrpo train`: the settings are checked here, once, then the deepspeed launcher starts `train.py` on every rank."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from egrpo_fast.config import Config, load_config

SCRIPT = Path(__file__).parents[1] / "train.py"
OPTIONS = {
    "num_gpus": ("N", "ranks on every machine (one per GPU)"),
    "num_nodes": ("N", "only the first N machines of the host file"),
    "hostfile": ("FILE", "machines, a line `NAME slots=GPUS` each"),
    "include": ("HOST[:GPU,...]", "only these machines and GPUs"),
    "exclude": ("HOST[:GPU,...]", "all but these"),
    "master_addr": ("ADDRESS", "where the ranks meet"),
    "master_port": ("PORT", "the port there (on one machine: a free one; else 29500)"),
    "node_rank": ("N", "number of this machine, with --no_ssh"),
    "launcher": ("NAME", "what starts the other machines: pdsh, openmpi, mpich, impi, mvapich, slurm"),
    "launcher_args": ("TEXT", "options for that"),
    "ssh_port": ("PORT", "for the other machines"),
    "venv_script": ("FILE", "activates the environment on the other machines"),
    "enable_each_rank_log": ("DIR", "the output of every rank in a file of its own"),
    "bind_core_list": ("CORES", "the cores to bind to, such as 0-15"),
}
"""Options of the deepspeed launcher that take a value; metavar and meaning."""
FLAGS = {
    "no_ssh": "the same command is started on every machine by hand",
    "no_ssh_check": "do not try the connection first",
    "force_multi": "use the host file even for one machine",
    "bind_cores_to_rank": "every rank keeps to cores of its own",
}
"""Those that take none."""


def load_checked(recipe: str, overrides: Sequence[str]) -> Config:
    """`load_config`, and DeepSpeed's own check of `deepspeed.overrides`, which takes seconds, where there are any."""
    config = load_config(recipe, overrides)
    if config.deepspeed.overrides:
        from egrpo_fast.distributed.engine import check_overrides

        check_overrides(config)
    return config


def launch(recipe: str, overrides: Sequence[str], options: Mapping[str, Any]) -> None:
    """Become the deepspeed launcher of a run. options: by name of OPTIONS and FLAGS; None or False: not given.

    ValueError: a setting is wrong. The user reads it before the launcher and every rank take their time to start.
    """
    if not any(options.get(name) for name in ("launcher", "hostfile", "num_nodes", "force_multi")) and not any(
        map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))
    ):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else each process of DeepSpeed warns that it found no GPU
    load_checked(recipe, overrides)
    given = [f"--{name}={options[name]}" for name in OPTIONS if options.get(name) is not None]
    flags = [f"--{name}" for name in FLAGS if options.get(name)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *given, *flags]
    script = [str(SCRIPT), recipe, *overrides]
    command = [*launcher, *script, "--verbose"] if options.get("verbose") else [*launcher, "--quiet", *script]
    # The launcher is started by `-m`. A user's own random.py or copy.py in this folder must not stand in its way.
    os.environ["PYTHONSAFEPATH"] = "1"
    sys.stdout.flush()
    os.execv(sys.executable, command)
