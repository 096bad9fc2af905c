"""Triton kernels run in Triton's interpreter; it looks at the environment once, when it is first imported.

One thread per process: threads that spin for each other on cores with other work take many times as long.
"""

import ctypes
import os
from contextlib import contextmanager

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def unprivileged():
    """A context in which not even root reads files of mode 000: without its capabilities to pass over modes."""

    @contextmanager
    def within():
        libc = ctypes.CDLL(None)
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        effective, sets[0] = sets[0], sets[0] & ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        assert libc.capset(header, sets) == 0
        try:
            yield
        finally:
            sets[0] = effective
            libc.capset(header, sets)

    return within

LONG = ("test_train.py", "test_engine.py", "test_run.py", "test_cost.py")
"""Files of minutes. They come first, so that no process is left alone with one at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)
