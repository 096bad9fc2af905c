"""What every rank runs: `egrpo train` starts it, or `deepspeed egrpo_fast/train.py RECIPE [key.path=value ...]`."""

import os
import sys

if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    # Run as a script, Python puts this folder first on the path, where `noise`, `plan` or `ops` would shadow others.
    del sys.path[0]

import argparse
import importlib.util
import logging
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from egrpo_fast import __version__
from egrpo_fast.config import Config, ConfigError, load_config
from egrpo_fast.config.recipe_files import recipe_names
from egrpo_fast.runs.folder import check_adapters, check_output, claim_output, identify, keep_inputs, record
from egrpo_fast.shapes import PROMPTS, pipeline_path
from egrpo_fast.terminal import error_lines, keep_clean, printable, steady_streams

if TYPE_CHECKING:
    from egrpo_fast.distributed.heartbeat import Heartbeat
    from egrpo_fast.distributed.world import World
    from egrpo_fast.folder_lock import Claim
    from egrpo_fast.rewards import Reward
    from egrpo_fast.trainer import Callbacks, TrainingLoop

log = logging.getLogger(__name__)

DOWNLOAD_LIMIT = 24 * 3600.0
"""Seconds that finding a model may take: a hub id is downloaded first."""


def check_ranks(config: Config, world_size: int) -> None:
    """ConfigError where the prompts of an iteration cannot be dealt evenly to the ranks and their wavefronts."""
    share = world_size * config.rollout.prompts_per_call
    if config.prompts.per_iteration % share:
        raise ConfigError(
            f"prompts.per_iteration: {config.prompts.per_iteration} is not a multiple of {share} "
            f"({world_size} ranks x rollout.prompts_per_call {config.rollout.prompts_per_call})"
        )


MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where mpirun and srun say how many processes they started; which of them each is, torch reads elsewhere."""


def check_launcher() -> None:
    """ConfigError where this is one of several processes that do not know of each other: each would train alone."""
    started = next((name for name in MPI_SIZES if os.environ.get(name, "1") != "1"), None)
    if started and "RANK" not in os.environ:
        told = "set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or start by `egrpo train` or torchrun"
        raise ConfigError(f"{started}: {os.environ[started]} processes were started without ranks; {told}")


def check_inputs(config: Config) -> tuple[Sequence[str], Sequence[str]]:
    """Everything that can be checked without weights and other ranks: ValueError names what the user must mend.

    Returns the training and the held-out prompts.
    """
    # DeepSpeed, diffusers and the rewards take seconds to import: a mistake in the settings is told before.
    from egrpo_fast.prompts.files import read_split

    with warnings.catch_warnings():
        if os.environ.get("RANK", "0") != "0":
            warnings.simplefilter("ignore")  # every rank reads the same files; one tells
        train_prompts, held_out_prompts = (
            read_split(getattr(config.prompts, split), split, config.prompts.column) for split in PROMPTS
        )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    check_launcher()
    check_output(config)
    check_ranks(config, world_size)
    if config.optimizer.name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("optimizer.name: adamw8bit needs bitsandbytes; pip install 'egrpo_fast[quantized]'")
    if config.deepspeed.overrides:
        from egrpo_fast.distributed.engine import check_overrides

        check_overrides(config)
    if (folder := config.deepspeed.nvme_path) and not os.access(folder, os.W_OK):
        raise ConfigError(f"deepspeed.nvme_path: {folder} is not a folder that can be written")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb: not installed; pip install 'egrpo_fast[wandb]', or wandb=false")

    import torch

    from egrpo_fast import ops
    from egrpo_fast.models.flux.folder import check_folder, check_lora
    from egrpo_fast.models.flux.forward import check_attention
    from egrpo_fast.models.tail import check_tail
    from egrpo_fast.rewards import check_reward

    try:
        ops.choose(config.rollout.backend, "cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise ConfigError(f"rollout.{error}") from None
    check_attention(config.model.attention)
    model, path = config.model, pipeline_path(config.model.path)
    check_folder(path, model.height, model.width)
    check_lora(model.lora, path)
    check_tail(config, path)
    for reward in config.rewards:
        for prompts in (train_prompts, held_out_prompts):
            check_reward(reward.name, reward.options, prompts, model.height, model.width)
    return train_prompts, held_out_prompts


def open_rewards(config: Config, world: "World", heart: "Heartbeat", prompt: str) -> "dict[str, Reward]":
    """Load every reward and call it once. ConfigError, on all ranks, where that fails on one.

    First of all that is loaded: a mistake in a reward is told before the minutes that a model takes. Where
    `objective.on_error` is `drop`, a reward may raise for a picture that it cannot judge, so that is only a warning.
    """
    from egrpo_fast.rewards import RewardError, make_reward, try_reward

    rewards, failure = {}, None
    try:
        for reward in config.rewards:
            heart.at("loading", f"the reward {reward.name}", limit=DOWNLOAD_LIMIT)
            rewards[reward.name] = made = make_reward(reward.name, reward.options, world.device)
            try:
                try_reward(reward.name, made, prompt, config.model.height, config.model.width, world.device)
            except RewardError as error:
                if config.objective.on_error != "drop":
                    raise
                warnings.warn(f"{error.trace}{error}, called on a picture of noise", stacklevel=2)
    except ValueError as error:
        failure = str(error), getattr(error, "trace", "")
    if failures := [(rank, *one) for rank, one in enumerate(world.gather(failure)) if one]:
        rank, message, trace = failures[0]
        if world.is_main:
            print(printable(trace), end="", file=sys.stderr)
        raise ConfigError(message if len(failures) == world.size else f"rank {rank}: {message}")
    return rewards


def make_trainer(
    config: Config,
    world: "World",
    heart: "Heartbeat",
    train_prompts: Sequence[str],
    held_out_prompts: Sequence[str],
    claim: "Claim | None" = None,
    callbacks: "Callbacks | None" = None,
) -> "TrainingLoop":
    """Load everything, then record the run in its folder. ValueError: what the user must mend.

    claim: of the folder; None: nobody else writes there, and its checkpoints are this run's. callbacks: what it calls.
    """
    import torch

    from egrpo_fast.distributed.loading import materialize
    from egrpo_fast.distributed.signals import Interruption
    from egrpo_fast.files import is_hub_id
    from egrpo_fast.models.flux.backbone import FluxBackbone
    from egrpo_fast.models.flux.folder import check_folder, meta_transformer, resolve
    from egrpo_fast.models.flux.forward import CompiledFlux, use_arithmetic, use_attention
    from egrpo_fast.models.flux.text import CachedText, open_text, tell_truncated
    from egrpo_fast.models.lora import describe, linear_layers
    from egrpo_fast.models.tail import TailModel, check_tail, slow_tail, with_local_tail
    from egrpo_fast.runs.inputs import of_files, of_rewards
    from egrpo_fast.runs.provenance import commit
    from egrpo_fast.trainer import Callbacks, TrainingLoop

    model = config.model
    interruption = Interruption(config.guards.stop_seconds)
    torch.manual_seed(config.seed)  # nothing here draws from it; a user's reward may
    use_arithmetic(model)
    rewards = open_rewards(config, world, heart, train_prompts[0])
    heart.at("finding", config.model.path, limit=DOWNLOAD_LIMIT)
    folder = resolve(pipeline_path(model.path))
    if config.tail.path is not None:
        heart.at("finding", config.tail.path, limit=DOWNLOAD_LIMIT)
    local = with_local_tail(config)
    if is_hub_id(model.path):  # a folder has been looked at by `check_inputs`
        check_folder(str(folder), model.height, model.width)
    if is_hub_id(model.path) or is_hub_id(config.tail.path or ""):
        check_tail(local, str(folder))
    if world.is_main and (advice := slow_tail(config)):
        warnings.warn(advice, stacklevel=2)
    base = identify(config, folder, world)
    package = f"{__version__} {commit()}"
    inputs = keep_inputs(
        config, lambda: of_files(local, train_prompts, held_out_prompts, package) | of_rewards(rewards), world
    )
    transformer, weights = meta_transformer(folder, model.lora, config.seed)
    if weights.lora is not None:
        config = config.with_lora(weights.lora)
        if config.resume:
            check_adapters(config, linear_layers(transformer))
        if world.is_main:
            print(describe(weights.lora, transformer))
    use_attention(transformer, model.attention)
    compiled = CompiledFlux.of(transformer) if config.rollout.compile else None
    text = open_text(config, folder, world.device)
    for split, prompts in (("train", train_prompts), ("held_out", held_out_prompts)):
        if isinstance(text, CachedText):
            text.require(prompts, f"prompts.{split}")
        elif world.is_main:
            tell_truncated(text, prompts, f"prompts.{split}")
    loaded = materialize(transformer, weights, config, world, heart)
    weights.files.close()
    if world.is_main:
        print(f"rank 0: {loaded}")
    else:
        log.info("rank %d: %s", world.rank, loaded)  # shown by --verbose
    backbone = FluxBackbone.of(config, folder, transformer, text, world.device)
    heart.at("loading", "the tail's model")
    tail_model = TailModel.of(local, folder, backbone, getattr(torch, model.dtype), world.device)
    if model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    trainer = TrainingLoop(
        config, world, heart, backbone, rewards, interruption, train_prompts, held_out_prompts, compiled, tail_model,
        claim, callbacks or Callbacks(),
    )  # fmt: skip
    problem = ""
    if world.is_main:
        try:  # last: a run that was refused leaves none in its folder
            record(config, base, inputs, world.size, claim.run if claim else "")
        except ConfigError as error:
            problem = str(error)
    if problem := world.from_main(problem):
        raise ConfigError(problem)
    return trainer


def run(config: Config, callbacks: "Callbacks | None" = None) -> "tuple[TrainingLoop, int]":
    """Train. Returns the loop, and the signal that asked it to end early; 0: none did.

    ValueError: what the user must mend; of its kinds, RewardError where a reward fails, perhaps on this rank alone.
    """
    prompts = check_inputs(config)
    from egrpo_fast.distributed.heartbeat import Heartbeat, group_store
    from egrpo_fast.distributed.world import World
    from egrpo_fast.rewards import RewardError

    world = World(timeout=2 * max(config.guards.stall_seconds, config.deepspeed.init_timeout))
    heart = Heartbeat(world.rank, world.size, group_store(), config.guards.stall_seconds)
    done = False
    try:
        with heart:
            config, claim, held = claim_output(config, world)
            with held or nullcontext():
                loop = make_trainer(config, world, heart, *prompts, claim, callbacks)
                try:
                    asked = loop.train()
                except RewardError:
                    raise
                except ValueError as error:  # not the user's any more: with where it came from
                    raise RuntimeError(f"training failed: {error}") from error
        done = True
    except RewardError as error:
        raise RewardError(f"rank {world.rank}: {error}", error.trace) from None
    finally:
        if done or world.size == 1:  # where a rank of several failed, the others may never come to close it
            world.close()
    return loop, asked


def main() -> None:
    steady_streams()
    parser = argparse.ArgumentParser(description=__doc__)
    recipes = ", ".join(recipe_names())
    parser.add_argument("recipe", nargs="?", default="shapes", help=f"a YAML file, or one of: {recipes}")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings of the recipe to change")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("--verbose", action="store_true", help="show also what DeepSpeed, torch and others print")
    arguments = parser.parse_args()
    keep_clean(arguments.verbose)
    try:
        _, asked = run(load_config(arguments.recipe, arguments.overrides))
    except ValueError as error:
        from egrpo_fast.rewards import RewardError

        alone = isinstance(error, RewardError) and str(error).startswith("rank ")
        if os.environ.get("LOCAL_RANK", "0") != "0" and not alone:
            raise SystemExit(1) from None  # every rank of a machine finds the same mistake; one tells
        raise SystemExit(error_lines(error)) from None
    from egrpo_fast.distributed.signals import EXIT_CODES

    raise SystemExit(EXIT_CODES.get(asked, 0))


if __name__ == "__main__":
    main()
