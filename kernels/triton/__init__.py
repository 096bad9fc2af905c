"""Triton implementations: one launch per op (reductions take a second, tiny one), registered under `egrpo_fast_triton`.

The kernels run on a GPU, or on the CPU under Triton's interpreter where TRITON_INTERPRET=1 was set before Triton was
imported: slow, for tests, and never chosen by `auto`.
"""

from importlib.util import find_spec

import torch

INSTALLED = find_spec("triton") is not None

if INSTALLED:
    from egrpo_fast.kernels.triton.branch_rows import branch_rows
    from egrpo_fast.kernels.triton.gaussian_log_prob import gaussian_log_prob
    from egrpo_fast.kernels.triton.group_advantage_clip_loss import group_advantage_clip_loss
    from egrpo_fast.kernels.triton.launch import INTERPRETED
    from egrpo_fast.kernels.triton.replay_log_ratio import replay_log_ratio
    from egrpo_fast.kernels.triton.sde_step import sde_step

    OPS = {
        "sde_step": sde_step,
        "gaussian_log_prob": gaussian_log_prob,
        "group_advantage_clip_loss": group_advantage_clip_loss,
        "replay_log_ratio": replay_log_ratio,
        "branch_rows": branch_rows,
    }
else:
    OPS = {}


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on the device; None: it can."""
    if not INSTALLED:
        return "triton is not installed"
    if device.type == "cpu":
        return None if INTERPRETED else "Triton compiles for GPUs; its interpreter needs TRITON_INTERPRET=1 at start"
    if device.type != "cuda":
        return f"the kernels are for CUDA devices, not {device.type!r}"
    if INTERPRETED:
        return "TRITON_INTERPRET is set, the kernels would be interpreted on the CPU"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0 or later"
    return None
