"""What a run reads beside its model: fingerprints, recorded when it begins and compared when it is resumed.

What would make a different run is refused: other prompts, another LoRA, another model or decoder of the tail, other
weights of a reward. Source code may be mended, and a line says so: that of a user's own reward, and this package.
Embeddings (`prompts.embeddings`) are held to the model's text encoders, which are part of the model's identity. What
another server scores, and what else a user's own reward reads, is not seen.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from egrpo_fast.config import RUN_FILE, Config
from egrpo_fast.files import file_fingerprint, fingerprint
from egrpo_fast.models.fingerprint import TRAINED, recorded
from egrpo_fast.models.lora import find_file
from egrpo_fast.models.weight_files import part_identity
from egrpo_fast.rewards import GIVEN, Reward, built_in
from egrpo_fast.scoring.scorer import Scorer

INPUTS = "inputs"
"""Their key in RUN_FILE."""
SOURCE = "source of "
"""How the names of what may change begin."""


def of_files(config: Config, train: Sequence[str], held_out: Sequence[str], package: str) -> dict[str, str]:
    """Fingerprints by setting, of the inputs that are not loaded as a whole. ValueError names what cannot be read.

    config: with a folder for `tail.path`. train, held_out: its prompts. package: this one's version and commit.
    """
    lora, tail = config.model.lora, config.tail
    grid = {"schedule.shift": fingerprint([repr(config.build_schedule().times).encode()])}
    found = (grid if config.schedule.shift == "auto" else {}) | {
        "prompts.train": fingerprint(prompt.encode() for prompt in train),
        "prompts.held_out": fingerprint(prompt.encode() for prompt in held_out[: config.evaluation.num_prompts]),
        f"{SOURCE}egrpo_fast": package,
    }
    for field, path in (("model.lora.path", lora and lora.path), ("tail.lora", tail.lora)):
        if path:
            found[field] = _adapters(field, path)
    for field, path in (("tail.path", tail.path and f"{tail.path}/{TRAINED}"), ("tail.decoder", tail.decoder)):
        if path:
            found[field] = part_identity(field, Path(path))
    return found


def _adapters(field: str, path: str) -> str:
    file = find_file(field, path)
    try:
        return fingerprint([file_fingerprint(file).encode()])
    except OSError as error:
        raise ValueError(f"{field}: {file} cannot be read: {error.strerror}") from None


def of_rewards(rewards: Mapping[str, Reward]) -> dict[str, str]:
    """Fingerprints by reward: of a network's weights, and of the file that a user's own reward is written in.

    A file that cannot be read, such as a module in a zip archive, is left out, with a warning.
    """
    found = {}
    for name, reward in rewards.items():
        if isinstance(reward, Scorer):
            found[f"rewards.{name}"] = reward.fingerprint()
        kind = name.partition("/")[0]
        module = getattr(GIVEN[name], "__module__", "") if name in GIVEN else kind.partition(":")[0]
        file = getattr(sys.modules.get(module), "__file__", None)
        if not built_in(name) and file:
            try:
                found[f"{SOURCE}rewards.{name}"] = file_fingerprint(Path(file))
            except OSError as error:
                message = f"its source {file} cannot be read ({error.strerror}); a change of it will not be seen"
                warnings.warn(f"rewards.{name}: {message}", stacklevel=2)
    return found


def compare(run: Path, found: Mapping[str, str]) -> list[str]:
    """Notes on the inputs of a resumed run. ValueError: one is not what the run began with."""
    began = recorded(run, INPUTS)
    changed = [name for name, now in found.items() if began.get(name, now) != now]
    if refused := [name for name in changed if not name.startswith(SOURCE)]:
        raise ValueError(
            f"{', '.join(refused)}: not the same as when the run in {run} began; put that back, or begin a run in "
            "another output_dir"
        )
    notes = [f"resume: the {name} has changed since this run began" for name in changed]
    if unknown := [name for name in found if name not in began]:
        notes.append(f"resume: {run / RUN_FILE} does not say what {', '.join(unknown)} was; it is taken to be the same")
    return notes
