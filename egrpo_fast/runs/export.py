"""A run's checkpoint as a diffusers pipeline folder or LoRA file: no GPU, no DeepSpeed, a shard in memory at a time."""

import fcntl
import hashlib
import json
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from egrpo_fast.config import CHECKPOINTS, CONFIG_FILE, RUN_FILE, Config, LoraConfig, load_config
from egrpo_fast.distributed.checkpoint import INDEX, CheckpointReader, Checkpoints, check_sound, held, is_best
from egrpo_fast.files import follow_umask, is_hub_id, read_json
from egrpo_fast.models.fingerprint import check_base, recorded, run_name
from egrpo_fast.models.folder import INDEX as PIPELINE_INDEX
from egrpo_fast.models.folder import family_of, fetch_card, resolve
from egrpo_fast.models.lora import save_lora
from egrpo_fast.models.transformer import hollow_transformer
from egrpo_fast.models.weight_files import WeightFiles, fused
from egrpo_fast.runs.metrics import RunLog
from egrpo_fast.shapes import pipeline_path

SHARD_BYTES = 5 * 2**30
KINDS = {"model": "weight", "ema": "ema"}
RECORD = "export.json"
"""A file in every export: what it is of, and its files' sizes. It is locked while the export is being written."""
_STEM = "diffusion_pytorch_model"


def export(
    run: Path, out: Path, weights: Literal["model", "ema"] = "model", checkpoint: str = "newest", *, fuse: bool = False,
    shard_bytes: int = SHARD_BYTES, replace: bool = False, verify: bool = True,
) -> tuple[Path, bool]:  # fmt: skip
    """Write what the pipeline's `from_pretrained(out)` loads, or `load_lora_weights(out)` of a LoRA run, and its card.

    weights: as trained, or their moving average. checkpoint: as for `find_checkpoint`. fuse: write a LoRA run as a
    whole pipeline, `W + alpha / rank B A` in the dtype of the base's file. replace: an earlier export in `out`, once
    this one is whole. verify: read the checkpoint's checksums first.

    Returns the checkpoint, and whether anything was written: not where `out` holds this very export already. It is
    written beside, in a folder that no other export uses, and renamed, so `out` is whole or as it was. Killed between
    two renames, it is as it was once this is called again. The run may go on meanwhile.

    ValueError: no run, no such checkpoint or average, a damaged checkpoint, nothing to fuse, `out` in the way, no room,
    another base than the run began with. Adapters alone are written in spite of another base, with a warning.
    """
    if not (run / CONFIG_FILE).is_file():
        raise ValueError(f"export: {run} holds no run ({CONFIG_FILE} is missing)")
    out = out.resolve()
    if out.is_mount():
        raise ValueError(f"export: {out} is a mount point, which cannot be renamed; choose a folder in it")
    config = load_config(str(run / CONFIG_FILE))
    if fuse and config.model.lora is None:
        raise ValueError(f"export: {run} trained all weights and has no adapters to fuse; leave --fuse out")
    _put_back(out)
    try:
        with ExitStack() as stack:
            with open_checkpoint(run, checkpoint) as reader:
                made_of = {
                    "checkpoint": hashlib.sha256((reader.path / INDEX).read_bytes()).hexdigest(),
                    "iteration": reader.iteration, "weights": weights, "fused": fuse,
                }  # fmt: skip
                if _there(out) == made_of:
                    return reader.path, False
                if out.exists() and not (out.is_dir() and (replace or not any(out.iterdir()))):
                    raise ValueError(f"export: {out} is in the way{_about(out)}; choose another folder, or delete it")
                if KINDS[weights] not in reader.kinds():
                    remedy = "train with optimizer.ema_decay for them"
                    raise ValueError(f"export: {reader.path} holds no {weights} weights; {remedy}")
                if verify:
                    check_sound(reader.path)
                for left in _siblings(out, "partial"):
                    _remove_dead(left)
                partial = stack.enter_context(_new_beside(out))
                _write(run, partial, config, reader, weights, fuse, shard_bytes)
                _record(partial, made_of)
                follow_umask(partial)
            return reader.path, _move(partial, out, made_of, replace)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"export: {out} could not be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        _put_back(out)


def _write(
    run: Path, out: Path, config: Config, reader: CheckpointReader, weights: str, fuse: bool, shard_bytes: int
) -> None:
    kind, lora = KINDS[weights], config.model.lora
    dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
    base = resolve(pipeline_path(config.model.path))
    fetch_card(config.model.path)
    try:
        check_base(run, base)
    except ValueError as error:
        if lora is None or fuse:
            raise
        warnings.warn(f"{error}; the adapters fit that one alone", stacklevel=3)

    def trained(name: str) -> Tensor:
        return reader.tensor(name, kind).to(dtype)

    if lora is not None and not fuse:
        adapters = {name: reader.tensor(name, kind) for name in reader.names(kind)}
        save_lora(out, adapters, lora, family_of(base).pipeline, dtype)
    else:
        files = WeightFiles(base / "transformer")
        if lora is None:
            shapes = {name: tuple(reader.shape(name, kind)) for name in reader.names(kind)}
            fixed = {name for name, _ in hollow_transformer(base).named_buffers()} & files.shapes.keys()
            files.check(shapes | {name: files.shapes[name] for name in fixed})
            like = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in files.shapes.items()}
        else:
            like = {name: torch.empty_like(files.read(name), device="meta") for name in files.shapes}
            fixed = set()
        moved = trained if lora is None else _fusing(files, reader, kind, dtype, lora)

        def read(name: str) -> Tensor:
            return files.read(name).to(dtype) if name in fixed else moved(name)

        _check_room(out, base, like)
        _copy_rest(base, out)
        _write_transformer(out / "transformer", like, read, shard_bytes)
        files.close()
    _write_card(run, out, base, config, reader, weights, fuse)


def _fusing(
    files: WeightFiles, reader: CheckpointReader, kind: str, dtype: torch.dtype, lora: LoraConfig
) -> Callable[[str], Tensor]:
    """Reads a tensor of the base, with the adapters of its layer in it: those that `save_lora` would write, in `dtype`.

    ValueError: they are not this base's.
    """
    downs = {name.partition(".lora_A.")[0]: name for name in reader.names(kind) if ".lora_A." in name}
    for layer, down in downs.items():
        shape = reader.shape(down.replace(".lora_A.", ".lora_B."), kind)[0], reader.shape(down, kind)[1]
        if files.shapes.get(f"{layer}.weight") != shape:
            raise ValueError(f"export: the base has no layer {layer} of {shape[1]} inputs and {shape[0]} outputs")

    def read(name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or layer not in downs:
            return files.read(name)
        down = reader.tensor(downs[layer], kind)
        up = reader.tensor(downs[layer].replace(".lora_A.", ".lora_B."), kind).float() * (lora.alpha / lora.rank)
        return fused(files.read(name), down.to(dtype), up.to(dtype), 1.0)

    return read


def _siblings(out: Path, ending: str) -> list[Path]:
    """What exports into `out` have beside it. No one else gives such a name to a folder."""
    name = re.compile(rf"{re.escape(out.name)}\.[0-9a-f]{{8}}\.{ending}")
    return [path for path in out.parent.glob("*") if name.fullmatch(path.name)]


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.{ending}")


@contextmanager
def _new_beside(out: Path) -> Iterator[Path]:
    """A new folder, which in the end is deleted or has been renamed."""
    partial = _beside(out, "partial")
    partial.mkdir(parents=True)
    try:
        with (partial / RECORD).open("w") as record:
            with suppress(OSError):  # a filesystem without locks: what a killed export leaves there stays
                fcntl.flock(record, fcntl.LOCK_EX)
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_dead(partial: Path) -> None:
    """Remove what an export left that was killed. One that is still being written has its record locked."""
    with suppress(OSError), (partial / RECORD).open("r+") as record:
        fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(partial, ignore_errors=True)


def _record(folder: Path, made_of: Mapping[str, Any]) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / RECORD]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / RECORD).write_text(json.dumps({**made_of, "files": sizes}, indent=2) + "\n")


def _there(out: Path) -> dict[str, Any] | None:
    """What the export in a folder is of; None: there is none, or files of it are gone or of another size."""
    try:
        made_of = read_json(out / RECORD)
        files = made_of.pop("files")
        return made_of if all((out / name).stat().st_size == size for name, size in files.items()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _about(out: Path) -> str:
    made_of = _there(out)
    return f" (an export of iteration {made_of['iteration']}, {made_of['weights']} weights)" if made_of else ""


def _move(partial: Path, out: Path, made_of: Mapping[str, Any], replace: bool) -> bool:
    """Give the finished folder its name. Returns False where another export has just put the same there."""
    try:
        if replace and out.exists():
            out.rename(_beside(out, "replaced"))
        partial.rename(out)
    except OSError:
        if _there(out) != made_of:
            raise
        return False
    return True


def _put_back(out: Path) -> None:
    """Undo the first half of a replacement whose second half never came, or end one that did."""
    for replaced in _siblings(out, "replaced"):
        if out.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(out)


def find_checkpoint(run: Path, which: str = "newest") -> Path:
    """A run's checkpoint: `newest`, `best` (by the run's `checkpoint.best`) or an iteration's. ValueError: no such.

    A checkpoint whose mark cannot be read is passed over, with a warning where it is newer than the best one.
    """
    paths = {int(path.stem.removeprefix("iteration-")): path for path in Checkpoints(run / CHECKPOINTS).all()}
    if not paths:
        raise ValueError(f"checkpoint: {run} has none yet")
    if which == "newest":
        return paths[max(paths)]
    if which == "best":
        return _best(run, [paths[iteration] for iteration in sorted(paths, reverse=True)])
    if not which.isdecimal() or int(which) not in paths:
        there = ", ".join(map(str, paths))
        raise ValueError(f"checkpoint: {run} has none of iteration {which}; there are newest, best and {there}")
    return paths[int(which)]


def _best(run: Path, newest_first: list[Path]) -> Path:
    unread: list[str] = []
    for path in newest_first:
        try:
            if is_best(path):
                if unread:
                    warnings.warn(f"checkpoint: {path} is the best of those that can be read; not {', '.join(unread)}",
                                  stacklevel=4)  # fmt: skip
                return path
        except ValueError as error:
            if path.exists():
                unread.append(f"{path.name} ({error})")
    more = f"; {', '.join(unread)} could not be read" if unread else ""
    raise ValueError(f"checkpoint: {run} has none marked as best; train with checkpoint.best=REWARD{more}")


@contextmanager
def open_checkpoint(run: Path, which: str = "newest") -> Iterator[CheckpointReader]:
    """`find_checkpoint`'s, which the run does not prune while it is open. ValueError: none, damaged or another run's.

    Where the run prunes it between the finding and the opening, the next one is taken.
    """
    with ExitStack() as stack:
        while True:
            path = find_checkpoint(run, which)
            try:
                stack.enter_context(held(path))
                break
            except ValueError:
                if path.exists():
                    raise
        reader = CheckpointReader(path)
        if reader.run != run_name(run):
            if (run / RUN_FILE).exists():
                raise ValueError(f"checkpoint: {path} is another run's; choose another")
            message = f"{run / RUN_FILE} is missing, which names the run; {path} is taken to be of it"
            warnings.warn(f"checkpoint: {message}", stacklevel=4)
        yield reader


def _rest(base: Path) -> list[Path]:
    """The folders of the parts that did not change."""
    return [base / part for part in family_of(base).parts if part != "transformer"]


def _check_room(where: Path, base: Path, like: Mapping[str, Tensor]) -> None:
    rest = sum(file.stat().st_size for part in _rest(base) for file in part.rglob("*"))
    needed = rest + sum(value.nbytes for value in like.values())
    if needed > (free := shutil.disk_usage(where).free):
        raise ValueError(f"export: {needed / 2**30:.1f} GiB are needed in {where.parent}, {free / 2**30:.1f} are free")


def _copy_rest(base: Path, out: Path) -> None:
    """Everything of the base but the transformer's weights: those did not change."""
    for part in _rest(base):
        shutil.copytree(part, out / part.name)
    (out / "transformer").mkdir()
    shutil.copy(base / "transformer" / "config.json", out / "transformer")
    shutil.copy(base / PIPELINE_INDEX, out)


def _write_transformer(
    out: Path, like: dict[str, Tensor], read: Callable[[str], Tensor], shard_bytes: int
) -> None:  # fmt: skip
    pattern = f"{_STEM}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(like, filename_pattern=pattern, max_shard_size=shard_bytes)
    bar = tqdm(total=len(like), desc="exporting", unit=" tensors", leave=False, dynamic_ncols=True)
    for file, names in split.filename_to_tensors.items():
        save_file({name: read(name) for name in names}, out / file, metadata={"format": "pt"})
        bar.update(len(names))
    bar.close()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / f"{_STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _licence(base: Path) -> dict[str, Any]:
    """The licence fields of the base's own model card."""
    card = base / "README.md"
    found = re.match(r"---\n(.*?)\n---\n", card.read_text(errors="replace"), re.DOTALL) if card.is_file() else None
    try:
        fields = yaml.safe_load(found.group(1)) if found else {}
    except (yaml.YAMLError, RecursionError):
        fields = {}
    if not isinstance(fields, dict):
        return {}
    return {key: value for key, value in fields.items() if key.startswith("license")}


def _write_card(
    run: Path, out: Path, base: Path, config: Config, reader: CheckpointReader, weights: str, fuse: bool
) -> None:
    licence, pipeline = _licence(base), family_of(base).pipeline.__name__
    lora = config.model.lora is not None and not fuse
    method = "E-GRPO (arXiv 2601.00423)" if config.method.name == "e_grpo" else f"`{config.method.name}`"
    front = {
        **(licence or {"license": "other", "license_name": "of-the-base-model"}),
        **({"base_model": config.model.path} if is_hub_id(config.model.path) else {}),
        "base_model_relation": "adapter" if lora else "finetune",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [
            pipeline.removesuffix("Pipeline").lower(),
            "reinforcement-learning",
            config.method.name.replace("_", "-"),
            *(["lora"] if lora else []),
        ],
    }
    licence_name = licence.get("license_name") or licence.get("license")
    message = f"its licence ({licence_name})" if licence_name else "its own licence"
    kept = config.model.quantization
    base_in = "" if kept == "none" else f", trained on the base in {kept}"
    adapters = f", low-rank adapters{base_in}" if lora else ", low-rank adapters fused into the base" if fuse else ""
    rewards = ", ".join(f"{reward.name} (weight {reward.weight:g})" for reward in config.rewards if reward.weight)
    evaluations = [line for line in RunLog.read(run) if any(key.startswith("held_out/") for key in line)]
    names = [key for key in evaluations[0] if key.startswith("held_out/")] if evaluations else []
    rows = [f"| {line['iteration']} | " + " | ".join(f"{line.get(k, float('nan')):.4f}" for k in names) + " |"
            for line in evaluations if line["iteration"] <= reader.iteration]  # fmt: skip
    table = ["| iteration | " + " | ".join(key.removeprefix("held_out/") for key in names) + " |",
             "| --- " * (len(names) + 1) + "|", *rows] if rows else ["No evaluation was recorded."]  # fmt: skip
    load = (
        f'pipe = {pipeline}.from_pretrained("{config.model.path}")\npipe.load_lora_weights("this folder")'
        if lora else f'pipe = {pipeline}.from_pretrained("this folder")'
    )  # fmt: skip
    curve = run / "curve.png"
    if curve.is_file():
        shutil.copy(curve, out)
    for licence_file in base.glob("LICENSE*"):
        shutil.copy(licence_file, out)
    (out / "README.md").write_text(
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"
        f"# {config.model.path}, trained on rewards\n\n"
        f"Trained with {method} by egrpo_fast {recorded(run, 'version') or ''}, commit "
        f"{recorded(run, 'commit') or 'unknown'}, for {reader.iteration} iterations on {rewards}. "
        f"Weights: {'as trained' if weights == 'model' else 'their moving average'}"
        f"{adapters}. It derives from `{config.model.path}` and is under {message}.\n\n"
        f"```python\nfrom diffusers import {pipeline}\n\n{load}\n```\n\n"
        f"## Rewards on held-out prompts\n\n" + "\n".join(table) + "\n\n"
        + ("![Rewards by iteration](curve.png)\n\n" if curve.is_file() else "")
        + f"## Settings\n\n```yaml\n{config.yaml()}```\n"
    )  # fmt: skip
