"""The truth: every op in plain PyTorch, in the dtype of its latents, so that float64 can judge the kernels."""

import torch

from egrpo_fast.kernels.reference.branch_rows import branch_rows_ref
from egrpo_fast.kernels.reference.gaussian_log_prob import gaussian_log_prob_ref
from egrpo_fast.kernels.reference.group_advantage_clip_loss import group_advantage_clip_loss_ref
from egrpo_fast.kernels.reference.replay_log_ratio import replay_log_ratio_ref
from egrpo_fast.kernels.reference.sde_step import sde_step_ref

OPS = {
    "sde_step": sde_step_ref,
    "gaussian_log_prob": gaussian_log_prob_ref,
    "group_advantage_clip_loss": group_advantage_clip_loss_ref,
    "replay_log_ratio": replay_log_ratio_ref,
    "branch_rows": branch_rows_ref,
}


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on the device; None: it can."""
    return None
