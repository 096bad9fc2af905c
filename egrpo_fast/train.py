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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from egrpo_fast import __version__
from egrpo_fast.config import Config, ConfigError, load_config
from egrpo_fast.config.recipe_files import recipe_names
from egrpo_fast.files import is_hub_id
from egrpo_fast.runs.folder import check_adapters, check_output, claim_output, identify, keep_inputs, record
from egrpo_fast.shapes import PROMPTS, pipeline_path
from egrpo_fast.terminal import error_lines, keep_clean, printable, steady_streams

if TYPE_CHECKING:
    from torch import Tensor, nn

    from egrpo_fast.distributed.heartbeat import Heartbeat
    from egrpo_fast.distributed.world import World
    from egrpo_fast.folder_lock import Claim
    from egrpo_fast.policy import Policy
    from egrpo_fast.rewards import Reward
    from egrpo_fast.runs.metrics import Work
    from egrpo_fast.trainer import Callbacks, TrainingLoop

log = logging.getLogger(__name__)

DOWNLOAD_LIMIT = 24 * 3600.0
"""Seconds that finding a model may take: a hub id is downloaded first."""


def check_ranks(config: Config, world_size: int) -> None:
    """ConfigError where the prompts of an iteration cannot be dealt evenly to the ranks and their wavefronts."""
    share = world_size * config.rollout.prompts_per_rollout
    if config.prompts.per_iteration % share:
        raise ConfigError(
            f"prompts.per_iteration: {config.prompts.per_iteration} is not a multiple of {share} "
            f"({world_size} ranks x rollout.prompts_per_rollout {config.rollout.prompts_per_rollout})"
        )


MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where mpirun and srun say how many processes they started; which of them each is, torch reads elsewhere."""


def check_launcher() -> None:
    """ConfigError where this is one of several processes that do not know of each other: each would train alone."""
    started = next((name for name in MPI_SIZES if os.environ.get(name, "1") != "1"), None)
    if started and "RANK" not in os.environ:
        message = "set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or start by `egrpo train` or torchrun"
        raise ConfigError(f"{started}: {os.environ[started]} processes were started without ranks; {message}")


def check_inputs(config: Config) -> "tuple[Sequence[str], Sequence[str], Policy | None]":
    """Everything that can be checked without weights and other ranks: ValueError names what the user must mend.

    Returns the training and the held-out prompts, and the policy on the meta device; None: it has to be downloaded.
    """
    # DeepSpeed, diffusers and the rewards take seconds to import: a mistake in the settings is reported before.
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
    from egrpo_fast.models.quantization import check_quantization
    from egrpo_fast.policy import Policy
    from egrpo_fast.rewards import check_reward

    check_quantization(config.model.quantization)
    try:
        ops.choose(config.rollout.backend, "cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise ConfigError(f"rollout.{error}") from None
    model, path = config.model, pipeline_path(config.model.path)
    policy = None if is_hub_id(path) else Policy.of(config, Path(path))
    for reward in config.rewards:
        for prompts in (train_prompts, held_out_prompts):
            check_reward(reward.name, reward.options, prompts, model.height, model.width)
    return train_prompts, held_out_prompts, policy


def open_rewards(config: Config, world: "World", heart: "Heartbeat", prompt: str) -> "dict[str, Reward]":
    """Load every reward and call it once. ConfigError, on all ranks, where that fails on one.

    First of all that is loaded: a mistake in a reward is found before the minutes that a model takes. Where
    `objective.on_error` is `drop`, a reward may raise for an image that it cannot judge, so that is only a warning.
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
                warnings.warn(f"{error.trace}{error}, called on an image of noise", stacklevel=2)
    except ValueError as error:
        failure = str(error), getattr(error, "trace", "")
    if failures := [(rank, *one) for rank, one in enumerate(world.gather(failure)) if one]:
        rank, message, trace = failures[0]
        if world.is_main:
            print(printable(trace), end="", file=sys.stderr)
        raise ConfigError(message if len(failures) == world.size else f"rank {rank}: {message}")
    return rewards


def count_work(config: Config, world: "World") -> "Work":
    """What an iteration computes, by the planner, and its GPU's peak in bfloat16, where it is one of the planner's."""
    import torch

    from egrpo_fast.commands.cluster import GPUS, Cluster
    from egrpo_fast.commands.cost import Cost
    from egrpo_fast.runs.metrics import Work

    cost = Cost(config, Cluster(world.size))
    flops = sum(cost.flops[part] for part in ("rollout", "update", "decode")) * cost.prompts
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    found = [gpu.flops for kind, gpu in GPUS.items() if kind in name.replace(" ", "")]
    peak = found[0] if found and config.model.dtype == "bfloat16" else None
    return Work(config.prompts.per_iteration * len(cost.plan.image_rows), flops, peak)


def make_trainer(
    config: Config,
    world: "World",
    heart: "Heartbeat",
    train_prompts: Sequence[str],
    held_out_prompts: Sequence[str],
    policy: "Policy | None",
    claim: "Claim | None" = None,
    callbacks: "Callbacks | None" = None,
) -> "TrainingLoop":
    """Load everything, then record the run in its folder. ValueError: what the user must mend.

    policy: from `check_inputs`. claim: of the folder; None: nobody else writes there, and its checkpoints are this
    run's. callbacks: what it calls.
    """
    import torch

    from egrpo_fast.distributed.loading import materialize
    from egrpo_fast.distributed.signals import Interruption
    from egrpo_fast.models.folder import resolve, with_times
    from egrpo_fast.models.lora import describe, linear_layers
    from egrpo_fast.models.quantization import weight_takers
    from egrpo_fast.models.tail import slow_tail, with_local_tail
    from egrpo_fast.policy import Policy
    from egrpo_fast.runs.inputs import of_files, of_rewards
    from egrpo_fast.runs.provenance import commit
    from egrpo_fast.trainer import Callbacks, TrainingLoop

    interruption = Interruption(config.guards.stop_seconds)
    torch.manual_seed(config.seed)  # nothing here draws from it; a user's reward may
    rewards = open_rewards(config, world, heart, train_prompts[0])
    heart.at("finding", config.model.path, limit=DOWNLOAD_LIMIT)
    policy = policy or Policy.of(config, resolve(pipeline_path(config.model.path)))
    config = with_times(config, policy.folder)
    if config.tail.path is not None:
        heart.at("finding", config.tail.path, limit=DOWNLOAD_LIMIT)
    local = with_local_tail(config)
    if is_hub_id(config.tail.path or ""):
        policy.use_tail(local.tail)
    if world.is_main and (advice := slow_tail(config)):
        warnings.warn(advice, stacklevel=2)
    base = identify(config, policy.folder, world)
    package = f"{__version__} {commit()}"
    inputs = keep_inputs(
        config, lambda: of_files(local, train_prompts, held_out_prompts, package) | of_rewards(rewards), world
    )
    if policy.lora is not None:
        config = config.with_lora(policy.lora)
        if config.resume:
            check_adapters(config, linear_layers(policy.transformer))
        if world.is_main:
            print(describe(policy.lora, policy.transformer))

    def fill(transformer: "nn.Module", read: "Callable[[str], Tensor]") -> None:
        loaded = materialize(transformer, read, config, world, heart, weight_takers(transformer, world.device))
        if world.is_main:
            print(f"rank 0: {loaded}")
        else:
            log.info("rank %d: %s", world.rank, loaded)  # shown by --verbose

    prompts = {"prompts.train": train_prompts, "prompts.held_out": held_out_prompts}
    policy.load(world.device, fill, prompts, tell=world.is_main)
    heart.at("loading", "the tail's model")
    policy.load_tail(world.device)
    trainer = TrainingLoop(
        config, world, heart, policy, rewards, interruption, train_prompts, held_out_prompts, claim,
        callbacks or Callbacks(), count_work(config, world) if world.is_main else None,
    )  # fmt: skip
    problem = ""
    if world.is_main:
        try:  # last: a run that was refused leaves none in its folder
            record(config, base, inputs, world.size, claim.run if claim else "")
        except ConfigError as error:
            problem = str(error)
    if problem := world.broadcast(problem):
        raise ConfigError(problem)
    return trainer


def run(config: Config, callbacks: "Callbacks | None" = None) -> "tuple[TrainingLoop, int]":
    """Train. Returns the loop, and the signal that asked it to end early; 0: none did.

    ValueError: what the user must mend; of its kinds, RewardError where a reward fails, perhaps on this rank alone.
    """
    checked = check_inputs(config)
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
                loop = make_trainer(config, world, heart, *checked, claim, callbacks)
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
