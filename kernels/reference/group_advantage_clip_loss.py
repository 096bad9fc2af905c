"""Group advantages and the clipped surrogate: the truth of `group_advantage_clip_loss`."""

import torch
from torch import Tensor


def _standardise(values: Tensor) -> Tensor:
    """`(R - mean) / std` over the last dimension (sample standard deviation); 0 where a group has no spread.

    NaN in a group that holds NaN or whose range is infinite.
    """
    # Measured from the group's minimum, in units of its range: nearly equal rewards keep their digits, equal ones give
    # exactly zero, and neither tiny nor huge ones leave the float's range when squared.
    spread = values - values.amin(-1, keepdim=True)
    peak = spread.amax(-1, keepdim=True)
    unit = spread / torch.where(peak == 0, 1.0, peak)
    centred = unit - unit.mean(-1, keepdim=True)
    deviation = centred.square().sum(-1, keepdim=True).div(max(values.shape[-1] - 1, 1)).sqrt()
    return torch.where(peak == 0, 0.0, centred / torch.where(peak == 0, 1.0, deviation))


def group_advantage_ref(rewards: Tensor, weights: Tensor, mix: str, advantage_clip: float) -> Tensor:
    """Advantage of every sample inside its group (prompt, active step).

    rewards [K, P, S, G], weights [K]. mix 'reward': `standardise(sum_k w_k R_k)`; mix 'advantage':
    `sum_k w_k standardise(R_k)`. Clamped to +-advantage_clip. Returns [P, S, G] in the dtype of rewards.
    """
    weights = weights.to(rewards.dtype).reshape(-1, 1, 1, 1)
    if mix == "reward":
        advantages = _standardise((weights * rewards).sum(0))
    else:
        advantages = (weights * _standardise(rewards)).sum(0)
    return advantages.clamp(-advantage_clip, advantage_clip)


def group_advantage_clip_loss_ref(
    rewards: Tensor, log_ratio: Tensor, weights: Tensor, mix: str, clip_range: float, advantage_clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss = -mean min(r A, clip(r, 1 - c, 1 + c) A)` with `r = exp(log_ratio)`; differentiable in log_ratio.

    rewards [K, P, S, G], log_ratio [P, S, G], weights [K]. Returns (loss [], advantages [P, S, G], clip_fraction []),
    where clip_fraction is the share of samples whose clipped branch is the smaller one. They have gradient 0, even
    where their ratio leaves the dtype.
    """
    advantages = group_advantage_ref(rewards, weights, mix, advantage_clip).to(log_ratio.dtype)
    with torch.no_grad():
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range) * advantages
        binds = clipped < ratio * advantages
    # The derivative of an infinite exponential, times 0, would be NaN: where the clip binds, none is taken.
    plain = log_ratio.masked_fill(binds, 0.0).exp() * advantages
    return -torch.where(binds, clipped, plain).mean(), advantages, binds.to(log_ratio.dtype).mean()
