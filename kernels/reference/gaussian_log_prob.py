"""Log-density of a stored sample under one affine step: the truth of `gaussian_log_prob`."""

import math

import torch
from torch import Tensor

from egrpo_fast.kernels.reference.sde_step import column, positive


def gaussian_log_prob_ref(sample: Tensor, latents: Tensor, velocity: Tensor, coefficients: Tensor) -> Tensor:
    """`mean_p log N(x'_p; c_x x_p + c_v v_p, s^2)` of every row; differentiable in velocity.

    sample, latents, velocity [R, ...]; coefficients [R, 3] = (c_x, c_v, s), s > 0. Returns [R] in the dtype of latents,
    NaN where s is not above 0.
    """
    mean = column(coefficients, 0, latents) * latents + column(coefficients, 1, latents) * velocity.to(latents.dtype)
    s = positive(coefficients)
    z = (sample.to(latents.dtype) - mean) / s.reshape(-1, *[1] * (latents.ndim - 1))
    constant = torch.log(s) + 0.5 * math.log(2.0 * math.pi)
    return -0.5 * z.square().flatten(1).mean(1) - constant
