"""A wavefront to test with: random rows, random tables, and the library or the reason why it is not there."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor


@dataclass
class Wave:
    """Arguments of `branch_rows`, in its order."""

    latents: Tensor
    model_latents: Tensor | None
    velocity: Tensor
    sources: Tensor
    offsets: Tensor
    destinations: Tensor
    coefficients: Tensor
    draws: Tensor
    slots: Tensor
    prompts: Tensor
    iteration: int = 3
    seed: int = 0x0123456789ABCDEF

    def apply(self, op: Callable[..., None]) -> tuple[Tensor, Tensor | None]:
        """Latents and model latents after the op, on copies; rows that nothing names keep their poison."""
        after = replace(
            self,
            latents=self.latents.clone(),
            model_latents=None if self.model_latents is None else self.model_latents.clone(),
        )
        op(*after.arguments())
        return after.latents, after.model_latents

    def arguments(self) -> list[Tensor | int | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def to(self, device: str) -> "Wave":
        moved = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)


def make_wave(
    degrees: list[int],
    shape: tuple[int, ...] = (5, 7),
    noise: float | None = 0.5,
    velocity_dtype: torch.dtype = torch.float32,
    model_dtype: torch.dtype | None = torch.bfloat16,
    in_place: bool = True,
    num_prompts: int = 2,
    generator_seed: int = 0,
) -> Wave:
    """One source per degree, rows in random order. noise: s of every other edge (None: ODE only).

    in_place: the first edge of a source leads back to it. Rows that the tables do not name are NaN.
    """
    g = torch.Generator().manual_seed(generator_seed)
    edges, count = sum(degrees), len(degrees)
    num_rows = count + edges + 2
    rows = torch.randperm(num_rows, generator=g)
    sources, free = rows[:count], rows[count:].tolist()
    destinations = []
    for source, degree in zip(sources.tolist(), degrees):
        own = [source] if in_place and degree else []
        destinations += own + [free.pop() for _ in range(degree - len(own))]
    latents = torch.full((num_rows, *shape), torch.nan)
    latents[sources] = torch.randn(count, *shape, generator=g)
    coefficients = torch.rand(edges, 3, generator=g) + torch.tensor([0.5, -1.0, 0.0])
    coefficients[:, 2] = 0.0
    if noise is not None:
        coefficients[::2, 2] = noise
    return Wave(
        latents=latents,
        model_latents=None if model_dtype is None else torch.full((num_rows, *shape), torch.nan, dtype=model_dtype),
        velocity=torch.randn(count, *shape, generator=g).to(velocity_dtype),
        sources=sources.int(),
        offsets=torch.tensor([0, *torch.tensor(degrees).cumsum(0).tolist()], dtype=torch.int32),
        destinations=torch.tensor(destinations, dtype=torch.int32),
        coefficients=coefficients,
        draws=torch.randint(0, 2**32, (edges,), generator=g),
        slots=torch.randint(0, num_prompts, (edges,), generator=g, dtype=torch.int32),
        prompts=torch.randint(0, 2**32, (num_prompts,), generator=g),
    )


@pytest.fixture(scope="session")
def extension() -> ModuleType:
    from egrpo_fast.kernels import extension

    if reason := extension.unavailable(torch.device("cpu")):
        pytest.skip(reason)
    return extension


@pytest.fixture(name="make_wave", scope="session")
def make_wave_fixture() -> Callable[..., Wave]:
    return make_wave
