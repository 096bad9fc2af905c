"""`sde_step`: all samples of an iteration leave their states at once, with noise and without."""

from functools import partial

import torch


def minimal_bytes(problem) -> int:
    """x and v read, x' and the model's copy written."""
    return problem.rows * problem.numel * (4 + 2 + 4 + 2)


def eager(latents, velocity, coefficients, streams, seed, model_dtype):
    c_x, c_v, s = coefficients[:, :, None, None].unbind(1)
    following = c_x * latents + c_v * velocity.float() + s * torch.randn_like(latents)
    return following, following.to(model_dtype)


def arguments(problem, s=0.7):
    return (
        problem.normal(problem.rows),
        problem.normal(problem.rows, torch.bfloat16),
        problem.coefficients(problem.rows, s),
        problem.streams(problem.rows),
        7,
        torch.bfloat16,
    )


def test_sde_step(measure):
    measure("sde_step", arguments, minimal_bytes, eager)


def test_sde_step_without_noise(measure):
    measure("sde_step", partial(arguments, s=0.0), minimal_bytes, eager)
