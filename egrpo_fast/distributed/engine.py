"""The distributed engine, on DeepSpeed: gather, backward, step, pieces for checkpoints, restore."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError
from torch import Tensor, nn

from egrpo_fast.config import Config, ConfigError, OptimizerConfig
from egrpo_fast.distributed.checkpoint import CheckpointReader, Piece
from egrpo_fast.distributed.master_weights import Masters

WEIGHT, EMA = "weight", "ema"
"""Kinds of checkpoint pieces beside the optimizer's own: float32 master weights and their moving average."""


def _merge(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        base[key] = _merge(base[key], value) if both else value
    return base


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run."""
    zero: dict[str, Any] = {"stage": config.deepspeed.zero_stage, "memory_efficient_linear": False}
    for part, device in (
        ("offload_optimizer", config.deepspeed.offload_optimizer),
        ("offload_param", config.deepspeed.offload_param),
    ):
        if device != "none":
            zero[part] = {"device": device, "pin_memory": torch.cuda.is_available()}
        if device == "nvme":
            zero[part]["nvme_path"] = config.deepspeed.nvme_path
    return _merge(
        {
            "train_micro_batch_size_per_gpu": 1,
            # The trainer says itself which backward is the last of a step: `Engine.backward(last=...)`.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.optimizer.max_grad_norm,
            # A gradient that is not finite must never reach the weights: said here, whatever the default.
            "bf16": {"enabled": config.model.dtype == "bfloat16", "check_grad_overflow": True},
            # Gradients of all active steps and prompts add up before a step: in bfloat16 the sum would lose them.
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            # Offloaded, torch's own AdamW takes the step on the host; DeepSpeed's would be compiled at first use.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
        config.deepspeed.overrides,
    )


class _Asked(dict[str, Any]):
    """A mapping that remembers which of its keys were asked for."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        super().__init__({key: _Asked(value) if isinstance(value, Mapping) else value for key, value in tree.items()})
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        """Whoever goes through all of it, as `**mapping` does, asks for all of it."""
        self.asked |= self.keys()
        return super().__iter__()

    def __copy__(self) -> "_Asked":
        return self

    def unread(self, tree: Mapping[str, Any]) -> Iterator[str]:
        """The keys of `tree` that nobody has asked for. This mapping was made from `tree`.

        A section of which no key was asked for was handed on as a whole, to a model that refuses what it does not know.
        """
        for key, value in tree.items():
            if key not in self.asked:
                yield key
            elif isinstance(inside := dict.get(self, key), _Asked) and inside.asked:
                yield from (f"{key}.{name}" for name in inside.unread(value))


def check_overrides(config: Config) -> None:
    """ConfigError where `deepspeed.overrides` has a key that DeepSpeed does not read, or a value that it refuses."""
    overrides, asked = config.deepspeed.overrides, _Asked(deepspeed_config(config))
    field = "deepspeed.overrides"
    try:
        DeepSpeedConfig(asked)
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(map(str, item["loc"]))
        section = next((f"{name}." for name, inside in overrides.items() if _leads(inside, item["loc"])), "")
        problem = "unknown to DeepSpeed" if item["type"] == "extra_forbidden" else f"{item['input']!r}: {item['msg']}"
        raise ConfigError(f"{field}: {section}{where}: {problem}") from None
    except Exception as error:  # of whatever kind: its own checks are asserts, ValueErrors and TypeErrors
        raise ConfigError(f"{field}: DeepSpeed refuses them: {' '.join(str(error).split())}") from None
    if unread := list(asked.unread(overrides)):
        raise ConfigError(f"{field}: {', '.join(unread)}: unknown to DeepSpeed")


def _leads(tree: Any, path: Sequence[Any]) -> bool:
    """Whether these keys, one after the other, lead to something in a tree."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def _make_optimizer(parameters: list[nn.Parameter], settings: OptimizerConfig, on_host: bool) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {
        "lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay
    }  # fmt: skip
    if settings.name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **arguments)
    # torch's own AdamW: DeepSpeed's are compiled on first use, which needs a toolchain where the run is.
    # Fused it needs no temporaries. Between CPU ranks without offload the plain one is what is tested bit by bit.
    fused = on_host or all(parameter.device.type == "cuda" for parameter in parameters)
    return torch.optim.AdamW(parameters, **arguments, fused=fused or None)


def learning_rate_factor(settings: OptimizerConfig, total_steps: int, step: int) -> float:
    """Share of the peak learning rate at optimizer step 0, 1, ...: linear warm-up, then constant, or decay to 0."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    if settings.lr_scheduler == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    left = 1.0 - min(1.0, done)
    return left if settings.lr_scheduler == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))


class Engine:
    """A module under DeepSpeed ZeRO with AdamW, a learning rate schedule, gradient clipping and a moving average.

    total_steps: optimizer steps of the whole run, for the schedule. Everything that a checkpoint needs is handed out as
    pieces of named tensors, each rank its own, and taken back from them by any number of ranks.
    """

    def __init__(self, module: nn.Module, config: Config, total_steps: int, stand_in: nn.Module | None = None) -> None:
        """stand_in: a module of the same parameters, on the meta device, that `inference` lends the weights to."""
        settings, self._stand_in = config.optimizer, stand_in
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._client = _make_optimizer(parameters, settings, config.deepspeed.offload_optimizer != "none")
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            self._client, lambda step: learning_rate_factor(settings, total_steps, step)
        )
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=self._client, lr_scheduler=self._scheduler, config=deepspeed_config(config)
        )
        self.sharded = config.deepspeed.zero_stage == 3
        self._masters = Masters.of(self._engine)
        self._ema_decay = settings.ema_decay
        self._ema = [flat.detach().clone() for flat in self._masters.flats] if self._ema_decay is not None else []
        self.steps = 0

    @property
    def module(self) -> nn.Module:
        """The module for forwards with gradient: under ZeRO-3 its weights are gathered layer by layer."""
        return self._engine

    @contextlib.contextmanager
    def inference(self, gathered: bool) -> Iterator[nn.Module]:
        """The module for forwards without gradient, or its stand-in.

        gathered: collect all weights once for the whole block and leave the per-layer hooks out, instead of gathering
        every layer at every call. Same weights, same numbers.
        """
        module = self._engine.module
        module.eval()
        offload = getattr(self._engine.optimizer, "parameter_offload", None)
        try:
            if gathered and offload is not None:
                # The hooks would release each layer after its first forward, gathered or not.
                offload._remove_module_hooks()
                try:
                    with deepspeed.zero.GatheredParameters(list(module.parameters())), self._lent(module) as lent:
                        yield lent
                finally:
                    offload.forward_hooks.clear()
                    offload.backward_hooks.clear()
                    offload.setup_zero_stage3_hooks()
            else:
                with self._lent(module) as lent:
                    yield lent
        finally:
            module.train()

    @contextlib.contextmanager
    def _lent(self, module: nn.Module) -> Iterator[nn.Module]:
        """The stand-in, with the module's own tensors meanwhile; the module itself where there is none."""
        if self._stand_in is None:
            yield module
            return
        self._stand_in.load_state_dict({name: p.data for name, p in module.named_parameters()}, assign=True)
        try:
            yield self._stand_in
        finally:
            self._stand_in.to("meta")

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate this loss's gradient; `last`: the next `step` applies it. Gradients are averaged over ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self._engine.get_lr()[0]

    def step(self) -> float:
        """One optimizer step. Returns the gradient norm before clipping.

        A gradient that is not finite, on whichever rank, changes nothing on any: the norm is then infinite.
        """
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if not 0.0 <= norm < math.inf:  # DeepSpeed skipped the step and left the schedule where it was
            return math.inf
        self.steps += 1
        for average, flat in zip(self._ema, self._masters.flats):
            average.lerp_(flat.detach(), 1.0 - self._ema_decay)  # type: ignore[operator]
        return norm

    def _states(self, index: int, flat: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A group's tensors that have an entry per weight, by kind; and those that have not, by name."""
        state = self._client.state.get(flat, {})
        each = {key: value for key, value in state.items() if _per_weight(value, flat)}
        rest = {f"{index}.{key}": value for key, value in state.items() if key not in each and key != "step"}
        if self._ema:
            each[EMA] = self._ema[index]
        return {WEIGHT: flat, **each}, {key: value for key, value in rest.items() if isinstance(value, Tensor)}

    def state_shards(self) -> Iterator[Piece]:
        """This rank's pieces of master weights, their average and the optimizer's state, of all trained parameters."""
        for index, fragments in enumerate(self._masters.fragments):
            with self._masters.resident(index) as flat:
                kinds, _ = self._states(index, flat)
                for fragment in fragments:
                    for kind, values in kinds.items():
                        tensor = fragment.of(values.detach())
                        yield Piece(fragment.name, kind, fragment.start, fragment.shape, tensor)

    def rank_local_state(self) -> dict[str, Tensor]:
        """Optimizer state that only this rank, in a run of as many ranks, can use: 8-bit moments and their scales."""
        if self._portable:
            return {}  # all of its state is in the pieces
        flats = self._masters.flats
        return {key: value for i, flat in enumerate(flats) for key, value in self._states(i, flat)[1].items()}

    @property
    def _portable(self) -> bool:
        """Whether the optimizer's state is one of pieces, which any number of ranks can take up."""
        return isinstance(self._client, torch.optim.AdamW)

    def _step_count(self, steps: int, flat: Tensor) -> Tensor:
        """As torch's AdamW keeps it: the fused one beside its weights, the other on the host."""
        device = flat.device if self._client.defaults["fused"] else torch.device("cpu")
        return torch.tensor(float(steps), dtype=torch.float32, device=device)

    @torch.no_grad()
    def restore(self, reader: CheckpointReader, steps: int) -> None:
        """Take weights, averages and optimizer state from a checkpoint. steps: optimizer steps it was made after.

        ValueError where its tensors are not this module's, or where it holds state that needs as many ranks as made it.
        """
        masters, kinds = self._masters, reader.kinds()
        held = {kind: set(reader.names(kind)) for kind in kinds}
        for name in {fragment.name for fragments in masters.fragments for fragment in fragments}:
            if name not in held[WEIGHT] or reader.shape(name) != masters.shapes[name]:
                raise ValueError(f"resume: {reader.path} holds no {name} of shape {masters.shapes[name]}")
        if self._ema and EMA not in kinds:
            raise ValueError(f"optimizer.ema_decay: {reader.path} holds no average; resume without it")
        local = {} if self._portable else reader.rank_local_state(dist.get_rank(), dist.get_world_size())
        for index, fragments in enumerate(masters.fragments):
            with masters.resident(index, write=True) as flat:
                state = self._client.state[flat]
                if steps:
                    for kind in kinds:
                        if kind not in (WEIGHT, EMA):
                            state[kind] = torch.zeros_like(flat)
                    for key, value in local.items():
                        group, _, name = key.partition(".")
                        if int(group) == index:
                            state[name] = value.to(flat.device)
                    state["step"] = self._step_count(steps, flat) if self._portable else steps
                targets = {WEIGHT: flat, **{kind: state[kind] for kind in kinds if kind in state}}
                if self._ema:
                    targets[EMA] = self._ema[index]
                for fragment in fragments:
                    stop = fragment.start + fragment.numel
                    for kind, values in targets.items():
                        if fragment.name in held[kind]:
                            fragment.of(values).copy_(reader.read(fragment.name, kind, fragment.start, stop))
        masters.refresh(lambda name: reader.tensor(name, WEIGHT))
        self.steps = self._engine.global_steps = steps
        self._scheduler.last_epoch = steps
        rates = [base * factor(steps) for base, factor in zip(self._scheduler.base_lrs, self._scheduler.lr_lambdas)]
        self._scheduler._last_lr = rates
        for settings, rate in zip(self._client.param_groups, rates):
            settings["lr"] = rate


def _per_weight(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape and value.dtype == flat.dtype
