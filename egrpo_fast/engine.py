"""The distributed engine, on DeepSpeed: load sharded, gather, backward, step, pieces, restore; what ranks agree on."""

import contextlib
import math
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError
from torch import Tensor, nn
from tqdm import tqdm

from egrpo_fast.checkpoint import CheckpointReader, Piece
from egrpo_fast.config import Config, ConfigError, Optimizer
from egrpo_fast.heartbeat import Heartbeat
from egrpo_fast.masters import Masters

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
        ("offload_param", config.deepspeed.offload_weights),
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
    overrides, told = config.deepspeed.overrides, _Asked(deepspeed_config(config))
    field = "deepspeed.overrides"
    try:
        DeepSpeedConfig(told)
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(map(str, item["loc"]))
        section = next((f"{name}." for name, inside in overrides.items() if _leads(inside, item["loc"])), "")
        problem = "unknown to DeepSpeed" if item["type"] == "extra_forbidden" else f"{item['input']!r}: {item['msg']}"
        raise ConfigError(f"{field}: {section}{where}: {problem}") from None
    except Exception as error:  # of whatever kind: its own checks are asserts, ValueErrors and TypeErrors
        raise ConfigError(f"{field}: DeepSpeed refuses them: {' '.join(str(error).split())}") from None
    if unread := list(told.unread(overrides)):
        raise ConfigError(f"{field}: {', '.join(unread)}: unknown to DeepSpeed")


def _leads(tree: Any, path: Sequence[Any]) -> bool:
    """Whether these keys, one after the other, lead to something in a tree."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


DEFAULT_PORT = "29500"
"""Of torch's and DeepSpeed's launchers."""


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _meeting_port() -> str:
    """The port where the ranks meet: the launcher's, but never the one that every run of its machine would have.

    The deepspeed launcher says 29500 where it is told none. Where all ranks are on one machine that becomes a free
    port, which rank 0 finds; of several ranks all take one that follows from their launcher's process, so that they
    agree without a word and another run has another.
    """
    given, size = os.environ.get("MASTER_PORT", DEFAULT_PORT), os.environ["WORLD_SIZE"]
    if given != DEFAULT_PORT:
        return given
    if size == "1":
        return str(free_port())
    if os.environ.get("LOCAL_SIZE") != size:  # several machines, or another launcher
        return given
    launcher = os.getppid()
    with contextlib.suppress(OSError, IndexError):  # numbers of processes come again: since when it runs
        launcher += int(Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19])
    return str(20000 + launcher % 10000)


class World:
    """This process among its ranks. Started by the `deepspeed` launcher, or alone.

    timeout: seconds that a collective waits for the other ranks. Longer than the heartbeat's patience, which says more.
    """

    def __init__(self, timeout: float = 7200.0) -> None:
        lacking = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]
        if lacking and os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError(f"WORLD_SIZE: {os.environ['WORLD_SIZE']} ranks, but {', '.join(lacking)} is not set")
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1")):
            os.environ.setdefault(name, str(value))
        os.environ["MASTER_PORT"] = _meeting_port()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        else:
            self.device = torch.device("cpu")
        # For CPU ranks DeepSpeed would now compile a reduction for inference, for a minute. ZeRO does not call it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if self.device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout),
            verbose=False,
        )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # What ranks agree on between model calls goes from host to host: no device waits for it.
        self._hosts: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.local_size = self._ranks_here()
        """Ranks on this machine."""
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.local_size))

    def _ranks_here(self) -> int:
        """What the launcher says: torchrun in LOCAL_WORLD_SIZE, deepspeed in LOCAL_SIZE. Else ranks of one host name.

        Names alone will not do: two containers may both be called localhost. Every rank takes part in the exchange.
        """
        names: list[Any] = [None] * self.size
        dist.all_gather_object(names, socket.gethostname(), group=self._hosts)
        said = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
        return int(said) if said else names.count(socket.gethostname())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def hardware(self) -> str:
        """Number of ranks, and what each computes on, for people to read."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{self.size} rank{'s' if self.size > 1 else ''} ({device})"

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks, in float64."""
        total = values.to(self.device, torch.float64, copy=True)
        dist.all_reduce(total)
        return total / self.size

    def largest(self, value: Tensor) -> float:
        """Largest over ranks of a scalar."""
        largest = value.to(self.device, torch.float64, copy=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def agree(self, value: int) -> int:
        """Largest over ranks of a number that the host knows; no device is involved."""
        largest = torch.tensor(int(value))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._hosts)
        return int(largest)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, 0, device=self.device)
        return values[0]

    def close(self) -> None:
        dist.destroy_process_group()


def materialize(
    module: nn.Module, read: Callable[[str], Tensor], config: Config, world: World, heart: Heartbeat
) -> str:
    """Give a module on the meta device its weights, in the run's dtype, without any rank ever holding all of it.

    read: value of a parameter by name, called on rank 0 alone, which passes it on; under ZeRO-3 every rank keeps its
    partition and forgets the rest before the next parameter is read. Returns what it took, in a line.
    """
    dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
    sharded = config.deepspeed.zero_stage == 3
    parameters = dict(module.named_parameters())
    start, before = time.perf_counter(), _host_memory("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
    total = sum(parameter.numel() for parameter in parameters.values())
    bar = tqdm(
        total=total, desc="loading", unit="", unit_scale=True, disable=not world.is_main, leave=False,
        dynamic_ncols=True,
    )  # fmt: skip
    first: Any = None
    fresh = partial(torch.empty, dtype=dtype, device=world.device)
    # One buffer for what is passed on and forgotten: of tensors freed one by one the allocator keeps hundreds of MiB.
    passing = fresh(max(parameter.numel() for parameter in parameters.values()) if sharded else 0)
    for name, parameter in parameters.items():
        heart.at("loading", name, config.deepspeed.init_timeout)
        # Rank 0 says first whether it could read: a file that fails ends every rank, and none waits for the others.
        size, problem = parameter.numel(), ""
        value = (passing[:size] if sharded else fresh(size)).view(parameter.shape)
        if world.is_main:
            try:
                value.copy_(read(name))
                if not value.isfinite().all():
                    raise ValueError(f"model.path: {name} holds numbers that are not finite; download it again")
            except ValueError as error:
                problem = str(error)
        problem = world.from_main(problem)
        if problem:
            raise ValueError(problem)
        owner, _, leaf = name.rpartition(".")
        filled = nn.Parameter(value, requires_grad=parameter.requires_grad)
        setattr(module.get_submodule(owner), leaf, filled)
        if not sharded:
            dist.broadcast(filled.data, 0)
        elif first is None:
            deepspeed.zero.Init(
                module=nn.ParameterList([filled]), config_dict_or_path=deepspeed_config(config), dtype=dtype
            )
            first = filled
        else:
            first.convert_to_zero_parameters(param_list=[filled])
        bar.update(parameter.numel())
    bar.close()
    kept = sum(getattr(p, "ds_tensor", p).numel() for p in module.parameters()) * dtype.itemsize
    return (
        f"loaded {total / 1e6:,.1f} M parameters in {time.perf_counter() - start:.1f} s: this rank keeps "
        f"{kept / 2**20:,.1f} MiB, its host memory grew by at most {(_host_memory('VmHWM') - before) / 2**20:,.1f} MiB"
    )


def _host_memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at their most."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: the highest ever stands for both
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def _make_optimizer(parameters: list[nn.Parameter], settings: Optimizer, on_host: bool) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {
        "lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay
    }  # fmt: skip
    if settings.name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **arguments)
    # torch's own AdamW: DeepSpeed's are compiled on first use, which needs a toolchain where the run is.
    return torch.optim.AdamW(parameters, **arguments, fused=True if on_host else None)


def learning_rate_factor(settings: Optimizer, total_steps: int, step: int) -> float:
    """Share of the peak learning rate at optimizer step 0, 1, ...: linear warm-up, then constant, or decay to 0."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    if settings.decay == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    left = 1.0 - min(1.0, done)
    return left if settings.decay == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))


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
    def rate(self) -> float:
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

    def pieces(self) -> Iterator[Piece]:
        """This rank's pieces of master weights, their average and the optimizer's state, of all trained parameters."""
        for index, fragments in enumerate(self._masters.fragments):
            with self._masters.resident(index) as flat:
                kinds, _ = self._states(index, flat)
                for fragment in fragments:
                    for kind, values in kinds.items():
                        tensor = fragment.of(values.detach())
                        yield Piece(fragment.name, kind, fragment.start, fragment.shape, tensor)

    def local(self) -> dict[str, Tensor]:
        """Optimizer state that only this rank, in a run of as many ranks, can use: 8-bit moments and their scales."""
        if self._portable:
            return {}  # all of its state is in the pieces
        flats = self._masters.flats
        return {key: value for i, flat in enumerate(flats) for key, value in self._states(i, flat)[1].items()}

    @property
    def _portable(self) -> bool:
        """Whether the optimizer's state is one of pieces, which any number of ranks can take up."""
        return isinstance(self._client, torch.optim.AdamW)

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
        local = {} if self._portable else reader.local(dist.get_rank(), dist.get_world_size())
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
                    state["step"] = torch.tensor(float(steps), dtype=torch.float32) if self._portable else steps
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
