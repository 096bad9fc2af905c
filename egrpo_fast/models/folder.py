"""A pipeline's folder in diffusers' layout: found, downloaded if need be, and checked."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from egrpo_fast.config import Config, ModelConfig
from egrpo_fast.files import is_hub_id, read_json
from egrpo_fast.models.protocol import Backbone, families
from egrpo_fast.shapes import pipeline_path

INDEX = "model_index.json"
"""Names the pipeline's class. A folder that has it holds a pipeline."""
CARD = ("README.md", "LICENSE*")
"""Of a hub repository, what its licence is."""


def weights_stem(part: str) -> str | None:
    """How the names of a part's weight files begin; None: it has none."""
    if part.startswith("text_encoder"):
        return "model"
    return "diffusion_pytorch_model" if part.startswith(("transformer", "vae")) else None


def hub_files(parts: Sequence[str]) -> list[str]:
    """Of a hub repository, what is read of a pipeline's parts: patterns of names.

    The same as diffusers downloads: no weights in another format or precision beside them, no model card.
    """
    found = [INDEX]
    for part in parts:
        if stem := weights_stem(part):
            numbers = "-?????-of-?????"
            weights = (f"{stem}.safetensors", f"{stem}{numbers}.safetensors", f"{stem}.safetensors.index.json")
            found += [f"{part}/{name}" for name in ("config.json", *weights)]
        else:
            found.append(f"{part}/*")
    return found


def resolve(path: str, field: str = "model.path", parts: Sequence[str] | None = None) -> Path:
    """The local folder of a pipeline: `path` itself, or that of a hub id, whose parts are downloaded if need be.

    parts: some of them; None: all. ValueError, which begins with `field`.
    """
    if not is_hub_id(path):
        return Path(path)
    if parts is None:
        parts = family_of(_download(path, field, hub_files(())), field).parts
    return _download(path, field, hub_files(parts))


def configs_of(path: str, field: str = "model.path") -> Path:
    """A local folder that holds a pipeline's configs, and perhaps no weights: `path` itself, or that of a hub id.

    Those of `models/*/configs` are part of this package, of others the hub is asked. ValueError.
    """
    if not is_hub_id(path):
        return Path(path)
    for known in Path(__file__).parent.glob("*/configs"):
        if (file := known / f"{path}.json").is_file():
            return _laid_out(file)
    return _download(path, field, [INDEX, "*/config.json", "scheduler/*"])


@cache
def _laid_out(file: Path) -> Path:
    """A folder, until this process ends, with the configs of a pipeline that one file holds by their names."""
    folder = Path(tempfile.mkdtemp(prefix="egrpo-configs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, config in read_json(file).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    return folder


def _download(path: str, field: str, files: list[str]) -> Path:
    """The folder of a hub id that has the files of these names. ValueError, which begins with `field`."""
    try:
        return Path(snapshot_download(path, allow_patterns=files))
    except GatedRepoError:
        raise ValueError(
            f"{field}: {path} is gated: accept its licence at https://huggingface.co/{path} and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(f"{field}: there is neither a folder nor a hub repository {path}") from None
    except (OSError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise ValueError(
            f"{field}: {path} is no folder here and could not be downloaded; without a network, give the path of a "
            f"folder that holds it ({message})"
        ) from None


def fetch_card(path: str) -> None:
    """Put the model card and the licence of a hub id into the folder that `resolve` gives, if the hub can be asked."""
    if is_hub_id(path):
        with suppress(OSError, ValueError, RuntimeError):
            snapshot_download(path, allow_patterns=list(CARD))


def family_of(folder: Path, field: str = "model.path") -> type[Backbone]:
    """The model family of a local folder. ValueError, which begins with `field`: it holds none of a known family."""
    if not folder.exists():
        raise ValueError(f"{field}: no folder {folder}")
    index, known = folder / INDEX, families()
    if not index.is_file():
        raise ValueError(f"{field}: {folder} has no {INDEX}; a diffusers pipeline folder is expected")
    try:
        components = read_json(index)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{field}: {folder} cannot be read as a pipeline: {error!r}") from None
    found = components.get("_class_name") if isinstance(components, dict) else type(components).__name__
    if found not in known:
        raise ValueError(f"{field}: {folder} holds a {found}; {' or '.join(sorted(known))} is expected")
    return known[found]


def check_folder(folder: Path, model: ModelConfig, field: str = "model.path") -> type[Backbone]:
    """The family of a local folder whose parts are all there. No weight is read, and no transformer is made.

    ValueError, which begins with `field`: something is missing or of another kind. ValueError, which begins with a
    setting of `model`: the family makes no images of that size, or the model takes no such guidance.
    """
    family = family_of(folder, field)
    if missing := [part for part in family.parts if not (folder / part).is_dir()]:
        raise ValueError(f"{field}: {folder} lacks {', '.join(missing)}")
    expected = family.transformer_class.__name__
    try:
        architecture = read_json(folder / "transformer" / "config.json")["_class_name"]
        if architecture != expected:
            raise ValueError(f"{field}: the transformer of {folder} is a {architecture}, not a {expected}")
        family.check(folder, model)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{field}: {folder} cannot be read as a {family.pipeline.__name__}: {error!r}") from None
    return family


def with_times(config: Config, folder: Path | None = None) -> Config:
    """The same with the grid of the model's own scheduler where `schedule.shift` is `auto`. ValueError: it has none.

    folder: of the model; None: its configs alone, from wherever they are.
    """
    if config.schedule.shift != "auto":
        return config
    folder = folder or configs_of(pipeline_path(config.model.path))
    return config.with_times(family_of(folder).times(folder, config.model, config.schedule.num_steps))
