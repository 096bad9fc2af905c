"""An approximated tail against the exact one: rewards of the same samples, within groups; and when it is given up."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from egrpo_fast.config import TailConfig
from egrpo_fast.objective import Objective
from egrpo_fast.plan import Plan

WINDOW = 8
"""Checks that a run judges its tail by: those of so many times `tail.check_every` iterations."""


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0 along the last dimension; equal values share the mean of theirs."""
    ordered = values.sort(-1).values
    first, last = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (first + last - 1).double() / 2


def rank_correlation(exact: Tensor, tail: Tensor) -> Tensor:
    """Spearman's within each group, ties by average ranks: [..., G] twice -> [...] float64.

    NaN where the exact values are all equal, for there is nothing to tell apart; 0 where only the tail's are.
    """
    a, b = (ranks - ranks.mean(-1, keepdim=True) for ranks in map(_ranks, (exact.contiguous(), tail.contiguous())))
    size = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(a.any(-1), torch.where(size > 0, (a * b).sum(-1) / size, 0.0), torch.nan)


@dataclass(frozen=True)
class Comparison:
    """Of P prompts' groups. correlations [N, P]: rank correlation of the advantages of every group, NaN where none is.

    flips [N, P]: share of a group's advantages whose sign is the opposite one. bias []: mean of the tail's reward (the
    weighted sum) less the exact one's.
    """

    correlations: Tensor
    flips: Tensor
    bias: Tensor

    @property
    def correlation(self) -> float:
        return self.correlations.nanmean().item()

    @property
    def standard_error(self) -> float:
        """Of `correlation`, over groups."""
        found = self.correlations[~self.correlations.isnan()]
        return found.std().item() / math.sqrt(len(found) or 1)


def compare(plan: Plan, objective: Objective, exact: Tensor, tail: Tensor) -> Comparison:
    """exact, tail [K, P, images]: rewards of the same samples, finished by the exact tail and by another."""
    correlations, flips = [], []
    for group, both in zip(plan.groups, zip(plan.by_group(exact), plan.by_group(tail))):
        ours, theirs = (objective.advantages(group, rewards) for rewards in both)
        correlations.append(rank_correlation(ours, theirs))
        flips.append((ours * theirs < 0).double().mean(-1))
    weights = torch.tensor(objective.weights, dtype=torch.float64, device=exact.device)
    bias = torch.einsum("k,kpn->pn", weights, (tail - exact).double()).mean()
    return Comparison(torch.stack(correlations), torch.stack(flips), bias)


class TailGuard:
    """Judges a run's tail by its last checks. Its `state` goes into checkpoints: a tail once given up stays so."""

    def __init__(self, settings: TailConfig) -> None:
        self._settings = settings
        self.fallen = False
        self._checks: list[list[float]] = []

    @property
    def state(self) -> dict[str, Any]:
        return {"fallen": self.fallen, "checks": self._checks}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self.fallen, self._checks = state["fallen"], [list(check) for check in state["checks"]]

    def due(self, iteration: int) -> bool:
        every = self._settings.check_every
        return bool(every) and not self.fallen and not self._settings.exact and iteration % every == 0

    def judge(self, correlations: Sequence[float]) -> str | None:
        """correlations: of a check's groups, the same on every rank. Returns why the tail is given up, or None.

        It is where the mean of the last WINDOW checks is below the target by more than its standard error.
        """
        self._checks = [*self._checks, [value for value in correlations if not math.isnan(value)]][-WINDOW:]
        pooled = torch.tensor([value for check in self._checks for value in check], dtype=torch.float64)
        if len(pooled) < 2 or pooled.mean() + pooled.std() / math.sqrt(len(pooled)) >= self._settings.target:
            return None
        self.fallen = True
        return (
            f"rewards of the approximated tail rank samples as the exact one's do with a correlation of "
            f"{pooled.mean():.3f} (tail.target {self._settings.target:g}): the exact tail from now on"
        )
