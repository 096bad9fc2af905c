"""This process among its ranks: where they meet, and what they agree on."""

import contextlib
import importlib
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

DEFAULT_PORT = "29500"
"""Of torch's and DeepSpeed's launchers."""
GROWING_SEGMENTS = "expandable_segments:True"
"""Rollout and update need blocks of other sizes in turn. Segments that grow leave fewer holes in a GPU's memory."""
EXACT_PINNED = "pinned_max_round_threshold_mb:64"
"""torch rounds pinned host memory up to a power of two. From 64 MiB on it is to take what is asked for."""


def set_allocator() -> None:
    """torch's allocator settings for a run, unless the environment has some."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        try:
            torch._C._accelerator_setAllocatorSettings(f"{GROWING_SEGMENTS},{EXACT_PINNED}")
        except ValueError:  # torch 2.10 does not know the second
            torch._C._accelerator_setAllocatorSettings(GROWING_SEGMENTS)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _meeting_port() -> str:
    """The port where the ranks meet: the launcher's, but never the one that every run of its machine would have.

    The deepspeed launcher says 29500 where it is given none. Where all ranks are on one machine that becomes a free
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
            set_allocator()
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

    def max(self, value: Tensor) -> float:
        """Largest over ranks of a scalar."""
        largest = value.to(self.device, torch.float64, copy=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def max_on_host(self, value: int) -> int:
        """Largest over ranks of a number that the host knows; no device is involved."""
        largest = torch.tensor(int(value))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._hosts)
        return int(largest)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, 0, device=self.device)
        return values[0]

    def close(self) -> None:
        """Leave the other ranks. Another world may be opened in this process, which DeepSpeed by itself forbids."""
        dist.destroy_process_group()
        # It keeps the groups of the first world in variables of two modules, and would take them for the second's.
        deepspeed.comm.comm.cdb = None
        importlib.reload(deepspeed.utils.groups)
