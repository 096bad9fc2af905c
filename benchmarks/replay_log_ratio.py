"""`replay_log_ratio` of every group of an iteration, alone and with its backward."""

import torch

SEED = 7


def arguments(problem):
    groups = problem.prompts * problem.steps
    old = problem.normal(groups, torch.bfloat16)
    return (
        (old + 0.01 * problem.normal(groups)).bfloat16().requires_grad_(),
        old,
        problem.coefficients(groups),
        problem.streams(groups, problem.samples),
        SEED,
    )


def forward_bytes(problem) -> int:
    """Two velocities read, whatever the number of samples."""
    return problem.prompts * problem.steps * problem.numel * (2 + 2)


def backward_bytes(problem) -> int:
    """The same twice, and the gradient of the new velocity written."""
    return 2 * forward_bytes(problem) + problem.prompts * problem.steps * problem.numel * 2


def eager(velocity, old_velocity, coefficients, streams, seed):
    z = (velocity.float() - old_velocity.float()).flatten(1) * (coefficients[:, 1:2] / coefficients[:, 2:])
    eps = torch.randn(*streams.shape[:2], z.shape[1], device=z.device)
    return (eps * z[:, None]).mean(2) - 0.5 * z.square().mean(1, keepdim=True)


def with_backward(call):
    def forward_and_backward(velocity, *rest):
        return torch.autograd.grad(call(velocity, *rest).sum(), velocity)

    return forward_and_backward


def test_replay_log_ratio(measure):
    measure("replay_log_ratio", arguments, forward_bytes, eager, torch.no_grad())


def test_replay_log_ratio_and_backward(measure):
    measure("replay_log_ratio", arguments, backward_bytes, eager, with_backward)
