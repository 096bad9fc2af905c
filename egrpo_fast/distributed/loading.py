"""Weights, one parameter at a time, from a file into every rank's partition."""

import contextlib
import resource
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from egrpo_fast.config import Config
from egrpo_fast.distributed.engine import deepspeed_config
from egrpo_fast.distributed.heartbeat import Heartbeat
from egrpo_fast.distributed.world import World


def materialize(
    module: nn.Module, read: Callable[[str], Tensor], config: Config, world: World, heart: Heartbeat,
    takers: Mapping[str, Callable[[Tensor], int]] = MappingProxyType({}),
) -> str:  # fmt: skip
    """Give a module on the meta device its weights, in the run's dtype, without any rank ever holding all of it.

    read: value of a parameter by name, called on rank 0 alone, which passes it on; under ZeRO-3 every rank keeps its
    partition and forgets the rest before the next parameter is read. takers: by name, what puts a value into the module
    in fewer bits and returns its bytes; every rank forgets the value then. Returns what it took, in a line.
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
    passed_on = parameters.keys() if sharded else takers.keys()
    passing = fresh(max((parameters[name].numel() for name in passed_on), default=0))
    quantized = 0
    for name, parameter in parameters.items():
        heart.at("loading", name, config.deepspeed.init_timeout)
        # Rank 0 says first whether it could read: a file that fails ends every rank, and none waits for the others.
        size, problem = parameter.numel(), ""
        value = (passing[:size] if name in passed_on else fresh(size)).view(parameter.shape)
        if world.is_main:
            try:
                value.copy_(read(name))
                if not value.isfinite().all():
                    raise ValueError(f"model.path: {name} holds numbers that are not finite; download it again")
            except ValueError as error:
                problem = str(error)
        problem = world.broadcast(problem)
        if problem:
            raise ValueError(problem)
        bar.update(size)
        if not sharded:
            dist.broadcast(value, 0)
        if name in takers:
            quantized += takers[name](value)
            continue
        owner, _, leaf = name.rpartition(".")
        filled = nn.Parameter(value, requires_grad=parameter.requires_grad)
        setattr(module.get_submodule(owner), leaf, filled)
        if not sharded:
            continue
        if first is None:
            deepspeed.zero.Init(
                module=nn.ParameterList([filled]), config_dict_or_path=deepspeed_config(config), dtype=dtype
            )
            first = filled
        else:
            first.convert_to_zero_parameters(param_list=[filled])
    bar.close()
    kept = sum(getattr(p, "ds_tensor", p).numel() for p in module.parameters()) * dtype.itemsize + quantized
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
