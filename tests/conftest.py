"""Triton kernels run in Triton's interpreter; it looks at the environment once, when it is first imported.

One thread per process: threads that spin for each other on cores with other work take many times as long.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
