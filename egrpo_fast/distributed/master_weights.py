"""Where DeepSpeed's three optimizers keep a rank's float32 master weights: flat tensors, and what lies in them.

One class; its two variants say what is other under ZeRO-1 in bfloat16 and under ZeRO-3.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """Where this rank keeps a piece of a parameter: flat[offset : offset + numel] is whole[start : start + numel]."""

    name: str
    shape: tuple[int, ...]
    offset: int
    start: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.offset, self.numel)


class Masters:
    """Under ZeRO-1 and 2: a rank has the masters of a slice of each group, and all weights that the forward uses.

    shapes: of every parameter of the module, whole, by name. fragments: by flat tensor, what lies in it.
    """

    _flats, _groups = "single_partition_of_fp32_groups", "bit16_groups"

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        self._module, self._optimizer = module, optimizer
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
        self.fragments = [
            [
                Fragment(name := names[id(parameter)], self.shapes[name], offset, start, numel)
                for parameter, offset, start, numel in self._places(group)
                if numel > 0
            ]
            for group in getattr(optimizer, self._groups)
        ]

    @staticmethod
    def of(engine: Any) -> "Masters":
        """Those of a DeepSpeed engine."""
        kinds = {DeepSpeedZeroOptimizer_Stage3: ShardedMasters, BF16_Optimizer: Bfloat16Masters}
        found = next((kind for optimizer, kind in kinds.items() if isinstance(engine.optimizer, optimizer)), Masters)
        return found(engine.module, engine.optimizer)

    @property
    def flats(self) -> list[Tensor]:
        """This rank's masters, one flat tensor per group of the optimizer, which knows its state by them."""
        return getattr(self._optimizer, self._flats)

    def _places(self, group: Sequence[Any]) -> Iterator[tuple[Any, int, int, int]]:
        """Of a group's parameters that lie here: parameter, offset, start, numel."""
        for parameter in group:
            if (place := parameter._hp_mapping) is not None:
                address = place.hp_fragment_address
                yield parameter, address.start, place.lp_fragment_address.start, address.numel

    @contextlib.contextmanager
    def resident(self, index: int, write: bool = False) -> Iterator[Tensor]:
        """A flat tensor with its optimizer state, in memory for the block. write: what the block does to them is kept.

        Where they are offloaded to a disk they are fetched, and written back if asked to and the block does not raise.
        """
        yield self.flats[index]

    def refresh(self, read: Callable[[str], Tensor]) -> None:
        """Have the forward's weights follow masters that were written. read: a whole one by name, if it is needed."""
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(read(name))


class Bfloat16Masters(Masters):
    """Under ZeRO-1 in bfloat16, whose optimizer is another one."""

    _flats, _groups = "fp32_groups_flat_partition", "bf16_groups"


class ShardedMasters(Masters):
    """Under ZeRO-3: a rank has its share of every parameter, and the forward's weights are shared out alike."""

    _flats, _groups = "fp32_partitioned_groups_flat", "fp16_groups"

    def _places(self, group: Sequence[Any]) -> Iterator[tuple[Any, int, int, int]]:
        offset = 0
        for parameter in group:
            size = parameter.ds_tensor.ds_numel  # with what it is padded by
            start = size * dist.get_rank()
            yield parameter, offset, start, min(size, parameter.ds_numel - start)
            offset += size

    @contextlib.contextmanager
    def resident(self, index: int, write: bool = False) -> Iterator[Tensor]:
        if not self._optimizer._swappable_optimizer_subgroup(index):
            yield self.flats[index]
            return
        self._optimizer._optimizer_states_and_gradient_swap_in(index)
        leave = self._optimizer._release_swap_buffers
        try:
            yield self.flats[index]
            if write:
                leave = self._optimizer._optimizer_states_and_gradient_swap_out
        finally:
            leave(index)

    def refresh(self, read: Callable[[str], Tensor]) -> None:
        for index in range(len(self.flats)):
            with self.resident(index):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if small := self._optimizer.persistent_parameters:  # that stay gathered: dropped here, gathered anew when used
            small[0].partition(small)
        self._optimizer.invalidate_secondary_tensor()  # ZeRO++'s copies inside a machine, still of the base
