"""Log-ratio of a group's samples under a new velocity, from seed and streams alone: the truth of `replay_log_ratio`."""

import torch
from torch import Tensor

from egrpo_fast.kernels.reference.philox import philox_normal
from egrpo_fast.kernels.reference.sde_step import positive


def replay_log_ratio_ref(
    velocity: Tensor, old_velocity: Tensor, coefficients: Tensor, streams: Tensor, seed: int
) -> Tensor:
    """`log r_i = mean_p [ eps_ip z_p - z_p^2 / 2 ]` with `z = c_v (v_new - v_old) / s`; differentiable in velocity.

    Sample i was `x'_i = mean_old + s eps_i`, so `log N(x'_i; mean_new, s^2) - log N(x'_i; mean_old, s^2)` is exactly
    this: no sample is stored and nothing large is subtracted. Gradient: `d log r_i / dv = c_v (eps_i - z) / (s N)`.
    velocity, old_velocity [S, ...]; coefficients [S, 3], s > 0; streams int64 [S, G, 3]. Returns [S, G] in the dtype of
    coefficients, NaN where s is not above 0. Source: the project's design; the identity is that of two Gaussians of
    equal variance.
    """
    dtype = coefficients.dtype
    delta = (velocity.to(dtype) - old_velocity.to(dtype)).flatten(1)
    z = delta * (coefficients[:, 1] / positive(coefficients)).unsqueeze(1)
    eps = philox_normal(streams, z.shape[1], seed, dtype)
    return torch.einsum("sgp,sp->sg", eps, z) / z.shape[1] - 0.5 * z.square().mean(1, keepdim=True)
