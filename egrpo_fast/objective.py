"""Advantages, log-ratios by replay and the clipped surrogate: from scores and a new velocity to a loss (paper, 3.2)."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from egrpo_fast.ops import Ops
from egrpo_fast.plan import Group
from egrpo_fast.rollout import NoiseKey


@dataclass(frozen=True)
class GroupLoss:
    """One active step's loss and what is worth watching about it.

    loss []: differentiable in the new velocity. advantages, log_ratio [P, G] and clip_fraction []: detached.
    """

    loss: Tensor
    advantages: Tensor
    log_ratio: Tensor
    clip_fraction: Tensor

    def detach(self) -> "GroupLoss":
        """The same numbers, without what the backward pass holds on to."""
        return replace(self, loss=self.loss.detach())


@dataclass(frozen=True)
class Objective:
    """`loss_n = -mean_(prompt, i) min(r_i A_i, clip(r_i, 1 - c, 1 + c) A_i)` for one active step n.

    weights: one per reward. mix: 'reward' standardises the weighted sum of rewards inside a group, 'advantage' adds the
    standardised rewards. clip_range: c, of per-element-averaged log-probs. advantage_clip: bound on |A|.
    """

    ops: Ops
    weights: tuple[float, ...]
    mix: Literal["reward", "advantage"] = "reward"
    clip_range: float = 1e-4
    advantage_clip: float = 5.0

    def __call__(
        self, group: Group, key: NoiseKey, velocity: Tensor, old_velocity: Tensor, rewards: Tensor
    ) -> GroupLoss:
        """velocity, old_velocity [P, L, C] at the group's shared state; rewards [K, P, G].

        The ratio compares the new velocity with `old_velocity` under the rollout's own noise, replayed from its key:
        with equal velocities it is exactly 1.
        """
        step = group.step
        dtype = torch.promote_types(velocity.dtype, torch.float32)
        coefficients = torch.tensor([(step.c_x, step.c_v, step.s)], dtype=dtype, device=velocity.device)
        log_ratio = self.ops.replay_log_ratio(
            velocity, old_velocity, coefficients.expand(len(velocity), 3).contiguous(), key.streams(group), key.seed
        )
        loss, advantages, clip_fraction = self.ops.group_advantage_clip_loss(
            rewards.to(dtype).unsqueeze(2),
            log_ratio.unsqueeze(1),
            torch.tensor(self.weights, dtype=dtype, device=velocity.device),
            self.mix,
            self.clip_range,
            self.advantage_clip,
        )
        return GroupLoss(loss, advantages.squeeze(1), log_ratio.detach(), clip_fraction)


def policy_mismatch(group: Group, velocity: Tensor, rollout_velocity: Tensor) -> Tensor:
    """`rms_p [c_v (v_update - v_rollout) / s]`: how far the update's mean is from the rollout's, in units of its noise.

    0 where both forwards are bit-equal; the rest is batch-size rounding of the model. [P, L, C] twice -> [].
    """
    delta = velocity.detach().float() - rollout_velocity.float()
    return (delta * (group.step.c_v / group.step.s)).square().mean().sqrt()
