"""The compiled backend (`csrc/`): one library of ops on PyTorch's stable ABI, loaded here and nowhere else.

Where the library is missing or cannot be loaded, `unavailable` says why, once as a warning, and `egrpo_fast.ops` falls
back to another backend. What it computes, what is bitwise and how to build it: docs/extension.md.
"""

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(os.environ.get("EGRPO_EXTENSION") or Path(__file__).with_name("_C.abi3.so"))
"""EGRPO_EXTENSION names another build of the library (the sanitizers')."""


def _load() -> str | None:
    """Why the library is not loaded; None: it is."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built; `pip install --no-build-isolation -e .` builds it (docs/extension.md)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} cannot be loaded ({error}); build it again with this torch (docs/extension.md)"
    return None


_MISSING = _load()


@functools.cache
def _warn_missing() -> None:
    warnings.warn(f"egrpo_fast extension: {_MISSING}. Slower backends take its place.", RuntimeWarning, stacklevel=3)


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on the device; None: it can."""
    if _MISSING is not None:
        _warn_missing()
        return _MISSING
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key("egrpo_fast::branch_rows", key):
        return f"{LIBRARY.name} has no {device.type} code (EGRPO_BUILD, docs/extension.md)"
    return None


@contextmanager
def _value_errors() -> Iterator[None]:
    # The stable ABI knows one error type; what the library says about its arguments starts with the op's name.
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("branch_rows: "):
            raise
        raise ValueError(str(error).splitlines()[0]) from None


def _signed(seed: int) -> int:
    """The 64-bit key `seed mod 2^64` as the int64 that an op's schema takes."""
    return (seed + 2**63) % 2**64 - 2**63


def branch_rows(
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
    """`latents[destinations[e]] = ((c_x x) + (c_v v)) + (s eps_e)` for every edge e, in place: one launch.

    Shapes and dtypes: see `egrpo_fast.ops.branch_rows`; latents float32, velocity float32, bfloat16 or float16.
    Tables on the CPU are checked at every call (ValueError); on CUDA their values are not looked at from the host, and
    an entry that points outside is passed over: check them once with `check_tables`.
    """
    with _value_errors():
        torch.ops.egrpo_fast.branch_rows(
            latents, model_latents, velocity, sources, offsets, destinations, coefficients, draws, slots, prompts,
            iteration, _signed(seed),
        )  # fmt: skip
    written = [rows for rows in (latents, model_latents) if rows is not None and not rows.is_inference()]
    torch.autograd.graph.increment_version(written)


def check_tables(
    sources: Tensor,
    offsets: Tensor,
    destinations: Tensor,
    draws: Tensor,
    slots: Tensor,
    num_rows: int,
    num_prompts: int,
) -> None:
    """ValueError where tables (CPU tensors) would read or write outside `num_rows` rows, or write one row twice."""
    with _value_errors():
        torch.ops.egrpo_fast.check_tables(sources, offsets, destinations, draws, slots, num_rows, num_prompts)


if _MISSING is None:

    @torch.library.register_fake("egrpo_fast::branch_rows")
    def _branch_rows_fake(latents: Tensor, *others: Tensor | int | None) -> None:
        devices = {str(other.device) for other in (latents, *others) if isinstance(other, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"branch_rows: arguments on {' and '.join(sorted(devices))}, expected one device")


OPS = {"branch_rows": branch_rows}
