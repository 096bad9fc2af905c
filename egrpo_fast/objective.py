"""From rewards and a new velocity to a loss: advantages, ratios of new to old policy, the clip (paper, 3.2)."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from egrpo_fast.config import Config
from egrpo_fast.host_to_device import on_device
from egrpo_fast.ops import Ops
from egrpo_fast.plan import Group
from egrpo_fast.rollout import NoiseKey


@dataclass(frozen=True)
class GroupLoss:
    """One group's loss and what is worth watching about it.

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
    """`loss_n = -w_n mean_(prompt, i) min(r_i A_i, clip(r_i, 1 - c, 1 + c) A_i)` for one group n.

    The op `group_advantage_clip_loss` computes advantages and clip.

    weights: one per reward. mix: 'reward' standardises the weighted sum of rewards inside a group, 'advantage' adds the
    standardised rewards; advantages of several views are added. clip_range: c, of per-element-averaged log-probs.
    advantage_clip: bound on |A|, in standard deviations. baseline: what a reward is compared with, the mean of all G or
    of the G - 1 others. scale_rewards: 'none' takes the advantage in units of the reward, not of its group's spread.
    """

    ops: Ops
    weights: tuple[float, ...]
    mix: Literal["reward", "advantage"] = "reward"
    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    baseline: Literal["mean", "leave_one_out"] = "mean"
    scale_rewards: Literal["std", "none"] = "std"

    @classmethod
    def of(cls, config: Config, ops: Ops) -> "Objective":
        """A run's own."""
        settings = config.objective
        weights = tuple(reward.weight for reward in config.rewards if reward.weight)
        return cls(
            ops, weights, settings.mix, settings.clip_range, settings.advantage_clip, settings.baseline,
            settings.scale_rewards,
        )  # fmt: skip

    def __call__(
        self,
        group: Group,
        key: NoiseKey,
        velocity: Tensor,
        old_velocity: Tensor,
        rewards: Tensor,
        kept: Tensor | None = None,
        stored: tuple[Tensor, Tensor] | None = None,
    ) -> GroupLoss:
        """velocity, old_velocity [P * S, L, C] at the group's states; rewards [K V, P, G] as of `Plan.by_group`.

        The ratio compares the new velocity with `old_velocity` under the rollout's own noise, replayed from its key:
        with equal velocities it is exactly 1. kept [P, G], of `Plan.unpruned`: samples that count; the others' rewards
        are compared with, but their ratio stays 1. stored: the states [P * S, L, C] and the samples [P * G, L, C] that
        left them. With these the ratio is that of the samples' densities, and no noise is replayed.
        """
        if stored is None:
            log_ratio = self._log_ratio(group, key, velocity, old_velocity)
        else:
            log_ratio = self._stored_log_ratio(group, velocity, old_velocity, *stored)
        if kept is not None:
            log_ratio = torch.where(kept, log_ratio, torch.zeros_like(log_ratio))
        return self._loss(group, log_ratio, rewards)

    def advantages(self, group: Group, rewards: Tensor) -> Tensor:
        """[P, G] of rewards [K V, P, G]: what the loss weighs each sample by."""
        return self._loss(group, rewards.new_zeros(rewards.shape[1:]), rewards).advantages

    def _loss(self, group: Group, log_ratio: Tensor, rewards: Tensor) -> GroupLoss:
        rewards, weights, mix = self._mixed(rewards.to(log_ratio.dtype), len(group.views))
        # What scales a whole group's advantages scales its loss: the op standardises, the rest is a factor.
        factor = group.weight * (group.size / (group.size - 1) if self.baseline == "leave_one_out" else 1.0)
        if self.scale_rewards == "std":
            loss, advantages, clip_fraction = self._surrogate(rewards, log_ratio, weights, mix)
            return GroupLoss(factor * loss, factor * advantages, log_ratio.detach(), clip_fraction)
        spreads = torch.einsum("k,kpg->pg", weights, rewards).std(-1)
        parts = [
            self._surrogate(rewards[:, p : p + 1], log_ratio[p : p + 1], weights, mix) for p in range(len(log_ratio))
        ]
        losses, advantages, clip_fractions = (torch.stack(values) for values in zip(*parts))
        advantages = factor * spreads[:, None] * advantages.flatten(0, 1)
        return GroupLoss(factor * (losses * spreads).mean(), advantages, log_ratio.detach(), clip_fractions.mean())

    def mixed(self, rewards: Tensor) -> Tensor:
        """Weighted sum of rewards [K, P, n]: [P, n]."""
        return torch.einsum("k,kpn->pn", on_device(self.weights, rewards.device, rewards.dtype), rewards)

    def _log_ratio(self, group: Group, key: NoiseKey, velocity: Tensor, old_velocity: Tensor) -> Tensor:
        """[P, G]; of a mirrored sample, whose noise is -eps, from its twin's: `log r- = -log r+ - mean_p z^2`."""
        step = group.step
        dtype = torch.promote_types(velocity.dtype, torch.float32)
        coefficients = on_device([(step.c_x, step.c_v, step.s)], velocity.device, dtype)
        streams = key.streams(group)
        by_state = streams.reshape(len(velocity), -1, 3)
        log_ratio = self.ops.replay_log_ratio(
            velocity, old_velocity, coefficients.expand(len(velocity), 3).contiguous(), by_state, key.seed
        )
        if min(group.signs) < 0:
            z = (velocity.to(dtype) - old_velocity.to(dtype)) * (step.c_v / step.s)
            signs = on_device(group.signs, velocity.device).reshape(len(group.sources), -1)
            mirrored = (signs < 0).repeat(len(streams), 1)
            log_ratio = torch.where(mirrored, -log_ratio - z.square().flatten(1).mean(1, keepdim=True), log_ratio)
        return log_ratio.reshape(len(streams), group.size)

    def _stored_log_ratio(
        self, group: Group, velocity: Tensor, old_velocity: Tensor, states: Tensor, samples: Tensor
    ) -> Tensor:
        """[P, G]: `log N(x'; c_x x + c_v v_new, s^2) - log N(x'; c_x x + c_v v_old, s^2)`, means over elements."""
        step, each = group.step, group.size // len(group.sources)
        coefficients = on_device([(step.c_x, step.c_v, step.s)] * len(samples), samples.device, states.dtype)
        left = states.repeat_interleave(each, 0)
        new, old = (
            self.ops.gaussian_log_prob(samples, left, v.repeat_interleave(each, 0), coefficients)
            for v in (velocity, old_velocity)
        )
        return (new - old).reshape(-1, group.size)

    def _mixed(self, rewards: Tensor, num_views: int) -> tuple[Tensor, Tensor, str]:
        """Rewards [K V, P, G] -> the rewards, their weights and how the op is to mix them."""
        weights = on_device(self.weights, rewards.device, rewards.dtype)
        by_view = rewards.unflatten(0, (len(weights), num_views))
        if self.scale_rewards == "std" and self.mix == "reward" and num_views > 1:
            return torch.einsum("k,kvpg->vpg", weights, by_view), weights.new_ones(num_views), "advantage"
        mix = "reward" if self.scale_rewards == "none" else self.mix
        return rewards, weights.repeat_interleave(num_views), mix

    def _surrogate(
        self, rewards: Tensor, log_ratio: Tensor, weights: Tensor, mix: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [], advantages [P, G] and clip fraction [] of rewards [K, P, G]."""
        loss, advantages, clip_fraction = self.ops.group_advantage_clip_loss(
            rewards.unsqueeze(2), log_ratio.unsqueeze(1), weights, mix, self.clip_range, self.advantage_clip
        )
        return loss, advantages.squeeze(1), clip_fraction


def policy_mismatch(group: Group, velocity: Tensor, rollout_velocity: Tensor) -> Tensor:
    """`rms_p [c_v (v_update - v_rollout) / s]`: how far the update's mean is from the rollout's, in units of its noise.

    0 where both forwards are bit-equal; the rest is batch-size rounding of the model. [P * S, L, C] twice -> [].
    """
    delta = velocity.detach().float() - rollout_velocity.float()
    return (delta * (group.step.c_v / group.step.s)).square().mean().sqrt()
