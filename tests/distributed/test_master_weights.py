"""Masters that are offloaded to a disk: whatever a block does, the buffers they are fetched into are given back."""

import pytest
import torch
from torch import nn

from egrpo_fast.distributed.master_weights import ShardedMasters


class Offloaded:
    """What of DeepSpeed's ZeRO-3 optimizer `resident` uses, with one group on a disk: what it was told."""

    def __init__(self):
        self.fp16_groups, self.fp32_partitioned_groups_flat = [[], []], [torch.zeros(2), torch.zeros(3)]
        self.told = []

    def _swappable_optimizer_subgroup(self, index):
        return index == 1

    def _optimizer_states_and_gradient_swap_in(self, index):
        self.told.append(("in", index))

    def _optimizer_states_and_gradient_swap_out(self, index):
        self.told.append(("out", index))

    def _release_swap_buffers(self, index):
        self.told.append(("release", index))


@pytest.mark.parametrize(
    ("write", "fault", "end"),
    [
        pytest.param(False, False, "release", id="read"),
        pytest.param(True, False, "out", id="written"),
        pytest.param(False, True, "release", id="a reader that raises"),
        pytest.param(True, True, "release", id="a writer that raises"),
    ],
)
def test_buffers_are_given_back(write, fault, end):
    optimizer = Offloaded()
    masters = ShardedMasters(nn.Module(), optimizer)

    def use():
        with masters.resident(1, write) as flat:
            assert flat is optimizer.fp32_partitioned_groups_flat[1] and optimizer.told == [("in", 1)]
            if fault:
                raise ValueError("damaged")

    if fault:
        with pytest.raises(ValueError, match="damaged"):
            use()
    else:
        use()
    assert optimizer.told == [("in", 1), (end, 1)]


def test_pieces_that_are_not_all_taken_hold_no_buffer():
    optimizer = Offloaded()
    masters = ShardedMasters(nn.Module(), optimizer)

    def pieces():
        with masters.resident(1) as flat:
            yield from flat

    taken = pieces()
    next(taken)
    taken.close()
    assert optimizer.told == [("in", 1), ("release", 1)]


def test_what_is_in_memory_is_not_fetched():
    optimizer = Offloaded()
    with ShardedMasters(nn.Module(), optimizer).resident(0, write=True) as flat:
        assert flat is optimizer.fp32_partitioned_groups_flat[0]
    assert not optimizer.told
