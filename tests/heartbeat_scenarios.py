"""What one rank of test_heartbeat.py does: SCENARIO CULPRIT STALL_SECONDS BEAT, and the variables of torchrun."""

import ctypes
import os
import signal
import sys
import threading
import time

import torch.distributed as dist

from egrpo_fast.heartbeat import Heartbeat, group_store

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def stalled(heartbeat, culprit):
    for phase in ("rollout", "reward"):
        heartbeat.at(phase, "hps" if phase == "reward" else "")
        if phase == "reward" and culprit:
            stuck_in_a_reward()
    heartbeat.at("gather")
    dist.barrier()


def stuck_in_a_reward():
    time.sleep(60)


def stalled_alone(heartbeat, culprit):
    heartbeat.at("decoding", limit=None if culprit else 60)
    time.sleep(60)


def killed(heartbeat, culprit):
    heartbeat.at("rollout", "step 3")
    time.sleep(1)
    if culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def killed_in_a_collective(heartbeat, culprit):
    heartbeat.at("gather", "rewards")
    if culprit:
        time.sleep(0.5)  # the others shall have read where it is
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def failed(heartbeat, culprit):
    heartbeat.at("saving", "shard 2")
    if culprit:
        raise OSError("No space left on device")
    time.sleep(60)


def fine(heartbeat, culprit):
    """Every rank takes longer than a stall, one far longer than the others, and rank 0 leaves the group early."""
    for index in range(25 if culprit else 15):
        heartbeat.at("loading", f"parameter {index}")
        time.sleep(0.1)
    heartbeat.at("compiling", limit=30)
    time.sleep(1.5)
    if dist.is_initialized():
        dist.destroy_process_group()


def lock_held(heartbeat, culprit):
    ctypes.PyDLL(None).sleep(60)


def main():
    scenario, culprit = globals()[sys.argv[1]], int(sys.argv[2])
    if SIZE > 1:
        dist.init_process_group("gloo")
    with Heartbeat(
        RANK, SIZE, group_store() if SIZE > 1 else None, float(sys.argv[3]), 2.0, float(sys.argv[4])
    ) as heartbeat:
        scenario(heartbeat, culprit == RANK)
    assert [thread.name for thread in threading.enumerate()] == ["MainThread"]


main()
