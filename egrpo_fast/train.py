"""The entry: `deepspeed egrpo_fast/train.py RECIPE [key.path=value ...]`."""

import os
import sys

if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    # Run as a script, Python puts this folder first on the path, where `noise`, `plan` or `ops` would shadow others.
    del sys.path[0]

import argparse
import importlib.util
import json
from typing import TYPE_CHECKING, Any

import yaml

from egrpo_fast import __version__
from egrpo_fast.config import Config, ConfigError, load_config, recipe_names
from egrpo_fast.shapes import PIPELINE, PROMPTS

if TYPE_CHECKING:
    from egrpo_fast.trainer import Trainer

CONFIG_FILE = "config.yaml"
EMBEDDED = "shapes"
"""As a path in a recipe: what ships with the package."""
RUN_FILE = "run.json"
MAY_CHANGE = {
    "resume", "iterations", "output_dir", "wandb", "evaluation.every", "checkpoint.every", "checkpoint.keep",
}  # fmt: skip
"""Settings that a resumed run may change."""


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {name: leaf for key in tree for name, leaf in _leaves(tree[key], f"{path}.{key}" if path else key).items()}


def check_output(config: Config, world_size: int) -> None:
    """ConfigError where output_dir cannot be written, holds another run, or holds none or another to resume."""
    folder = config.output_dir
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"output_dir: {there} is not a folder that can be written")
    if not config.resume:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"output_dir: {folder} is not empty; choose another, or resume=true to continue that run")
        return
    try:
        before = _leaves(yaml.safe_load((folder / CONFIG_FILE).read_text()))
        ranks = json.loads((folder / RUN_FILE).read_text())["world_size"]
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise ConfigError(f"resume: {folder} holds no run to continue ({' '.join(str(error).split())})") from None
    now = _leaves(config.model_dump(mode="json"))
    changed = [key for key in now | before if key not in MAY_CHANGE and now.get(key) != before.get(key)]
    if changed:
        raise ConfigError(f"{', '.join(changed)}: differs from the run in {folder}; a resumed run keeps its settings")
    if ranks != world_size:
        raise ConfigError(f"resume: the run in {folder} was made by {ranks} ranks, not {world_size}; start as many")


def check_ranks(config: Config, world_size: int) -> None:
    """ConfigError where the prompts of an iteration cannot be dealt evenly to the ranks and their wavefronts."""
    share = world_size * config.rollout.prompts_per_call
    if config.prompts.per_iteration % share:
        raise ConfigError(
            f"prompts.per_iteration: {config.prompts.per_iteration} is not a multiple of {share} "
            f"({world_size} ranks x rollout.prompts_per_call {config.rollout.prompts_per_call})"
        )


def make_trainer(config: Config) -> "Trainer":
    """Check everything that can be checked without weights, then load. ValueError: what the user must mend."""
    # DeepSpeed, diffusers and the rewards take seconds to import: a mistake in the settings is told before.
    from egrpo_fast.prompts import read_prompts

    files = {split: getattr(config.prompts, split) for split in PROMPTS}
    train_prompts, held_out_prompts = (
        read_prompts(PROMPTS[split] if file == EMBEDDED else file, f"prompts.{split}") for split, file in files.items()
    )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    check_output(config, world_size)
    check_ranks(config, world_size)
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb: not installed; pip install 'egrpo_fast[wandb]', or wandb=false")

    import torch

    from egrpo_fast.backbones.flux import FluxBackbone, check_folder
    from egrpo_fast.engine import World
    from egrpo_fast.rewards import check_reward, make_reward
    from egrpo_fast.trainer import Trainer

    model = config.model
    path = str(PIPELINE) if model.path == EMBEDDED else model.path
    check_folder(path, model.height, model.width)
    for reward in config.rewards:
        check_reward(reward.name, reward.options, [*train_prompts, *held_out_prompts], model.height, model.width)

    world = World()
    torch.manual_seed(config.seed)
    rewards = {reward.name: make_reward(reward.name, reward.options, world.device) for reward in config.rewards}
    backbone = FluxBackbone.from_pretrained(
        path, model.height, model.width, model.guidance, model.max_sequence_length,
        model.decode_batch, getattr(torch, model.dtype), world.device,
    )  # fmt: skip
    if model.vae_tiling:
        backbone.tile_decoding()
    if model.gradient_checkpointing:
        backbone.transformer.enable_gradient_checkpointing()
    if world.is_main and not config.resume:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        (config.output_dir / CONFIG_FILE).write_text(config.yaml())
        (config.output_dir / RUN_FILE).write_text(json.dumps({"version": __version__, "world_size": world.size}) + "\n")
    return Trainer(config, world, backbone, rewards, train_prompts, held_out_prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    recipes = ", ".join(recipe_names())
    parser.add_argument("recipe", nargs="?", default="shapes", help=f"a YAML file, or one of: {recipes}")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings of the recipe to change")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    try:
        trainer = make_trainer(load_config(arguments.recipe, arguments.overrides))
    except ValueError as error:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(1) from None  # every rank finds the same mistake; one tells
        raise SystemExit("\n".join(f"error: {line}" for line in str(error).splitlines())) from None
    trainer.train()
    trainer.world.close()


if __name__ == "__main__":
    main()
