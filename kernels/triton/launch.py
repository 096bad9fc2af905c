"""How the row kernels are launched: blocks of a row, rounding, and the device that the launch must happen on."""

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether the kernels of this process are interpreted on the CPU."""

BLOCK = 16384 if INTERPRETED else 1024
"""Elements of a row per program: with 256 threads one Philox counter, four elements, a 16-byte access per thread. The
interpreter's cost is by program, not by element."""

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""No contraction: every product is rounded, as in the reference, so that rows without noise are equal bit for bit."""


def blocks_of(numel: int) -> int:
    """Programs that share a row of `numel` elements. Grids are one-dimensional: only that axis reaches 2^31."""
    return triton.cdiv(numel, BLOCK)


def on_device(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device, whichever the arguments live on; this makes it the tensor's."""
    return torch.cuda.device_of(tensor)
