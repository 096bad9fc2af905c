"""What a rank settles before it meets the others."""

import os
import subprocess
import sys

import pytest
import torch

SETTLE = """
import torch
from egrpo_fast.distributed.world import set_allocator
set_allocator()
print(torch._C._accelerator_getAllocatorSettings())
"""


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="this torch does not tell them")
@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_grow_and_pinned_memory_is_exact_unless_the_user_says_otherwise(name):
    given = {name: "expandable_segments:False"} if name else {}
    others = {key: value for key, value in os.environ.items() if not key.endswith("ALLOC_CONF")}
    command, options = [sys.executable, "-c", SETTLE], {"capture_output": True, "text": True, "check": True}
    told = subprocess.run(command, env=others | given, **options)
    expected = given.get(name, "expandable_segments:True,pinned_max_round_threshold_mb:64")
    assert told.stdout.splitlines()[-1] == expected


def test_every_torch_takes_the_settings(monkeypatch):
    """One that does not know of pinned memory's takes the other."""
    given = []

    def take(text):
        given.append(text)
        if "pinned" in text:
            raise ValueError

    from egrpo_fast.distributed import world

    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", take)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    world.set_allocator()
    assert given[-1] == "expandable_segments:True"
