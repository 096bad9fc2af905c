"""A run's checkpoint as a diffusers pipeline folder or LoRA file: no GPU, no DeepSpeed, a shard in memory at a time."""

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from egrpo_fast.backbones.flux_folder import PARTS, is_hub_id, resolve, save_lora
from egrpo_fast.backbones.identity import check_base
from egrpo_fast.backbones.weight_files import WeightFiles
from egrpo_fast.checkpoint import CheckpointReader, Checkpoints
from egrpo_fast.config import CHECKPOINTS, CONFIG_FILE, RUN_FILE, Config, load_config
from egrpo_fast.files import follow_umask
from egrpo_fast.metrics import RunLog
from egrpo_fast.shapes import pipeline_path

SHARD_BYTES = 5 * 2**30
KINDS = {"model": "weight", "ema": "ema"}
_STEM = "diffusion_pytorch_model"


def export(
    run: Path, out: Path, weights: Literal["model", "ema"] = "model", checkpoint: Path | None = None,
    shard_bytes: int = SHARD_BYTES, replace: bool = False,
) -> None:  # fmt: skip
    """What `FluxPipeline.from_pretrained(out)` loads, or `load_lora_weights(out)` for a LoRA run, with a model card.

    weights: as trained, or their moving average. checkpoint: one of the run's; None: the newest. replace: an earlier
    export in `out`, once this one is whole. Written beside and renamed: `out` is whole or as it was; killed between two
    renames, as it was once this is called again. ValueError: no run, no such checkpoint or average, `out` in the way,
    no room, another base than the run began with; adapters are written all the same, with a warning.
    """
    partial, replaced = (out.with_name(out.name + suffix) for suffix in (".partial", ".replaced"))
    if not (run / CONFIG_FILE).is_file():
        raise ValueError(f"export: {run} holds no run ({CONFIG_FILE} is missing)")
    _put_back(replaced, out)
    if out.exists() and not (out.is_dir() and (replace or not any(out.iterdir()))):
        raise ValueError(f"export: {out} is in the way; choose another folder")
    config = load_config(str(run / CONFIG_FILE))
    reader = CheckpointReader(checkpoint or find_checkpoint(run))
    kind = KINDS[weights]
    if kind not in reader.kinds():
        raise ValueError(f"export: {reader.path} holds no {weights} weights; train with optimizer.ema_decay for them")
    dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
    base = resolve(pipeline_path(config.model.path))
    try:
        check_base(run, base)
    except ValueError as error:
        if config.model.lora is None:
            raise
        warnings.warn(f"{error}; the adapters fit that one alone", stacklevel=2)

    def read(name: str) -> Tensor:
        return reader.tensor(name, kind).to(dtype)

    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if config.model.lora is not None:
            save_lora(partial, {name: read(name) for name in reader.names(kind)}, config.model.lora)
        else:
            shapes = {name: reader.shape(name, kind) for name in reader.names(kind)}
            WeightFiles(base / "transformer").check(shapes)
            _check_room(partial, base, shapes, dtype)
            _copy_rest(base, partial)
            _write_transformer(partial / "transformer", shapes, dtype, read, shard_bytes)
        _write_card(run, partial, base, config, reader, weights)
        follow_umask(partial)
        if out.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            out.rename(replaced)
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"export: {out} could not be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _put_back(replaced, out)


def _put_back(replaced: Path, out: Path) -> None:
    """Undo the first half of a replacement whose second half never came."""
    if replaced.exists() and not out.exists():
        replaced.rename(out)


def find_checkpoint(run: Path, which: str = "newest") -> Path:
    """A run's checkpoint: `newest`, `best` (by the run's `checkpoint.best`) or an iteration's. ValueError: no such."""
    paths = {int(path.stem.removeprefix("iteration-")): path for path in Checkpoints(run / CHECKPOINTS).all()}
    if not paths:
        raise ValueError(f"checkpoint: {run} has none yet")
    if which == "newest":
        return paths[max(paths)]
    if which == "best":
        best = [iteration for iteration, path in paths.items() if CheckpointReader(path).best]
        if not best:
            raise ValueError(f"checkpoint: {run} has none marked as best; train with checkpoint.best=REWARD")
        return paths[max(best)]
    if not which.isdecimal() or int(which) not in paths:
        there = ", ".join(map(str, paths))
        raise ValueError(f"checkpoint: {run} has none of iteration {which}; there are newest, best and {there}")
    return paths[int(which)]


def _check_room(where: Path, base: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    rest = sum(f.stat().st_size for part in PARTS if part != "transformer" for f in (base / part).rglob("*"))
    needed = rest + sum(map(math.prod, shapes.values())) * dtype.itemsize
    if needed > (free := shutil.disk_usage(where).free):
        raise ValueError(f"export: {needed / 2**30:.1f} GiB are needed in {where.parent}, {free / 2**30:.1f} are free")


def _copy_rest(base: Path, out: Path) -> None:
    """Everything of the base but the transformer's weights: those did not change."""
    for part in PARTS:
        if part != "transformer":
            shutil.copytree(base / part, out / part)
    (out / "transformer").mkdir()
    shutil.copy(base / "transformer" / "config.json", out / "transformer")
    shutil.copy(base / "model_index.json", out)


def _write_transformer(
    out: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, read: Callable[[str], Tensor],
    shard_bytes: int,
) -> None:  # fmt: skip
    like = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    pattern = f"{_STEM}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(like, filename_pattern=pattern, max_shard_size=shard_bytes)
    bar = tqdm(total=len(shapes), desc="exporting", unit=" tensors", dynamic_ncols=True)
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
    except yaml.YAMLError:
        fields = {}
    if not isinstance(fields, dict):
        return {}
    return {key: value for key, value in fields.items() if key.startswith("license")}


def _write_card(run: Path, out: Path, base: Path, config: Config, reader: CheckpointReader, weights: str) -> None:
    made_by = json.loads((run / RUN_FILE).read_text()) if (run / RUN_FILE).is_file() else {}
    licence = _licence(base)
    lora = config.model.lora is not None
    method = "E-GRPO (arXiv 2601.00423)" if config.method.name == "e_grpo" else f"`{config.method.name}`"
    front = {
        **(licence or {"license": "other", "license_name": "of-the-base-model"}),
        **({"base_model": config.model.path} if is_hub_id(config.model.path) else {}),
        "base_model_relation": "adapter" if lora else "finetune",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["flux", "reinforcement-learning", config.method.name.replace("_", "-"), *(["lora"] if lora else [])],
    }
    licence_name = licence.get("license_name") or licence.get("license")
    told = f"its licence ({licence_name})" if licence_name else "its own licence"
    rewards = ", ".join(f"{reward.name} (weight {reward.weight:g})" for reward in config.rewards if reward.weight)
    evaluations = [line for line in RunLog.read(run) if any(key.startswith("held_out/") for key in line)]
    names = [key for key in evaluations[0] if key.startswith("held_out/")] if evaluations else []
    rows = [f"| {line['iteration']} | " + " | ".join(f"{line.get(k, float('nan')):.4f}" for k in names) + " |"
            for line in evaluations if line["iteration"] <= reader.iteration]  # fmt: skip
    table = ["| iteration | " + " | ".join(key.removeprefix("held_out/") for key in names) + " |",
             "| --- " * (len(names) + 1) + "|", *rows] if rows else ["No evaluation was recorded."]  # fmt: skip
    load = (
        f'pipe = FluxPipeline.from_pretrained("{config.model.path}")\npipe.load_lora_weights("this folder")'
        if lora else 'pipe = FluxPipeline.from_pretrained("this folder")'
    )  # fmt: skip
    curve = run / "curve.png"
    if curve.is_file():
        shutil.copy(curve, out)
    for licence_file in base.glob("LICENSE*"):
        shutil.copy(licence_file, out)
    (out / "README.md").write_text(
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"
        f"# {config.model.path}, trained on rewards\n\n"
        f"Trained with {method} by egrpo_fast {made_by.get('version', '')}, commit "
        f"{made_by.get('commit') or 'unknown'}, for {reader.iteration} iterations on {rewards}. "
        f"Weights: {'as trained' if weights == 'model' else 'their moving average'}"
        f"{', low-rank adapters' if lora else ''}. It derives from `{config.model.path}` and is under {told}.\n\n"
        f"```python\nfrom diffusers import FluxPipeline\n\n{load}\n```\n\n"
        f"## Rewards on held-out prompts\n\n" + "\n".join(table) + "\n\n"
        + ("![Rewards by iteration](curve.png)\n\n" if curve.is_file() else "")
        + f"## Settings\n\n```yaml\n{config.yaml()}```\n"
    )  # fmt: skip
