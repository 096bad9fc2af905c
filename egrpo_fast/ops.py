"""The public ops, their argument checks, and the one place that chooses reference, Triton or extension.

Shapes: R rows, S source rows or groups, E edges, G samples of a group, K rewards, P prompts. A row is one image's
packed latents [tokens, channels], or any trailing shape; rows may lie anywhere (`x[::2]`, `x[3:]`), each contiguous in
itself. State is float32 (float64 on the reference, for tests); velocity and model copies may be bfloat16, float16 or
float32 (float64 on the reference).

Checks are the same for every backend, and a ValueError names the argument. Shapes, dtypes and devices are always
checked: host work of microseconds. Values are checked on the CPU: s >= 0 in `sde_step`, s > 0 in `gaussian_log_prob`
and `replay_log_ratio`, rewards of finite range in `group_advantage_clip_loss`. To read a value on a GPU, the host would
have to wait for it. So there, and while torch.compile traces, no value is read and every op can be captured in a CUDA
graph; what depends on a wrong value comes out as NaN, from every backend. The values in the tables of `branch_rows` are
right because the plan that makes them is checked (`plan.py`), and the extension on the CPU checks them at every call.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import combinations
from types import MappingProxyType, ModuleType

import torch
from torch import Tensor

from egrpo_fast.kernels import reference

BACKENDS = ("reference", "triton", "extension")
"""Modules of `kernels/` with OPS (op name -> implementation) and unavailable(device) -> reason or None."""
PREFERENCE = {"cuda": ("triton", "extension", "reference"), "cpu": ("extension", "reference")}
"""What `auto` tries on a device type, op by op, first to last: on an H100 Triton's `branch_rows` was the faster one
(docs/kernels.md). Triton's interpreter is only for those who ask."""
MIXES = ("reward", "advantage")

Dtypes = tuple[torch.dtype, ...]

STATE = (torch.float32,)
MODEL = (torch.bfloat16, torch.float16, torch.float32)
REFERENCE_ONLY = (torch.float64,)
MAX_ELEMENTS = 2**31 - 1
"""Of one row: positions inside a row are 32-bit; rows and bytes are counted in 64."""
MAX_GROUP = 2048
"""Samples of a group that `group_advantage_clip_loss` takes: one program of the Triton kernel holds a whole group."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_values(condition: Callable[[], Tensor], device: torch.device, message: str) -> None:
    """Where reading them costs no wait; elsewhere the op answers a wrong value with NaN."""
    if device.type == "cpu" and not torch.compiler.is_compiling():
        _require(bool(condition().all()), message)


def _require_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: Dtypes,
    device: torch.device,
    contiguous: bool = False,
) -> None:
    fits = len(shape) == tensor.ndim and all(want in (None, size) for want, size in zip(shape, tensor.shape))
    _require(fits, f"{name}: shape {tuple(tensor.shape)}, expected {shape} (None: any)")
    _require(tensor.dtype in dtypes, f"{name}: dtype {tensor.dtype}, allowed: {', '.join(map(str, dtypes))}")
    _require(tensor.device == device, f"{name}: on {tensor.device}, expected on {device} like the other arguments")
    _require(not contiguous or tensor.is_contiguous(), f"{name}: strides {tensor.stride()}, expected contiguous")


def _require_rows(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], dtypes: Dtypes, device: torch.device
) -> None:
    _require_tensor(name, tensor, shape, dtypes, device)
    contiguous = len(tensor) == 0 or tensor[0].is_contiguous()
    _require(contiguous, f"{name}: strides {tensor.stride()}, expected every row contiguous in itself")


def _require_apart(**rows: Tensor | None) -> None:
    """Rows that do not lie on one another, and arguments that share no memory: what an op in place relies on."""
    spans = {}
    for name, tensor in rows.items():
        if tensor is None or len(tensor) == 0:
            continue
        row = tensor[0].numel()
        _require(len(tensor) == 1 or tensor.stride(0) >= row, f"{name}: strides {tensor.stride()}, rows overlap")
        start = tensor.data_ptr()
        spans[name] = (start, start + ((len(tensor) - 1) * tensor.stride(0) + row) * tensor.element_size())
    for (one, (start, end)), (other, (other_start, other_end)) in combinations(spans.items(), 2):
        _require(end <= other_start or other_end <= start, f"{other}: shares memory with {one}")


def _row_shape(name: str, tensor: Tensor) -> torch.Size:
    _require(tensor.ndim >= 2, f"{name}: shape {tuple(tensor.shape)}, expected rows of at least one dimension")
    numel = tensor.shape[1:].numel()
    _require(0 < numel <= MAX_ELEMENTS, f"{name}: rows of {numel} elements, allowed: 1 to {MAX_ELEMENTS}")
    return tensor.shape[1:]


def _require_seed(seed: int) -> None:
    _require(0 <= seed < 2**63, f"seed: {seed}, allowed: 0 to 2^63 - 1")


@dataclass(frozen=True)
class Ops:
    """One implementation of every op on one type of device. `chosen` names the backend of each."""

    device_type: str
    chosen: Mapping[str, str]
    _implementation: Mapping[str, Callable]

    def _accepted(self, op: str, anchor: str, tensor: Tensor) -> tuple[Dtypes, Dtypes]:
        """State and model dtypes that the op's backend takes; refuses an `anchor` argument on a foreign device."""
        here, there = tensor.device.type, self.device_type
        _require(here == there, f"{anchor}: on {here!r}, these ops were chosen for {there!r}")
        extra = REFERENCE_ONLY if self.chosen[op] == "reference" else ()
        return STATE + extra, MODEL + extra

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

        latents [R, ...] float32; velocity [R, ...]; coefficients [R, 3] = (c_x, c_v, s) in latents' dtype, s >= 0;
        streams int64 [R, 3] (`noise.streams`). Returns x' and, from the same pass, its copy in model_dtype for the
        model (x' itself where that is latents' own dtype or None). Not differentiable on every backend.
        Minimal bytes per element: x 4 + v 2 read, x' 4 + copy 2 written = 12 (bfloat16), 10 without a copy.
        """
        state, model = self._accepted("sde_step", "latents", latents)
        shape, rows, device = _row_shape("latents", latents), len(latents), latents.device
        _require_rows("latents", latents, (rows, *shape), state, device)
        _require_rows("velocity", velocity, (rows, *shape), model, device)
        _require_tensor("coefficients", coefficients, (rows, 3), (latents.dtype,), device, contiguous=True)
        _require_tensor("streams", streams, (rows, 3), (torch.int64,), device, contiguous=True)
        _require_seed(seed)
        model_dtype = model_dtype or latents.dtype
        _require(model_dtype in model, f"model_dtype: {model_dtype}, allowed: {', '.join(map(str, model))}")
        message = "coefficients: s below 0 or NaN, allowed: s >= 0"
        _require_values(lambda: coefficients[:, 2] >= 0, device, message)
        return self._implementation["sde_step"](latents, velocity, coefficients, streams, seed, model_dtype)

    def gaussian_log_prob(self, sample: Tensor, latents: Tensor, velocity: Tensor, coefficients: Tensor) -> Tensor:
        """`mean_p log N(x'_p; c_x x_p + c_v v_p, s^2)` of every stored sample; differentiable in velocity only.

        sample, latents, velocity [R, ...]; coefficients [R, 3], s > 0. Returns [R] in latents' dtype.
        Minimal bytes per element: sample 2 + x 4 + v 2 read = 8 (bfloat16; float32 samples 10); backward 2 more.
        """
        state, model = self._accepted("gaussian_log_prob", "latents", latents)
        shape, rows, device = _row_shape("latents", latents), len(latents), latents.device
        _require_rows("latents", latents, (rows, *shape), state, device)
        _require_rows("sample", sample, (rows, *shape), model, device)
        _require_rows("velocity", velocity, (rows, *shape), model, device)
        _require_tensor("coefficients", coefficients, (rows, 3), (latents.dtype,), device, contiguous=True)
        _require_values(lambda: coefficients[:, 2] > 0, device, "coefficients: s not above 0, a density needs s > 0")
        return self._implementation["gaussian_log_prob"](sample, latents, velocity, coefficients)

    def replay_log_ratio(
        self, velocity: Tensor, old_velocity: Tensor, coefficients: Tensor, streams: Tensor, seed: int
    ) -> Tensor:
        """`log r_i = mean_p [eps_ip z_p - z_p^2 / 2]`, `z = c_v (v_new - v_old) / s`; differentiable in velocity only.

        velocity, old_velocity [S, ...], one per group; coefficients [S, 3], s > 0; streams int64 [S, G, 3].
        Returns [S, G] in coefficients' dtype. No sample and no stored noise is read: eps comes from the streams.
        Minimal bytes per element of a *group*, whatever G: two velocities 2 + 2 read = 4 (bfloat16); backward 2 more.
        """
        state, model = self._accepted("replay_log_ratio", "velocity", velocity)
        shape, groups, device = _row_shape("velocity", velocity), len(velocity), velocity.device
        _require_rows("velocity", velocity, (groups, *shape), model, device)
        _require_rows("old_velocity", old_velocity, (groups, *shape), model, device)
        _require_tensor("coefficients", coefficients, (groups, 3), state, device, contiguous=True)
        _require_tensor("streams", streams, (groups, None, 3), (torch.int64,), device, contiguous=True)
        _require_seed(seed)
        message = "coefficients: s not above 0, a ratio of densities needs s > 0"
        _require_values(lambda: coefficients[:, 2] > 0, device, message)
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
        loss is differentiable; any strides, one dtype. Returns loss [], advantages [P, S, G], clip_fraction [].
        A group without spread has advantage 0. A sample that the clip binds has gradient 0, even where its ratio leaves
        the dtype. Advantages are NaN in a group whose mixed rewards hold NaN or have an infinite range. G <= 2048.
        Minimal bytes per sample: 4 K + 4 read, advantage 4 + gradient 4 written.
        """
        state, _ = self._accepted("group_advantage_clip_loss", "log_ratio", log_ratio)
        device = log_ratio.device
        _require_tensor("log_ratio", log_ratio, (None, None, None), state, device)
        _require(log_ratio.numel() > 0, f"log_ratio: shape {tuple(log_ratio.shape)}, expected at least one sample")
        _require(log_ratio.shape[2] <= MAX_GROUP, f"log_ratio: groups of {log_ratio.shape[2]}, allowed: to {MAX_GROUP}")
        _require_tensor("rewards", rewards, (None, *log_ratio.shape), (log_ratio.dtype,), device)
        _require(len(rewards) > 0, f"rewards: shape {tuple(rewards.shape)}, expected at least one reward")
        _require_tensor("weights", weights, (len(rewards),), (log_ratio.dtype,), device, contiguous=True)
        _require(mix in MIXES, f"mix: {mix!r}, allowed: {', '.join(MIXES)}")
        _require(clip_range > 0, f"clip_range: {clip_range}, allowed: above 0")
        _require(advantage_clip > 0, f"advantage_clip: {advantage_clip}, allowed: above 0")
        # One reduction sees NaN, infinity and a group whose range leaves the dtype.
        message = "rewards: NaN, or of infinite range"
        _require_values(lambda: (rewards.amax(-1) - rewards.amin(-1)).isfinite(), device, message)
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
        none another's. The tables' values are checked where they are made (`plan.py`), not at every step.
        Minimal bytes per element: x 4 + v 2 read per source, x' 4 + copy 2 written per edge = 6 S + 6 E (bfloat16).
        """
        state, model = self._accepted("branch_rows", "latents", latents)
        shape, device = _row_shape("latents", latents), latents.device
        _require_rows("latents", latents, (None, *shape), state, device)
        if model_latents is not None:
            _require_rows("model_latents", model_latents, tuple(latents.shape), model, device)
        _require_rows("velocity", velocity, (None, *shape), model, device)
        count, edges, words = len(velocity), len(destinations), torch.int32
        _require_tensor("sources", sources, (count,), (words,), device, contiguous=True)
        _require_tensor("offsets", offsets, (count + 1,), (words,), device, contiguous=True)
        _require_tensor("destinations", destinations, (edges,), (words,), device, contiguous=True)
        _require_tensor("coefficients", coefficients, (edges, 3), (latents.dtype,), device, contiguous=True)
        _require_tensor("draws", draws, (edges,), (torch.int64,), device, contiguous=True)
        _require_tensor("slots", slots, (edges,), (words,), device, contiguous=True)
        _require_tensor("prompts", prompts, (None,), (torch.int64,), device, contiguous=True)
        if not torch.compiler.is_compiling():
            _require_apart(latents=latents, velocity=velocity, model_latents=model_latents)
        _require(0 <= iteration < 2**32, f"iteration: {iteration}, allowed: 0 to 2^32 - 1")
        _require_seed(seed)
        self._implementation["branch_rows"](
            latents, model_latents, velocity, sources, offsets, destinations, coefficients, draws, slots, prompts,
            iteration, seed,
        )  # fmt: skip


def _module(backend: str) -> ModuleType:
    return import_module(f"egrpo_fast.kernels.{backend}")


def choose(backend: str = "auto", device: torch.device | str = "cpu") -> Ops:
    """The ops of one backend, or with 'auto', op by op, the first of PREFERENCE that has it and runs on the device.

    A backend that was asked for by name and cannot run is a ValueError that says why; ops that it does not have (the
    extension has branch_rows alone) come from the reference, as `chosen` tells. Only the reference takes float64: ask
    for it by name there.
    """
    device = torch.device(device)
    if backend != "auto":
        _require(backend in BACKENDS, f"backend: {backend!r}, allowed: auto, {', '.join(BACKENDS)}")
        reason = _module(backend).unavailable(device)
        _require(reason is None, f"backend: {backend!r} cannot run on {device}: {reason}")
    order = PREFERENCE.get(device.type, ("reference",)) if backend == "auto" else (backend, "reference")
    usable = {name: module for name in order if (module := _module(name)).unavailable(device) is None}
    chosen = {op: next(name for name in usable if op in usable[name].OPS) for op in reference.OPS}
    implementation = {op: usable[name].OPS[op] for op, name in chosen.items()}
    return Ops(device.type, MappingProxyType(chosen), MappingProxyType(implementation))
