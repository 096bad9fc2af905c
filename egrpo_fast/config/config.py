"""The whole configuration: its sections together, and what they refuse in each other."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, PrivateAttr, SerializeAsAny, model_validator

from egrpo_fast.config.recipe_files import ConfigError, Tree, write_yaml
from egrpo_fast.config.sections import (
    OWN_ETA,
    OWNED_BY_US,
    CheckpointConfig,
    DeepSpeedConfig,
    EvaluationConfig,
    GuardsConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PromptsConfig,
    RewardConfig,
    RolloutConfig,
    SamplesConfig,
    ScheduleConfig,
    TailConfig,
    _as_written,
    _path,
)
from egrpo_fast.methods import MERGING, METHODS, OPTIONAL, Method, Run
from egrpo_fast.plan import Plan, PlanTooLargeError
from egrpo_fast.schedule import Schedule, make_schedule
from egrpo_fast.section import Positive, Section


def _method(given: Any) -> Any:
    """The section of the method that is named, from its settings."""
    if not isinstance(given, dict):
        return given
    name = given.get("name", "e_grpo")
    if not isinstance(name, str) or name not in METHODS:
        message = f"{name!r} is no method; there are: {', '.join(map(repr, sorted(METHODS)))}"
        raise ValueError(f"{message}; one of your own is known once its file is imported")
    return METHODS[name].model_validate(given)


class Config(Section):
    """A whole run."""

    output_dir: Annotated[
        Path, BeforeValidator(_path), PlainSerializer(_as_written, when_used="json"), Field(strict=False)
    ]
    """Where the run writes; must not hold another run unless `resume`."""
    resume: bool = False
    """Continue the run in output_dir from its newest checkpoint; where there is no run yet, begin it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of noise, prompt order and everything else."""
    iterations: Positive = 300
    """Training iterations."""
    wandb: bool = False
    """Also log to Weights & Biases (the `wandb` extra)."""
    model: ModelConfig
    prompts: PromptsConfig
    method: Annotated[SerializeAsAny[Method], BeforeValidator(_method)] = METHODS["e_grpo"](name="e_grpo")
    """The method, `e_grpo` where none is given; its name alone will do where it keeps its defaults."""
    schedule: ScheduleConfig = ScheduleConfig()
    rollout: RolloutConfig = RolloutConfig()
    tail: TailConfig = TailConfig()
    rewards: list[RewardConfig] = Field(min_length=1)
    """Rewards; those of weight 0 are scored in evaluations only."""
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    samples: SamplesConfig = SamplesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardsConfig = GuardsConfig()
    _times: tuple[float, ...] | None = PrivateAttr(None)
    """The grid that `schedule.shift: auto` stands for."""

    @model_validator(mode="before")
    @classmethod
    def _with_the_methods_own_defaults(cls, tree: Any) -> Any:
        """Spells out the method's name, and the form and scale of the noise that it comes with."""
        if not isinstance(tree, dict):
            return tree
        method, schedule = tree.get("method", "e_grpo"), tree.get("schedule", {})
        method = {"name": method} if isinstance(method, str) else method
        if not isinstance(method, dict) or not isinstance(schedule, dict):
            return tree
        method = {"name": "e_grpo", **method}
        kind = METHODS.get(str(method["name"]), Method)
        theirs = {field for other in METHODS.values() for field in other.model_fields}
        if kind is not Method and (unused := sorted(theirs.intersection(method) - kind.model_fields.keys())):
            message = ", ".join(f"method.{field}" for field in unused)
            raise ValueError(f"{message}: not used by method {method['name']}; leave it out")
        form = schedule.get("sde_form", kind.sde_form)
        own = {"sde_form": form, "eta": OWN_ETA.get(str(form), 0.7)}
        return tree | {"method": method, "schedule": own | schedule}

    @model_validator(mode="after")
    def _fits_the_method(self) -> "Config":
        method = self.method
        if unused := self._unused():
            raise ValueError(f"{', '.join(unused)}: not used by method {method.name}; leave it out")
        for field, value in (("rollout.group_size", self.rollout.group_size), ("tail.stride", self.tail.stride)):
            if isinstance(value, list) and "schedule.active_steps" not in method.uses:
                raise ValueError(f"{field}: one number for all steps with method {method.name}")
        method.check(self.schedule.num_steps)
        return self

    def _unused(self, given: bool = True) -> list[str]:
        """The settings of OPTIONAL that the method does not use; with `given`, those that were given."""
        names = sorted(OPTIONAL - self.method.uses)
        if not given:
            return names
        sections = {"schedule": self.schedule, "rollout": self.rollout, "tail": self.tail}
        return [n for n in names if n.partition(".")[2] in sections[n.partition(".")[0]].model_fields_set]

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        schedule, steps = self.schedule, self.schedule.num_steps
        owned = sorted(OWNED_BY_US & set(self.deepspeed.overrides))
        if owned:
            raise ValueError(f"deepspeed.overrides: {', '.join(owned)} follow from this configuration; set them there")
        zero_keys = self.deepspeed.overrides.get("zero_optimization", {})
        if not isinstance(zero_keys, dict):
            raise ValueError("deepspeed.overrides: zero_optimization must be a mapping")
        if owned := sorted({"stage", "offload_optimizer", "offload_param", "mics_shard_size"} & set(zero_keys)):
            message = "deepspeed.zero_stage and deepspeed.offload_* say it; MiCS is not supported"
            raise ValueError(f"deepspeed.overrides: zero_optimization.{owned[0]}: {message}")
        active = schedule.active_steps
        if active is not None:
            if max(active) >= steps:
                raise ValueError(f"schedule.active_steps: {max(active)} is past the end; allowed: 0 to {steps - 1}")
            if sorted(set(active)) != active:
                raise ValueError(f"schedule.active_steps: {active} must be increasing, without repeats")
        merges = schedule.merge_lengths
        if isinstance(merges, list):
            if len(merges) != steps:
                raise ValueError(f"schedule.merge_lengths: {len(merges)} numbers, one per grid step needed ({steps})")
            for index, length in enumerate(merges):
                if index + length > steps:
                    raise ValueError(
                        f"schedule.merge_lengths: step {index} merged over {length} passes the end; "
                        f"at most {steps - index} there"
                    )
        if isinstance(merges, int):
            reach = steps - (max(active) if active is not None else steps // 2 - 1)
            if merges > reach:
                message = f"{merges} passes the end from the last active step; at most {reach}"
                raise ValueError(f"schedule.merge_lengths: {message}")
        if merges is not None and schedule.max_merge is not None:
            raise ValueError("schedule.max_merge: caps the threshold's merges; not allowed beside merge_lengths")
        for field, value in (("rollout.group_size", self.rollout.group_size), ("tail.stride", self.tail.stride)):
            if isinstance(value, list) and len(value) != self._num_active:
                raise ValueError(f"{field}: {len(value)} numbers, one per active step needed ({self._num_active})")
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: at least one needs a weight other than 0")
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards: {names} names one twice")
        if (rule := self.evaluation.stop_when) is not None:
            if rule.reward not in names:
                raise ValueError(f"evaluation.stop_when.reward: {rule.reward!r} is none of rewards: {', '.join(names)}")
            if not any(reward.weight for reward in self.rewards if reward.name != rule.reward):
                raise ValueError(f"evaluation.stop_when.reward: nothing but {rule.reward!r} is trained on")
            if not self.evaluation.every:
                raise ValueError("evaluation.stop_when: nothing to watch with evaluation.every 0")
        if self.checkpoint.best is not None and self.checkpoint.best not in names:
            message = f"{self.checkpoint.best!r} is none of rewards: {', '.join(names)}"
            raise ValueError(f"checkpoint.best: {message}")
        zero = self.deepspeed
        if "nvme" in (zero.offload_optimizer, zero.offload_param) and zero.nvme_path is None:
            raise ValueError("deepspeed.nvme_path: a folder is needed to offload to nvme")
        if zero.zero_stage < 3 and zero.offload_param != "none":
            raise ValueError(f"deepspeed.offload_param: only ZeRO-3 shards weights, zero_stage is {zero.zero_stage}")
        if zero.zero_stage < 3 and zero.offload_optimizer == "nvme":
            raise ValueError("deepspeed.offload_optimizer: nvme needs zero_stage 3")
        if self.collects_weights:
            message = "needs rollout.parameters gathered: sharded ones are collected inside every call"
            if self.rollout.compile:
                raise ValueError(f"rollout.compile: true {message}")
            if self.rollout.max_rows_per_call == "auto":
                raise ValueError(f"rollout.max_rows_per_call: auto {message}")
        if self.model.attention not in ("native", "efficient", "xformers") and self.model.dtype != "bfloat16":
            raise ValueError(f"model.attention: {self.model.attention} computes in bfloat16, model.dtype is float32")
        if zero.offload_optimizer != "none" and self.optimizer.name == "adamw8bit":
            raise ValueError("deepspeed.offload_optimizer: bitsandbytes' 8-bit AdamW stays on the device; use adamw")
        if zero.offload_optimizer == "nvme" and self.optimizer.ema_decay is not None:
            raise ValueError("optimizer.ema_decay: the average cannot be kept on nvme; use offload_optimizer cpu")
        if self.tail.has_model and self.tail.path is None and self.collects_weights:
            name = next(name for name in ("lora", "quantization", "cache") if name in self.tail.approximated)
            message = "its model follows the policy from rollout to rollout; needs rollout.parameters gathered"
            raise ValueError(f"tail.{name}: {message}")
        guidance = self.model.guidance
        if self.tail.cache is not None and not self.calls_are_alike:
            setting = "calls: 2" if guidance.calls == 2 else f"truncation: {guidance.truncation:g}"
            message = f"it foresees calls that all compute the same rows, which model.guidance.{setting} does not"
            raise ValueError(f"tail.cache: {message}")
        if self.model.quantization != "none":
            self._check_quantization()
        if schedule.sde_form == "cps" and schedule.eta > 1.0:
            raise ValueError(f"schedule.eta: {schedule.eta:g}; with sde_form cps at most 1")
        if schedule.shift != "auto":
            self._check_schedule()
        return self

    def _check_quantization(self) -> None:
        """ValueError where something does not go with quantized weights."""
        model, tail, whole = self.model, self.tail, f"with model.quantization {self.model.quantization}"
        if model.lora is None:
            message = f"{model.quantization} is for the weights under adapters; without model.lora all are trained"
            raise ValueError(f"model.quantization: {message}")
        if self.deepspeed.zero_stage == 3:
            raise ValueError(f"deepspeed.zero_stage: 3 shards weights; {whole} every rank has all of them, use 1 or 2")
        if self.rollout.compile:
            raise ValueError(f"rollout.compile: has not been tried {whole}")
        if tail.has_model and tail.path is None:
            name = next(name for name in ("lora", "quantization", "cache") if name in tail.approximated)
            message = f"its model takes the policy's weights from rollout to rollout, which it cannot {whole}"
            raise ValueError(f"tail.{name}: {message}; give tail.path, or leave it out")

    def _check_schedule(self) -> None:
        """ConfigError where the closed forms give nothing to sample by."""
        schedule = self.schedule
        try:
            made = self.build_schedule()
            finite = all(map(math.isfinite, (made.entropy(i, n) for i, n in enumerate(made.merges))))
        except ArithmeticError:
            finite = False
        if not finite or any(earlier <= later for earlier, later in pairwise(made.times)):
            shift = schedule.shift if isinstance(schedule.shift, str) else f"{schedule.shift:g}"
            raise ConfigError(f"schedule: shift {shift} and eta {schedule.eta:g} leave no usable time grid")
        if "schedule.active_steps" in self.method.uses:
            for index in made.active:
                if not made.sde(index, made.merges[index]).s > 0.0:
                    message = f"cps adds no noise in a step to t = 0, as step {index} is over {made.merges[index]}"
                    raise ConfigError(f"schedule.sde_form: {message}; use entropy_threshold 0 or other merge_lengths")

    def with_times(self, times: Sequence[float]) -> "Config":
        """The same with the grid that `schedule.shift: auto` stands for. ConfigError: it cannot be sampled by."""
        made = self.model_copy()
        made._times = tuple(times)
        made._check_schedule()
        return made

    def with_lora(self, lora: LoraConfig) -> "Config":
        """The same with other settings of the adapters."""
        return self.model_copy(update={"model": self.model.model_copy(update={"lora": lora})})

    @property
    def calls_are_alike(self) -> bool:
        """Whether every model call of the same samples computes the same rows, as a tail's cache expects."""
        return self.model.guidance.calls == 1 and self.model.guidance.truncation == 1.0

    @property
    def collects_weights(self) -> bool:
        """Whether a rollout's model calls gather sharded weights themselves."""
        return self.deepspeed.zero_stage == 3 and self.rollout.parameters == "sharded"

    def build_schedule(self) -> Schedule:
        """The schedule as the method uses it: without merging where it knows none."""
        settings = dict(self.schedule)
        if settings["shift"] == "auto":
            if self._times is None:
                raise ConfigError("schedule.shift: auto stands for no grid yet")
            settings["shift"] = self._times
        if not self.method.uses.issuperset(MERGING):
            settings["entropy_threshold"] = 0.0
        return make_schedule(**settings)

    def with_tail(self, **settings: Any) -> "Config":
        """The same with these settings of `tail`, the others at their defaults: none given, the exact one."""
        return self.model_copy(update={"tail": TailConfig(**settings)})

    def per_active_step(self, value: int | list[int]) -> list[int]:
        """A setting that is one number or one per active step, as a list."""
        return value if isinstance(value, list) else [value] * self._num_active

    @property
    def _num_active(self) -> int:
        return len(self.schedule.active_steps or range(self.schedule.num_steps // 2))

    def used(self) -> Tree:
        """All settings but those that the method does not use, as YAML can say them."""
        tree = self.model_dump(mode="json")
        for name in self._unused(given=False):
            section, _, field = name.partition(".")
            del tree[section][field]
        return tree

    def yaml(self) -> str:
        """`used` as the text of a recipe."""
        return write_yaml(self.used())


def plan_of(config: Config, iteration: int) -> Plan:
    """The plan of one training iteration, from 0: the same on every rank. ConfigError: it would be too large."""
    sizes, strides = config.per_active_step(config.rollout.group_size), config.per_active_step(config.tail.stride)
    pairs = config.objective.antithetic
    run = Run(config.build_schedule(), sizes, strides, config.tail.solver, pairs, config.seed, iteration)
    try:
        return config.method.plan(run)
    except PlanTooLargeError as error:
        settings = ["schedule.num_steps", *sorted({"schedule.active_steps", "rollout.group_size"} & config.method.uses)]
        raise ConfigError(f"{', '.join(settings)}: {error}; choose fewer") from None
