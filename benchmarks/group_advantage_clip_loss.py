"""`group_advantage_clip_loss` of an iteration with two rewards, forward and backward: a few kilobytes, all latency."""

import torch

from egrpo_fast.kernels.reference import group_advantage_clip_loss_ref


def arguments(problem):
    shape = (problem.prompts, problem.steps, problem.samples)
    return (
        torch.randn(2, *shape, device=problem.device),
        (1e-4 * torch.randn(*shape, device=problem.device)).requires_grad_(),
        torch.tensor([1.0, 0.5], device=problem.device),
        "advantage",
        1e-4,
        5.0,
    )


def minimal_bytes(problem) -> int:
    """Two rewards and log-ratios read, advantages and gradient written."""
    return problem.rows * (2 * 4 + 4 + 4 + 4)


def with_backward(call):
    def forward_and_backward(rewards, log_ratio, *rest):
        return torch.autograd.grad(call(rewards, log_ratio, *rest)[0], log_ratio)

    return forward_and_backward


def test_group_advantage_clip_loss(measure):
    measure("group_advantage_clip_loss", arguments, minimal_bytes, group_advantage_clip_loss_ref, with_backward)
