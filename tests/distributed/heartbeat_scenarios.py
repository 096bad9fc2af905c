"""What one rank of test_heartbeat.py does. Arguments: SCENARIO CULPRIT STALL_SECONDS GONE_SECONDS BEAT.

The variables are those of torchrun.
"""

import ctypes
import os
import signal
import sys
import threading
import time

import torch.distributed as dist

from egrpo_fast.distributed.heartbeat import Heartbeat, group_store

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOR_EVER = 3600


def until_all_know(heartbeat, culprit):
    """The culprit waits here until every other rank has read that all ranks are in this rank's phase."""
    phase = heartbeat._mine().phase
    while any(entry.phase != phase for entry in heartbeat._table.values()):
        time.sleep(0.01)
    group_store().set(f"rank {RANK} knows", "")
    if culprit:
        group_store().wait([f"rank {rank} knows" for rank in range(SIZE)])


def stalled(heartbeat, culprit):
    for phase in ("rollout", "reward"):
        heartbeat.at(phase, "hps" if phase == "reward" else "")
        if phase == "reward" and culprit:
            stuck_in_a_reward()
    heartbeat.at("gather")
    dist.barrier()


def stuck_in_a_reward():
    time.sleep(FOR_EVER)


def stalled_alone(heartbeat, culprit):
    heartbeat.at("decoding", limit=None if culprit else FOR_EVER)
    time.sleep(FOR_EVER)


def killed(heartbeat, culprit):
    heartbeat.at("rollout", "step 3")
    until_all_know(heartbeat, culprit)
    if culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(FOR_EVER)


def killed_in_a_collective(heartbeat, culprit):
    heartbeat.at("gather", "rewards")
    until_all_know(heartbeat, culprit)
    if culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def failed(heartbeat, culprit):
    heartbeat.at("saving", "shard 2")
    if culprit:
        raise OSError("No space left on device")
    time.sleep(FOR_EVER)


def fine(heartbeat, culprit):
    """Every rank takes longer than a stall, one far longer than the others, and rank 0 leaves the group early."""
    for index in range(25 if culprit else 15):
        heartbeat.at("loading", f"parameter {index}")
        time.sleep(0.3)
    heartbeat.at("compiling", limit=FOR_EVER)
    time.sleep(6)
    if dist.is_initialized():
        dist.destroy_process_group()


def lock_held(heartbeat, culprit):
    ctypes.PyDLL(None).sleep(FOR_EVER)


def main():
    scenario, culprit = globals()[sys.argv[1]], int(sys.argv[2])
    if SIZE > 1:
        dist.init_process_group("gloo")
    stall_seconds, gone_seconds, beat = map(float, sys.argv[3:])
    with Heartbeat(RANK, SIZE, group_store() if SIZE > 1 else None, stall_seconds, gone_seconds, beat) as heartbeat:
        scenario(heartbeat, culprit == RANK)
    assert [thread.name for thread in threading.enumerate()] == ["MainThread"]


main()
