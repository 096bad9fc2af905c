"""Which model a run began with: fingerprints of a pipeline's parts, kept in `run.json` and compared ever after."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from egrpo_fast.config import CONFIG_FILE, RUN_FILE
from egrpo_fast.files import read_json
from egrpo_fast.models.folder import family_of
from egrpo_fast.models.weight_files import part_identity

TRAINED = "transformer"
"""The part that a run changes."""


def identity(folder: Path) -> dict[str, str]:
    """Fingerprints of what training uses of a pipeline folder, by part: the transformer, and what the family names.

    Of the transformer: `config.json`, but for keys that begin with `_`, which say who wrote it, and
    `WeightFiles.samples`. Neither where the folder lies nor how weights are split into files matters. At most 64 KiB
    of a weight are read, by estimate 60 MB of FLUX.1-dev: a changed part is seen where training or merging touched
    whole tensors, a few numbers edited between the samples may pass. The scheduler is not looked at. ValueError names
    what is missing.
    """
    transformer = {TRAINED: part_identity("model.path", folder / TRAINED)}
    return transformer | family_of(folder).fingerprints(folder)


def base_of(run: Path) -> dict[str, str]:
    """`identity` of the model that a run began with; {} where that was not recorded. ValueError: it cannot be read."""
    return recorded(run, "base")


def recorded(run: Path, what: str) -> Any:
    """What is under this key in a run's RUN_FILE, such as fingerprints; {}: nothing. ValueError: it cannot be read."""
    file = run / RUN_FILE
    try:
        return read_json(file).get(what, {}) if file.exists() else {}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}; put it back") from None


def run_name(run: Path) -> str:
    """What the checkpoints of a run bear; "": it began before they bore anything. ValueError: it cannot be read."""
    return recorded(run, "run") or ""


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """The parts of which both say something, and not the same; "": none."""
    return " and ".join(part for part in one if part in other and one[part] != other[part])


def check_base(run: Path, folder: Path) -> None:
    """ValueError where the pipeline in a folder is not the one that a run began with, as far as that was recorded."""
    if (began := base_of(run)) and (parts := differing(began, identity(folder))):
        raise ValueError(
            f"model.path: {folder} is not the model this run began with: another {parts}; put that one back, or let "
            f"model.path, which `egrpo export` reads in {run / CONFIG_FILE}, name the folder where it is now"
        )
