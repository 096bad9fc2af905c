"""Log-density of a stored sample under one affine step: the truth of `gaussian_log_prob`."""

import math

import torch
from torch import Tensor

from egrpo_fast.kernels.reference.sde_step import column


def gaussian_log_prob_ref(sample: Tensor, latents: Tensor, velocity: Tensor, coefficients: Tensor) -> Tensor:
    """`mean_p log N(x'_p; c_x x_p + c_v v_p, s^2)` of every row; differentiable in velocity.

    sample, latents, velocity [R, ...]; coefficients [R, 3] = (c_x, c_v, s), s > 0. Returns [R] in the dtype of latents.
    """
    mean = column(coefficients, 0, latents) * latents + column(coefficients, 1, latents) * velocity.to(latents.dtype)
    z = (sample.to(latents.dtype) - mean) / column(coefficients, 2, latents)
    constant = torch.log(coefficients[:, 2]) + 0.5 * math.log(2.0 * math.pi)
    return -0.5 * z.square().flatten(1).mean(1) - constant
