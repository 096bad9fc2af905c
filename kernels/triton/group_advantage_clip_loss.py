"""Group advantages, the clipped surrogate, its gradient and the clip fraction, in one launch of one program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from egrpo_fast.kernels.triton.launch import OPTIONS, on_device


@triton.jit
def _standardise(values, inside, group_size):
    """`(R - mean) / std` along axis 1; 0 where a group has no spread, NaN where it holds NaN. As in the reference."""
    spread = tl.where(inside, values - tl.min(tl.where(inside, values, float("inf")), 1, keep_dims=True), 0.0)
    peak = tl.max(spread, 1, keep_dims=True)
    unit = tl.div_rn(spread, tl.where(peak > 0, peak, 1.0))
    total = tl.sum(unit, 1, keep_dims=True)
    centred = tl.where(inside, unit - tl.div_rn(total, tl.cast(group_size, tl.float32)), 0.0)
    freedom = tl.cast(tl.maximum(group_size - 1, 1), tl.float32)
    deviation = tl.sqrt_rn(tl.div_rn(tl.sum(centred * centred, 1, keep_dims=True), freedom))
    # Compiled minima and maxima pass over NaN; the sum does not.
    return tl.where(peak > 0, tl.div_rn(centred, tl.where(peak > 0, deviation, 1.0)), total * 0.0)


@triton.jit
def _clamp(values, lowest, highest):
    """NaN stays NaN."""
    return tl.where(values > highest, highest, tl.where(values < lowest, lowest, values))


@triton.jit
def _group_advantage_clip_loss_kernel(
    rewards,
    log_ratio,
    weights,
    loss,
    advantages,
    clip_fraction,
    gradient,
    reward_stride,
    reward_prompt_stride,
    reward_step_stride,
    reward_sample_stride,
    ratio_prompt_stride,
    ratio_step_stride,
    ratio_sample_stride,
    num_rewards,
    groups,
    steps,
    group_size,
    lowest,
    highest,
    advantage_clip,
    BY_ADVANTAGE: tl.constexpr,
    TILE: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    member = tl.arange(0, MEMBERS)[None, :]
    count = tl.cast(groups * group_size, tl.float32)
    surrogate = tl.zeros([TILE, MEMBERS], tl.float64)
    clipped_count = tl.zeros([TILE, MEMBERS], tl.float64)
    for first in range(0, groups, TILE):
        group = first + tl.arange(0, TILE)[:, None]
        inside = (group < groups) & (member < group_size)
        prompt = (group // steps).to(tl.int64)
        step = (group % steps).to(tl.int64)
        reward = rewards + prompt * reward_prompt_stride + step * reward_step_stride + member * reward_sample_stride
        mixed = tl.zeros([TILE, MEMBERS], tl.float32)
        for index in range(num_rewards):
            values = tl.load(reward + tl.cast(index, tl.int64) * reward_stride, mask=inside, other=0.0)
            if BY_ADVANTAGE:
                values = _standardise(values, inside, group_size)
            mixed += tl.load(weights + index) * values
        if not BY_ADVANTAGE:
            mixed = _standardise(mixed, inside, group_size)
        advantage = _clamp(mixed, -advantage_clip, advantage_clip)

        ratio_at = prompt * ratio_prompt_stride + step * ratio_step_stride + member * ratio_sample_stride
        # The device's float32 exponential is off by more than the clip range can bear; a few hundred numbers can
        # afford float64.
        ratio = tl.exp(tl.load(log_ratio + ratio_at, mask=inside, other=0.0).to(tl.float64)).to(tl.float32)
        plain = ratio * advantage
        clipped = _clamp(ratio, lowest, highest) * advantage
        binds = inside & (clipped < plain)
        surrogate += tl.where(inside, tl.where(binds, clipped, plain), 0.0)
        clipped_count += binds.to(tl.float64)
        at = group.to(tl.int64) * group_size + member
        tl.store(advantages + at, advantage, mask=inside)
        tl.store(gradient + at, tl.where(binds, 0.0, tl.div_rn(-plain, count)), mask=inside)
    tl.store(loss, (-tl.sum(surrogate) / count).to(tl.float32))
    tl.store(clip_fraction, (tl.sum(clipped_count) / count).to(tl.float32))


@torch.library.custom_op("egrpo_fast_triton::group_advantage_clip_loss", mutates_args=())
def _group_advantage_clip_loss(
    rewards: Tensor,
    log_ratio: Tensor,
    weights: Tensor,
    by_advantage: bool,
    clip_range: float,
    advantage_clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _outputs(rewards, log_ratio, weights, by_advantage, clip_range, advantage_clip)
    loss, advantages, clip_fraction, gradient = outputs
    prompts, steps, group_size = log_ratio.shape
    members = triton.next_power_of_2(group_size)
    with on_device(log_ratio):
        _group_advantage_clip_loss_kernel[(1,)](
            rewards, log_ratio, weights, loss, advantages, clip_fraction, gradient, *rewards.stride(),
            *log_ratio.stride(), rewards.shape[0], prompts * steps, steps, group_size, 1.0 - clip_range,
            1.0 + clip_range, advantage_clip, BY_ADVANTAGE=by_advantage, TILE=max(1, 512 // members), MEMBERS=members,
            **OPTIONS,
        )  # fmt: skip
    return outputs


@_group_advantage_clip_loss.register_fake
def _outputs(
    rewards: Tensor,
    log_ratio: Tensor,
    weights: Tensor,
    by_advantage: bool,
    clip_range: float,
    advantage_clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = log_ratio.shape
    return log_ratio.new_empty(()), log_ratio.new_empty(shape), log_ratio.new_empty(()), log_ratio.new_empty(shape)


def _save(ctx, inputs, output) -> None:
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(output[3])


def _backward(ctx, loss_gradient: Tensor, *_: Tensor) -> tuple[None, Tensor, None, None, None, None]:
    (gradient,) = ctx.saved_tensors
    return None, loss_gradient * gradient, None, None, None, None


_group_advantage_clip_loss.register_autograd(_backward, setup_context=_save)


def group_advantage_clip_loss(
    rewards: Tensor, log_ratio: Tensor, weights: Tensor, mix: str, clip_range: float, advantage_clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, forward and gradient. Bytes per sample: 4 K + 4 read, 8 written; a few kilobytes in all.

    One program walks all groups in a fixed order: a second stage would cost more than it would share out.
    """
    loss, advantages, clip_fraction, _ = _group_advantage_clip_loss(
        rewards, log_ratio, weights, mix == "advantage", clip_range, advantage_clip
    )
    return loss, advantages, clip_fraction
