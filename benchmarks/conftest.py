"""How ops are timed: FLUX problems, device events, rotated buffers, a copy measured in the same run.

On a GPU every case records the quantiles of its device time, and with --write-results they go to
`results/<gpu>.csv`, each as soon as it is measured. On a CPU the cases run at the size of Shapes under pytest-benchmark
alone, and no row is written. Run: `pytest benchmarks -o python_files='*.py'`.
"""

import csv
import datetime
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import cycle, islice, pairwise
from pathlib import Path

import pytest
import torch

from egrpo_fast.kernels import reference

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = {
    "cuda": ("triton", "extension", "reference", "eager", "compiled"),
    "cpu": ("extension", "reference", "eager"),
}
"""eager: how one would write the op in PyTorch, noise from torch.randn; compiled: torch.compile of that."""
TARGET = 0.85
"""Share of the copy bandwidth that a memory-bound op should reach."""

CALLS, ROUNDS, WARM_UP = 16, 8, 5
PATIENCE = 1e6
"""Microseconds of device time after which a case has been measured enough."""
ROTATED, MOST_SETS = 512 * 2**20, 128
"""Bytes that the argument sets of a case span together, several times any L2 cache, and how many sets at most."""


@dataclass(frozen=True)
class Problem:
    """What an iteration of training brings to an op: `prompts` prompts, 8 active steps, 12 samples of each."""

    tokens: int
    channels: int
    prompts: int
    steps: int = 8
    samples: int = 12
    device: str = DEVICE

    @property
    def rows(self) -> int:
        return self.prompts * self.steps * self.samples

    @property
    def numel(self) -> int:
        return self.tokens * self.channels

    def normal(self, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(rows, self.tokens, self.channels, device=self.device).to(dtype)

    def coefficients(self, rows: int, s: float = 0.7) -> torch.Tensor:
        return torch.tensor([[0.93, -0.21, s]], device=self.device).repeat(rows, 1)

    def streams(self, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return torch.arange(3 * count, device=self.device).reshape(*shape, 3)


PROBLEMS = {
    "cuda": {
        f"{name}-{prompts}": Problem(tokens, 64, prompts)
        for name, tokens in (("720px", 2025), ("1024px", 4096))
        for prompts in (1, 4)
    },
    "cpu": {"shapes-1": Problem(64, 16, 1)},
}[DEVICE]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-results", action="store_true", help="write benchmarks/results/<gpu>.csv")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    # One file per op; the others here are programs of their own.
    return True if collection_path.suffix == ".py" and collection_path.stem not in reference.OPS else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measure" in metafunc.fixturenames:
        metafunc.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
        metafunc.parametrize("implementation", IMPLEMENTATIONS[DEVICE])


def implementation_of(op: str, implementation: str, eager: Callable) -> Callable | None:
    """The function to time; None where this implementation does not have the op or does not run here."""
    if implementation == "eager":
        return eager
    if implementation == "compiled":
        torch._dynamo.reset()
        return torch.compile(eager, dynamic=False)
    module = import_module(f"egrpo_fast.kernels.{implementation}")
    return module.OPS.get(op) if module.unavailable(torch.device(DEVICE)) is None else None


def device_microseconds(call: Callable, argument_sets: Sequence[tuple]) -> torch.Tensor:
    """Device time of single calls, sorted. The host runs ahead while the device sleeps, so launches are not in it."""
    rotation = cycle(argument_sets)
    for arguments in islice(rotation, WARM_UP):
        call(*arguments)
    times: list[float] = []
    for _ in range(ROUNDS):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
        torch.cuda._sleep(20_000_000)
        events[0].record()
        for event, arguments in zip(events[1:], rotation):
            call(*arguments)
            event.record()
        torch.cuda.synchronize()
        times += [1e3 * first.elapsed_time(second) for first, second in pairwise(events)]
        if sum(times) > PATIENCE:
            break
    return torch.tensor(times).sort().values


@cache
def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy of 1 GiB, bytes read and written."""
    sets = [(torch.empty(2**28, device="cuda"), torch.empty(2**28, device="cuda")) for _ in range(2)]
    return 2 * 2**30 / (device_microseconds(torch.Tensor.copy_, sets).median().item() * 1e-6)


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark, problem: Problem, implementation: str) -> Callable[..., None]:
    """measure(op, arguments, minimal_bytes, eager, wrap): times one implementation on one problem.

    arguments(problem): what the op is called with. minimal_bytes(problem): what any implementation has to move.
    wrap(call): what is timed instead of the op itself, such as its forward and backward.
    """

    def run(
        op: str,
        arguments: Callable[[Problem], tuple],
        minimal_bytes: Callable[[Problem], int],
        eager: Callable,
        wrap: Callable[[Callable], Callable] = lambda call: call,
    ) -> None:
        call = implementation_of(op, implementation, eager)
        if call is None:
            pytest.skip(f"{op}: no {implementation} implementation on {DEVICE}")
        call, moved = wrap(call), minimal_bytes(problem)
        if DEVICE == "cpu":
            benchmark(call, *arguments(problem))
            return
        try:
            sets = [arguments(problem) for _ in range(min(MOST_SETS, 1 + ROTATED // moved))]
            times = device_microseconds(call, sets)
            low, median, high = (times.quantile(q).item() for q in (0.1, 0.5, 0.9))
            benchmark.pedantic(lambda: (call(*sets[0]), torch.cuda.synchronize()), rounds=3)
        except torch.OutOfMemoryError:
            pytest.skip("does not fit into this GPU's memory")
        share = moved / (median * 1e-6) / copy_bandwidth()
        row = {
            "case": request.node.originalname.removeprefix("test_"),
            "implementation": implementation,
            "tokens": problem.tokens,
            "channels": problem.channels,
            "prompts": problem.prompts,
            "minimal_bytes": moved,
            "us_q10": f"{low:.2f}",
            "us_median": f"{median:.2f}",
            "us_q90": f"{high:.2f}",
            "gb_per_s": f"{moved / median * 1e-3:.1f}",
            "copy_gb_per_s": f"{copy_bandwidth() * 1e-9:.1f}",
            "share_of_copy": f"{share:.3f}",
            "reaches_target": "yes" if share >= TARGET else "no",
        }
        benchmark.extra_info.update(row)
        if request.config.getoption("--write-results"):
            write(row | versions())

    return run


CASE = ("case", "implementation", "tokens", "channels", "prompts")


def write(row: dict[str, object]) -> None:
    """Into the GPU's file at once, in the place of what an earlier run measured of the same case."""
    path = RESULTS / f"{torch.cuda.get_device_name().replace(' ', '-').lower()}.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    case = [str(row[name]) for name in CASE]
    rows = [other for other in rows if [other[name] for name in CASE] != case]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        writer.writeheader()
        writer.writerows([*rows, row])


@cache
def versions() -> dict[str, str]:
    command = ["git", "describe", "--always", "--dirty"]
    described = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": import_module("triton").__version__,
        "cuda": str(torch.version.cuda),
        "commit": os.environ.get("COMMIT") or described.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }
