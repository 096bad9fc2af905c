"""What a plan is made for: GPUs by their data sheets, and how many of them in how many machines."""

from dataclasses import dataclass

from egrpo_fast.config import Config
from egrpo_fast.config.recipe_files import read_yaml

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """flops: dense bfloat16 peak per second. memory: bytes that torch can have. bandwidth: its own, bytes per second.
    link: bytes per second and direction to the other GPUs of its machine."""

    flops: float
    memory: float
    bandwidth: float
    link: float


GPUS = {
    "A100": Gpu(312e12, 79.1 * GIB, 2.04e12, 300e9),
    "H100": Gpu(989e12, 79.1 * GIB, 3.35e12, 450e9),
    "H200": Gpu(989e12, 139.8 * GIB, 4.8e12, 450e9),
    "B200": Gpu(2250e12, 178.0 * GIB, 8.0e12, 900e9),
    "RTX4090": Gpu(165e12, 23.5 * GIB, 1.01e12, 32e9),
    "cpu": Gpu(0.1e12, 16.0 * GIB, 0.02e12, 10e9),
}
"""Vendors' peaks: SXM modules with NVLink (A100 of 80 GB, B200 of 180 GB), RTX4090 on PCIe 4; a small CPU."""
UNITS = {"tflops": 1e12, "memory": GIB, "bandwidth": 1e9, "link": 1e9}
"""What the numbers of a GPU of one's own are given in: TFLOP/s, GiB, GB/s, GB/s; in the order of `Gpu`."""


def parse_gpu(text: str) -> tuple[str, Gpu]:
    """Name and numbers of `NAME`, one of GPUS, or `NAME={tflops: ..., memory: ..., bandwidth: ..., link: ...}`.

    ValueError: it is neither.
    """
    name, equals, numbers = text.partition("=")
    if not equals:
        if name not in GPUS:
            message = f"there are {', '.join(GPUS)}; of another give the numbers: {name}={{{': N, '.join(UNITS)}: N}}"
            raise ValueError(f"--gpu: {name!r} is unknown; {message}")
        return name, GPUS[name]
    given = read_yaml(numbers, "--gpu")
    if not isinstance(given, dict) or given.keys() != UNITS.keys():
        raise ValueError(f"--gpu: {name}={{{': N, '.join(UNITS)}: N}} is needed, not {numbers!r}")
    for key, value in given.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
            raise ValueError(f"--gpu: {key}: {value!r} is no number above 0 and below 1e9")
    return name, Gpu(*(unit * given[key] for key, unit in UNITS.items()))


RESERVE = 2 * GIB
"""Assumed for the CUDA context, NCCL, libraries' workspaces and what the allocator cannot use."""


@dataclass(frozen=True)
class Cluster:
    """gpus: in all, spread evenly over nodes. network: bytes per second and GPU between machines. utilisation: share of
    the peak FLOP/s that is reached; assumed, not measured. own: numbers of a kind that is none of GPUS."""

    gpus: int = 8
    nodes: int = 1
    kind: str = "H100"
    utilisation: float = 0.4
    network: float = 50e9
    own: Gpu | None = None

    def __post_init__(self) -> None:
        if self.own is None:
            parse_gpu(self.kind)
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise ValueError(f"--nodes: {self.gpus} GPUs cannot be spread evenly over {self.nodes} machines")

    @property
    def gpu(self) -> Gpu:
        return self.own or GPUS[self.kind]

    @property
    def reserve(self) -> float:
        return 0.0 if self.kind == "cpu" else RESERVE


def default_gpus(config: Config) -> int:
    """The most GPUs, up to 8, that share an iteration's prompts evenly."""
    return max(count for count in range(1, 9) if config.prompts.per_iteration % count == 0)
