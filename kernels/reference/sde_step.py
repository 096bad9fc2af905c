"""`x' = c_x x + c_v v + s eps`, row by row: the truth of `sde_step`."""

import torch
from torch import Tensor

from egrpo_fast.kernels.reference.philox import philox_normal


def column(coefficients: Tensor, index: int, like: Tensor) -> Tensor:
    """Coefficient `index` of every row, shaped to broadcast over the row's elements."""
    return coefficients[:, index].reshape(-1, *[1] * (like.ndim - 1))


def positive(coefficients: Tensor) -> Tensor:
    """s of every row where it is above 0, else NaN: what is no standard deviation must not look like one."""
    s = coefficients[:, 2]
    return s.where(s > 0, torch.nan)


def sde_step_ref(
    latents: Tensor, velocity: Tensor, coefficients: Tensor, streams: Tensor, seed: int, model_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One affine step of every row, noise drawn only where s is not 0.

    latents, velocity [R, ...]; coefficients [R, 3] = (c_x, c_v, s) in the dtype of latents; streams int64 [R, 3].
    Operation order, each rounded: `((c_x x) + (c_v v)) + (s eps)`. Returns [R, ...] in the dtype of latents, and the
    same in model_dtype. A row whose s is below 0 or NaN comes out as NaN.
    """
    v = velocity.to(latents.dtype)
    following = column(coefficients, 0, latents) * latents + column(coefficients, 1, latents) * v
    noisy = (coefficients[:, 2] != 0).nonzero().squeeze(1)
    if noisy.numel():
        eps = philox_normal(streams[noisy], latents[0].numel(), seed, latents.dtype).reshape(-1, *latents.shape[1:])
        scale = positive(coefficients[noisy]).reshape(-1, *[1] * (latents.ndim - 1))
        following = following.index_add(0, noisy, scale * eps)
    return following, following.to(model_dtype)
