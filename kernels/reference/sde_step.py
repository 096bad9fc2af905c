"""`x' = c_x x + c_v v + s eps`, row by row: the truth of `sde_step`."""

import torch
from torch import Tensor

from egrpo_fast.kernels.reference.philox import philox_normal


def column(coefficients: Tensor, index: int, like: Tensor) -> Tensor:
    """Coefficient `index` of every row, shaped to broadcast over the row's elements."""
    return coefficients[:, index].reshape(-1, *[1] * (like.ndim - 1))


def sde_step_ref(
    latents: Tensor, velocity: Tensor, coefficients: Tensor, streams: Tensor, seed: int, model_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One affine step of every row, noise drawn only where s > 0.

    latents, velocity [R, ...]; coefficients [R, 3] = (c_x, c_v, s) in the dtype of latents; streams int64 [R, 3].
    Operation order, each rounded: `((c_x x) + (c_v v)) + (s eps)`. Returns [R, ...] in the dtype of latents, and the
    same in model_dtype.
    """
    v = velocity.to(latents.dtype)
    following = column(coefficients, 0, latents) * latents + column(coefficients, 1, latents) * v
    noisy = (coefficients[:, 2] > 0).nonzero().squeeze(1)
    if noisy.numel():
        eps = philox_normal(streams[noisy], latents[0].numel(), seed, latents.dtype).reshape(-1, *latents.shape[1:])
        following = following.index_add(0, noisy, column(coefficients[noisy], 2, latents) * eps)
    return following, following.to(model_dtype)
