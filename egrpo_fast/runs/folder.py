"""A run's folder: whose it is, what a resumed run may change of it, which model it began with.

What takes seconds to import is imported where it is used: a mistake in the settings is reported before.
"""

import json
import math
import os
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from egrpo_fast import __version__
from egrpo_fast.config import CONFIG_FILE, RUN_FILE, Config, ConfigError, LoraConfig, load_config
from egrpo_fast.files import write_whole
from egrpo_fast.folder_lock import Claim, lock

if TYPE_CHECKING:
    from egrpo_fast.distributed.world import World

LOCK_FILE = "run.lock"
BEFORE_A_RUN = {LOCK_FILE, RUN_FILE, f"{RUN_FILE}.tmp", f"{CONFIG_FILE}.tmp"}
"""What is left of a run that was ended before its settings were recorded. Nothing of it had begun."""
MAY_CHANGE = (
    "resume", "iterations", "output_dir", "wandb", "evaluation.every", "samples.", "checkpoint.", "guards.",
    "deepspeed.", "rollout.parameters", "rollout.max_rows_per_call", "rollout.compile", "rollout.overlap",
    "model.decode_batch_size", "model.gradient_checkpointing", "model.attention", "model.tf32", "prompts.embeddings",
)  # fmt: skip
"""Settings, and sections, that a resumed run may change: they change its length, speed, memory and rounding."""


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {name: leaf for key in tree for name, leaf in _leaves(tree[key], f"{path}.{key}" if path else key).items()}


def _holds_run(folder: Path) -> bool:
    """Whether a run was recorded in a folder. ConfigError: there is something else in it."""
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if CONFIG_FILE in there:
        return True
    if others := [name for name in there if name not in BEFORE_A_RUN]:
        message = f"{folder} is not empty but holds no run: {others[0]} is there and {CONFIG_FILE} is not"
        raise ConfigError(f"output_dir: {message}; choose another folder")
    return False


def check_output(config: Config) -> bool:
    """Whether output_dir holds a run, which this one continues.

    ConfigError where the folder cannot be written, or holds something else, or a run that shall not or cannot go on.
    """
    folder = config.output_dir
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir: {there} is not a folder that can be written")
    if not _holds_run(folder):
        return False
    if not config.resume:
        message = f"{folder} is not empty; resume=true continues the run in it. To begin anew choose another folder"
        raise ConfigError(f"output_dir: {message}")
    try:
        # Through today's settings, so that one that did not exist then has its default.
        before = _leaves(load_config(str(folder / CONFIG_FILE)).used())
    except (OSError, ValueError, KeyError) as error:
        message = f"{folder / CONFIG_FILE} cannot be read ({' '.join(str(error).split())})"
        raise ConfigError(f"resume: {message}; put the run's settings back, or choose another output_dir") from None
    now = _leaves(config.used())
    changed = [key for key in now | before if not key.startswith(MAY_CHANGE) and now.get(key) != before.get(key)]
    if config.model.lora is not None:  # what a LoRA file says is compared with that file, once the model is found
        changed = [key for key in changed if key not in {f"model.lora.{name}" for name in config.model.lora.follows}]
    if config.optimizer.lr_scheduler != "constant" and now["iterations"] != before["iterations"]:
        changed.append("iterations")  # the learning rate decays towards the last one
    if "model.path" in changed:
        from egrpo_fast.models.fingerprint import base_of

        if base_of(folder):  # then what is in there is compared, once it is found
            changed.remove("model.path")
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: differs from the run in {folder}; a resumed run keeps its settings. To train with "
            "others choose another output_dir"
        )
    return True


def claim_output(config: Config, world: "World") -> tuple[Config, Claim, IO[str] | None]:
    """Make output_dir this run's: every rank sees it, and no other run writes there. ConfigError, on all ranks.

    Returns the settings, the claim and the lock file. `resume` is set in the settings where there is a run to resume.
    Rank 0 has the lock file open, and the other ranks have None. Closing it gives the folder up.
    """
    folder, mark, run, resume, message = config.output_dir, "", uuid.uuid4().hex, False, ""
    held: IO[str] | None = None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = lock(folder / LOCK_FILE)
            if resume := check_output(config):  # once more, for nobody else can change it now
                from egrpo_fast.models.fingerprint import run_name

                run = run_name(folder)
            mark = f"{uuid.uuid4().hex} process {os.getpid()} on {socket.gethostname()}"
            held.truncate(0)
            held.write(mark)
            held.flush()
        except BlockingIOError:
            message = f"output_dir: another run is writing to {folder} right now"
            if (by := (folder / LOCK_FILE).read_text(errors="replace").partition(" ")[2]).isprintable() and by:
                message += f": {by}"
        except OSError as error:
            message = f"output_dir: {folder} cannot be written ({error.strerror})"
        except ValueError as error:
            message = str(error)
    mark, run, resume, message = world.broadcast((mark, run, resume, message))
    if message:
        if held:
            held.close()
        raise ConfigError(message)
    claim = Claim(folder / LOCK_FILE, mark, run)
    deadline = time.monotonic() + 30  # network filesystems show news late
    while not (seen := claim.holds()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [str(rank) for rank, sees in enumerate(world.gather(seen)) if not sees]
    if blind:
        if held:
            held.close()
        raise ConfigError(f"output_dir: rank {', '.join(blind)} does not see {folder}; all machines must share it")
    if world.is_main and config.resume and not resume:
        warnings.warn(f"resume: {folder} holds no run yet; it begins here", stacklevel=2)
    return config.model_copy(update={"resume": resume}), claim, held


def identify(config: Config, folder: Path, world: "World") -> dict[str, str]:
    """Fingerprints of the model in a folder, for the record of a run that begins; on rank 0.

    ConfigError, on all ranks: they cannot be taken, or a resumed run began with another model.
    """
    from egrpo_fast.models.fingerprint import check_base, identity

    def find() -> dict[str, str]:
        if not config.resume:
            return identity(folder)
        check_base(config.output_dir, folder)
        return {}

    return _by_main(find, world)


def check_adapters(config: Config, linear_layers: Collection[str]) -> None:
    """ConfigError where a resumed run would take other adapters from its LoRA file than it began with.

    config: with what was read from the file. linear_layers: the names of the transformer's.
    """
    before, now = load_config(str(config.output_dir / CONFIG_FILE)).model.lora, config.model.lora
    if before is None or now is None:  # `check_output` compares these
        return
    changed = [
        f"model.lora.{name}: {found:g} by {now.path}, {recorded:g} by the run's {CONFIG_FILE}"
        for name, found, recorded in (("rank", now.rank, before.rank), ("alpha", now.alpha, before.alpha))
        if not math.isclose(found, recorded, rel_tol=1e-6)
    ]
    if _adapted(before, linear_layers) != _adapted(now, linear_layers):
        changed.append(f"model.lora.target_modules: {now.path} adapts other layers than the run's {CONFIG_FILE} says")
    if changed:
        raise ConfigError(
            f"{'; '.join(changed)}. The run cannot go on as it began. To train further, export it "
            f"(egrpo export {config.output_dir} OUT) and begin a run in another output_dir with model.lora.path=OUT"
        )


def _adapted(lora: LoraConfig, linear_layers: Collection[str]) -> set[str]:
    return {layer for layers in lora.layers(linear_layers).values() for layer in layers}


def keep_inputs(config: Config, find: Callable[[], dict[str, str]], world: "World") -> dict[str, str]:
    """What `find` finds of a run's inputs (`runs/inputs.py`), for its record; on rank 0.

    ConfigError, on all ranks: it cannot be found, or a resumed run began with other inputs.
    """
    from egrpo_fast.runs.inputs import compare

    def compared() -> dict[str, str]:
        found = find()
        for message in compare(config.output_dir, found) if config.resume else ():
            warnings.warn(message, stacklevel=4)
        return found

    return _by_main(compared, world)


def _by_main(find: Callable[[], dict[str, str]], world: "World") -> dict[str, str]:
    """What rank 0 finds; {} on the others. ConfigError, on all ranks: it raised ValueError or OSError."""
    found: dict[str, str] = {}
    message = ""
    if world.is_main:
        try:
            found = find()
        except (OSError, ValueError) as error:
            message = str(error)
    if message := world.broadcast(message):
        raise ConfigError(message)
    return found


def record(config: Config, base: dict[str, str], inputs: dict[str, str], world_size: int, run: str = "") -> None:
    """What the run is, in its folder; of a resumed one, where its model lies now, for an export looks there.

    Once CONFIG_FILE is there the folder holds a run. ConfigError: it cannot be written.
    """
    from egrpo_fast.runs.provenance import commit

    folder, files = config.output_dir, {}
    if not config.resume:
        made_by = {
            "version": __version__, "commit": commit(), "world_size": world_size, "run": run,
            "base": base, "inputs": inputs,
        }  # fmt: skip
        files = {RUN_FILE: json.dumps(made_by) + "\n", CONFIG_FILE: config.yaml()}
    elif (before := load_config(str(folder / CONFIG_FILE))).model.path != config.model.path:
        model = before.model.model_copy(update={"path": config.model.path})
        files = {CONFIG_FILE: before.model_copy(update={"model": model}).yaml()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(folder / name, content)
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written ({error.strerror})") from None
