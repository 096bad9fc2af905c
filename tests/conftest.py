"""Triton kernels run in Triton's interpreter; it looks at the environment once, when it is first imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
