"""A run's folder: whose it is, what a resumed run may change of it, which model it began with.

What takes seconds to import is imported where it is used: a mistake in the settings is told before.
"""

import fcntl
import json
import os
import time
import uuid
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from egrpo_fast import __version__
from egrpo_fast.config import CONFIG_FILE, RUN_FILE, Config, ConfigError, load_config

if TYPE_CHECKING:
    from egrpo_fast.engine import World

LOCK_FILE = "run.lock"
MAY_CHANGE = (
    "resume", "iterations", "output_dir", "wandb", "evaluation.every", "checkpoint.", "guards.", "deepspeed.",
    "rollout.weights", "rollout.micro_batch", "rollout.compile", "rollout.overlap", "model.decode_batch",
    "model.gradient_checkpointing", "model.attention", "model.tf32", "prompts.embeddings",
)  # fmt: skip
"""Settings, and sections, that a resumed run may change: they change its length, speed, memory and rounding."""


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {name: leaf for key in tree for name, leaf in _leaves(tree[key], f"{path}.{key}" if path else key).items()}


def check_output(config: Config) -> None:
    """ConfigError where output_dir cannot be written, holds another run, or holds none or another to resume."""
    folder = config.output_dir
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"output_dir: {there} is not a folder that can be written")
    if not config.resume:
        if folder.exists() and any(file.name != LOCK_FILE for file in folder.iterdir()):
            raise ConfigError(f"output_dir: {folder} is not empty; choose another, or resume=true to continue that run")
        return
    try:
        # Through today's settings, so that one that did not exist then has its default.
        before = _leaves(yaml.safe_load(load_config(str(folder / CONFIG_FILE)).yaml()))
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise ConfigError(f"resume: {folder} holds no run to continue ({' '.join(str(error).split())})") from None
    now = _leaves(yaml.safe_load(config.yaml()))
    changed = [key for key in now | before if not key.startswith(MAY_CHANGE) and now.get(key) != before.get(key)]
    if config.model.lora is not None:  # what a LoRA file says is compared with that file, once the model is found
        changed = [key for key in changed if key not in {f"model.lora.{name}" for name in config.model.lora.follows}]
    if config.optimizer.decay != "constant" and now["iterations"] != before["iterations"]:
        changed.append("iterations")  # the learning rate decays towards the last one
    if "model.path" in changed:
        from egrpo_fast.backbones.identity import base_of

        if base_of(folder):  # then what is in there is compared, once it is found
            changed.remove("model.path")
    if changed:
        raise ConfigError(f"{', '.join(changed)}: differs from the run in {folder}; a resumed run keeps its settings")


def claim_output(config: Config, world: "World") -> IO[str] | None:
    """Make output_dir this run's: every rank sees it, and no other run writes there. ConfigError, on all ranks.

    Returns what holds the claim, on rank 0, as long as it is open.
    """
    folder, mark, told = config.output_dir, uuid.uuid4().hex, ""
    lock: IO[str] | None = None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / LOCK_FILE).open("a+")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(mark)
            lock.flush()
        except BlockingIOError:
            told = f"output_dir: another run is writing to {folder} right now"
        except OSError as error:
            told = f"output_dir: {folder} cannot be written ({error.strerror})"
    mark, told = world.from_main((mark, told))
    if told:
        raise ConfigError(told)
    deadline = time.monotonic() + 30  # network filesystems show news late
    while not (seen := _holds(folder / LOCK_FILE, mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [str(rank) for rank, sees in enumerate(world.gather(seen)) if not sees]
    if blind:
        raise ConfigError(f"output_dir: rank {', '.join(blind)} does not see {folder}; all machines must share it")
    return lock


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_text() == text
    except OSError:
        return False


def identify(config: Config, folder: Path, world: "World") -> dict[str, str]:
    """Fingerprints of the model in a folder, for the record of a run that begins; on rank 0.

    ConfigError, on all ranks: they cannot be taken, or a resumed run began with another model.
    """
    from egrpo_fast.backbones.identity import check_base, identity

    base: dict[str, str] = {}
    told = ""
    if world.is_main:
        try:
            if config.resume:
                check_base(config.output_dir, folder)
            else:
                base = identity(folder)
        except ValueError as error:
            told = str(error)
    if told := world.from_main(told):
        raise ConfigError(told)
    return base


def record(config: Config, base: dict[str, str], world_size: int) -> None:
    """What the run is, in its folder; of a resumed one, where its model lies now, for an export looks there."""
    from egrpo_fast.doctor import commit

    folder, files = config.output_dir, {}
    if not config.resume:
        folder.mkdir(parents=True, exist_ok=True)
        made_by = {"version": __version__, "commit": commit(), "world_size": world_size, "base": base}
        files = {RUN_FILE: json.dumps(made_by) + "\n", CONFIG_FILE: config.yaml()}
    elif (before := load_config(str(folder / CONFIG_FILE))).model.path != config.model.path:
        model = before.model.model_copy(update={"path": config.model.path})
        files = {CONFIG_FILE: before.model_copy(update={"model": model}).yaml()}
    for name, content in files.items():
        beside = folder / f"{name}.tmp"
        beside.write_text(content)
        beside.replace(folder / name)
