"""What the op tests share: devices, random rows, poisoned memory, and the one table of tolerances.

On a CPU the Triton kernels run under its interpreter, which must be on before Triton is imported, hence here. The same
tests, marked `gpu`, run compiled on a CUDA device: `TRITON_INTERPRET=0 pytest -m gpu tests/kernels`.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from egrpo_fast.ops import Ops, choose

FACTOR = 2.0
"""A kernel's largest error is at most twice that of eager PyTorch in the same dtype, both against float64 ..."""
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""... plus one rounding of the largest value, since eager may hit the truth by luck. Half a unit in the last place
(bfloat16 a whole one: a float32 result a rounding away may fall to the other side of a tie). Of a mean whose terms
cancel, the largest value says nothing: there it is one rounding of the terms' mean size."""

SHAPES = {"one": (1,), "127": (127,), "tokens": (9, 64), "flux+1": (2025 * 64 + 1,)}
MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda rows: rows,
    "offset": lambda rows: torch.cat((rows[:1], rows))[1:],
    "strided": lambda rows: rows.repeat_interleave(2, 0)[::2],
}
UNALIGNED: dict[str, Callable[[Tensor], Tensor]] = {
    "wide": lambda rows: torch.cat((rows, rows[:, :1]), 1)[:, : rows.shape[1]],
    "wider": lambda rows: torch.cat((rows, rows[:, :3]), 1)[:, : rows.shape[1]],
}
"""The same rows from elsewhere in memory. Longer rows cut short break 16-byte alignment: a compiled kernel shares them
out among its threads in another way, so that their sum has another order, the same one for all unaligned rows."""


def name(value: object) -> str:
    return str(value).removeprefix("torch.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device`, `dtype` (of the model), `shape`, `layout`, `aligned`: a test that takes one runs on all of them."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="session")
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", MODEL_DTYPES, ids=name)
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
    if "layout" in metafunc.fixturenames:
        layouts = ALIGNED | UNALIGNED
        metafunc.parametrize("layout", layouts.values(), ids=layouts.keys())
    if "aligned" in metafunc.fixturenames:
        metafunc.parametrize("aligned", ALIGNED.values(), ids=ALIGNED.keys())


@pytest.fixture
def triton_ops(device: str) -> Ops:
    return choose("triton", device)


@pytest.fixture
def reference_ops(device: str) -> Ops:
    return choose("reference", device)


@pytest.fixture
def normal(device: str) -> Callable[..., Tensor]:
    """normal(*shape, dtype=float32): seeded values of the device under test, the same on every one."""
    generator = torch.Generator().manual_seed(20260104)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return draw


@pytest.fixture
def coefficients(device: str) -> Callable[..., Tensor]:
    """coefficients(rows): (c_x, c_v, s), alternately an SDE and an ODE row; noisy=True: SDE rows only."""

    def make(rows: int, noisy: bool = False) -> Tensor:
        table = [(0.93 - 0.01 * i, -0.21 - 0.02 * i, 0.71 if noisy or i % 2 == 0 else 0.0) for i in range(rows)]
        return torch.tensor(table, device=device).reshape(rows, 3)

    return make


@pytest.fixture
def streams(device: str) -> Callable[..., Tensor]:
    """streams(*shape): distinct streams [*shape, 3] whose words use all 32 bits."""

    def make(*shape: int) -> Tensor:
        index = torch.arange(math.prod(shape), device=device)
        words = torch.stack((0xFFFFFFFF - index * 0, 0x80000000 + index // 3, (index % 3) << 16 | index), -1)
        return words.reshape(*shape, 3)

    return make


@pytest.fixture
def unaligned() -> tuple[Callable[[Tensor], Tensor], ...]:
    """Two layouts of unaligned rows."""
    return tuple(UNALIGNED.values())


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory reads NaN: an element that no kernel wrote cannot pass."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        tensor = new_empty(self, *args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def _error(result: Tensor, truth: Tensor) -> float:
    finite = truth.isfinite()
    difference = (result.double() - truth)[finite].abs()
    return difference.max().item() if difference.numel() else 0.0


@pytest.fixture
def judge(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """judge(what, result, eager, truth): the tolerance rule. eager: same dtype as result; truth: float64.

    terms: of what is a mean, the mean size of its terms.
    """

    def check(what: str, result: Tensor, eager: Tensor, truth: Tensor, terms: float = 0.0) -> None:
        assert result.dtype == eager.dtype and truth.dtype == torch.float64
        assert result.shape == eager.shape == truth.shape
        # What leaves the range of the dtype in eager PyTorch must do so here, and nothing else may.
        same = result.isfinite() == eager.isfinite()
        assert same.all(), f"{what}: {int((~same).sum())} elements finite in only one of kernel and eager PyTorch"
        truth = truth.where(eager.isfinite(), math.inf)
        finite = truth[truth.isfinite()].abs()
        largest = finite.max().item() if finite.numel() else 0.0
        allowed = FACTOR * _error(eager, truth) + ROUNDOFF[result.dtype] * max(largest, terms)
        found = _error(result, truth)
        record_property(what, f"error {found:.2e}, allowed {allowed:.2e}")
        assert found <= allowed, f"{what}: error {found:.3e}, eager {_error(eager, truth):.3e}, allowed {allowed:.3e}"

    return check
