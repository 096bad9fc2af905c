"""The public ops, their argument checks, and the one place that chooses reference, Triton or extension.

Shapes: R rows, S source rows or groups, E edges, G samples of a group, K rewards, P prompts. A row is one picture's
packed latents [tokens, channels], or any trailing shape. State is float32 (float64 in tests, reference only); velocity
and model copies may be bfloat16, float16 or float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from egrpo_fast.kernels import reference

BACKENDS = {"reference": reference}
"""Backend name -> module with OPS (op name -> implementation) and unavailable(device) -> reason or None."""
PREFERENCE = ("reference",)
"""What `auto` tries, op by op, first to last."""
MIXES = ("reward", "advantage")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_tensor(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    fits = len(shape) == tensor.ndim and all(want in (None, size) for want, size in zip(shape, tensor.shape))
    _require(fits, f"{name}: shape {tuple(tensor.shape)}, expected {shape} (None: any)")
    _require(tensor.dtype in dtypes, f"{name}: dtype {tensor.dtype}, allowed: {', '.join(map(str, dtypes))}")


def _require_device(device: torch.device, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        _require(tensor.device == device, f"{name}: on {tensor.device}, the other arguments are on {device}")


STATE = (torch.float32, torch.float64)
MODEL = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _require_rows(latents: Tensor, velocity: Tensor, coefficients: Tensor) -> None:
    _require(latents.ndim >= 2, f"latents: shape {tuple(latents.shape)}, expected rows of at least one dimension")
    _require_tensor("latents", latents, (None, *latents.shape[1:]), STATE)
    _require_tensor("velocity", velocity, (None, *latents.shape[1:]), MODEL)
    _require_tensor("coefficients", coefficients, (None, 3), (latents.dtype,))
    _require_device(latents.device, velocity=velocity, coefficients=coefficients)


@dataclass(frozen=True)
class Ops:
    """One implementation of every op. `chosen` names the backend of each."""

    chosen: Mapping[str, str]
    _implementation: Mapping[str, Callable]

    def sde_step(
        self,
        latents: Tensor,
        velocity: Tensor,
        coefficients: Tensor,
        streams: Tensor,
        seed: int,
        model_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`x' = c_x x + c_v v + s eps`, row by row; rows with s = 0 draw no noise.

        latents [R, ...] float32; velocity [R, ...]; coefficients [R, 3] = (c_x, c_v, s) in latents' dtype; streams
        int64 [R, 3] (`noise.streams`). Returns x' and, from the same pass, its copy in model_dtype for the model (x'
        itself where that is latents' own dtype or None).
        """
        _require_rows(latents, velocity, coefficients)
        rows = latents.shape[0]
        _require(velocity.shape[0] == rows, f"velocity: {velocity.shape[0]} rows, latents have {rows}")
        _require(coefficients.shape[0] == rows, f"coefficients: {coefficients.shape[0]} rows, latents have {rows}")
        _require_tensor("streams", streams, (rows, 3), (torch.int64,))
        _require_device(latents.device, streams=streams)
        following = self._implementation["sde_step"](latents, velocity, coefficients, streams, seed)
        return following, following.to(model_dtype or following.dtype)

    def gaussian_log_prob(self, sample: Tensor, latents: Tensor, velocity: Tensor, coefficients: Tensor) -> Tensor:
        """`mean_p log N(x'_p; c_x x_p + c_v v_p, s^2)` of every stored sample; differentiable in velocity.

        sample, latents, velocity [R, ...]; coefficients [R, 3], s > 0. Returns [R].
        """
        _require_rows(latents, velocity, coefficients)
        _require_tensor("sample", sample, tuple(latents.shape), MODEL)
        _require_tensor("velocity", velocity, tuple(latents.shape), MODEL)
        _require_device(latents.device, sample=sample)
        return self._implementation["gaussian_log_prob"](sample, latents, velocity, coefficients)

    def replay_log_ratio(
        self, velocity: Tensor, old_velocity: Tensor, coefficients: Tensor, streams: Tensor, seed: int
    ) -> Tensor:
        """`log r_i = mean_p [eps_ip z_p - z_p^2 / 2]`, `z = c_v (v_new - v_old) / s`; differentiable in velocity.

        velocity, old_velocity [S, ...], one per group; coefficients [S, 3], s > 0; streams int64 [S, G, 3].
        Returns [S, G]. No sample and no stored noise is read: eps comes from the streams.
        """
        groups = velocity.shape[0]
        _require_tensor("velocity", velocity, (groups, *velocity.shape[1:]), MODEL)
        _require_tensor("old_velocity", old_velocity, tuple(velocity.shape), MODEL)
        _require_tensor("coefficients", coefficients, (groups, 3), STATE)
        _require_tensor("streams", streams, (groups, None, 3), (torch.int64,))
        _require_device(velocity.device, old_velocity=old_velocity, coefficients=coefficients, streams=streams)
        return self._implementation["replay_log_ratio"](velocity, old_velocity, coefficients, streams, seed)

    def group_advantage_clip_loss(
        self,
        rewards: Tensor,
        log_ratio: Tensor,
        weights: Tensor,
        mix: str,
        clip_range: float,
        advantage_clip: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages inside each (prompt, step) group and `loss = -mean min(r A, clip(r, 1 - c, 1 + c) A)`.

        rewards [K, P, S, G], weights [K] (mixed as `mix`: 'reward' or 'advantage'), log_ratio [P, S, G], in which the
        loss is differentiable. Returns loss [], advantages [P, S, G], clip_fraction [].
        """
        _require_tensor("log_ratio", log_ratio, (None, None, None), STATE)
        _require_tensor("rewards", rewards, (None, *log_ratio.shape), STATE)
        _require_tensor("weights", weights, (rewards.shape[0],), STATE)
        _require_device(log_ratio.device, rewards=rewards, weights=weights)
        _require(mix in MIXES, f"mix: {mix!r}, allowed: {', '.join(MIXES)}")
        return self._implementation["group_advantage_clip_loss"](
            rewards, log_ratio, weights, mix, clip_range, advantage_clip
        )

    def branch_rows(
        self,
        latents: Tensor,
        model_latents: Tensor | None,
        velocity: Tensor,
        sources: Tensor,
        offsets: Tensor,
        destinations: Tensor,
        coefficients: Tensor,
        draws: Tensor,
        slots: Tensor,
        prompts: Tensor,
        iteration: int,
        seed: int,
    ) -> None:
        """Next state of every source row and of all its branches, in place: one launch per grid step.

        For source i and its edges e in offsets[i]:offsets[i + 1]:
        `latents[destinations[e]] = c_x latents[sources[i]] + c_v velocity[i] + s eps_e`,
        eps_e from stream (iteration, prompts[slots[e]], draws[e]) where s > 0.
        latents [R, ...], and model_latents like it in the model's dtype or None, are written; velocity [S, ...] in the
        order of sources int32 [S]; offsets int32 [S + 1]; destinations, slots int32 [E]; coefficients [E, 3];
        draws int64 [E] (`noise.draw_word`); prompts int64 [P]. Destinations are distinct; one may be its own source,
        none another's. The tables are checked where they are made (`plan.py`), not at every step.
        """
        _require_rows(latents, velocity, coefficients)
        self._implementation["branch_rows"](
            latents, model_latents, velocity, sources, offsets, destinations, coefficients, draws, slots, prompts,
            iteration, seed,
        )  # fmt: skip


def choose(backend: str = "auto", device: torch.device | str = "cpu") -> Ops:
    """The ops of one backend, or with 'auto' the first of PREFERENCE that has the op and runs on the device.

    A backend that was asked for by name and cannot run is a ValueError that says why.
    """
    device = torch.device(device)
    if backend != "auto":
        _require(backend in BACKENDS, f"backend: {backend!r}, allowed: auto, {', '.join(BACKENDS)}")
        reason = BACKENDS[backend].unavailable(device)
        _require(reason is None, f"backend: {backend!r} cannot run on {device}: {reason}")
    order = PREFERENCE if backend == "auto" else (backend, "reference")
    usable = [name for name in order if BACKENDS[name].unavailable(device) is None]
    chosen = {op: next(name for name in usable if op in BACKENDS[name].OPS) for op in reference.OPS}
    implementation = {op: BACKENDS[name].OPS[op] for op, name in chosen.items()}
    return Ops(MappingProxyType(chosen), MappingProxyType(implementation))
