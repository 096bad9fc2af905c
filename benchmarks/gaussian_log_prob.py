"""`gaussian_log_prob` of every stored sample of an iteration, alone and with its backward."""

import math

import torch


def arguments(problem):
    return (
        problem.normal(problem.rows, torch.bfloat16),
        problem.normal(problem.rows),
        problem.normal(problem.rows, torch.bfloat16).requires_grad_(),
        problem.coefficients(problem.rows),
    )


def forward_bytes(problem) -> int:
    """Sample, x and v read."""
    return problem.rows * problem.numel * (2 + 4 + 2)


def backward_bytes(problem) -> int:
    """The same twice, and the gradient of v written."""
    return 2 * forward_bytes(problem) + problem.rows * problem.numel * 2


def eager(sample, latents, velocity, coefficients):
    c_x, c_v, s = coefficients[:, :, None, None].unbind(1)
    z = (sample.float() - c_x * latents - c_v * velocity.float()) / s
    return -0.5 * z.square().mean((1, 2)) - (s.log() + 0.5 * math.log(2 * math.pi)).flatten()


def with_backward(call):
    def forward_and_backward(sample, latents, velocity, coefficients):
        return torch.autograd.grad(call(sample, latents, velocity, coefficients).sum(), velocity)

    return forward_and_backward


def test_gaussian_log_prob(measure):
    measure("gaussian_log_prob", arguments, forward_bytes, eager, torch.no_grad())


def test_gaussian_log_prob_and_backward(measure):
    measure("gaussian_log_prob", arguments, backward_bytes, eager, with_backward)
