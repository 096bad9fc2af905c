"""Time grid, affine steps and merges: the closed forms of the algorithm (paper, sections 3.1 to 3.3).

t = 1 is noise, t = 0 the image; grid index 0 is the noisiest step. Pure functions of numbers, in Python floats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from egrpo_fast.entropy import entropy, merge_length

SdeForm = Literal["flow_grpo", "dance_grpo", "cps"]
"""Whose stochastic step it is: see `Schedule.sde`."""
Solver = Literal["euler", "ab2", "dpm2m"]
"""How the steps of an ODE tail follow each other: see `Schedule.extrapolation`."""


@dataclass(frozen=True)
class AffineStep:
    """`x' = c_x x + c_v v + s eps`, eps ~ N(0, I): one sampling step, deterministic where s = 0."""

    c_x: float
    c_v: float
    s: float

    @property
    def entropy(self) -> float:
        """Per-dimension entropy of the step's policy."""
        return entropy(self.s)


def time_grid(num_steps: int, shift: float) -> tuple[float, ...]:
    """`t_i = shift u_i / (1 + (shift - 1) u_i)`, `u_i = 1 - i / T`, i = 0..T."""
    fractions = (1.0 - i / num_steps for i in range(num_steps + 1))
    return tuple(shift * u / (1.0 + (shift - 1.0) * u) for u in fractions)


@dataclass(frozen=True)
class Schedule:
    """The grid and, for every grid index, how many grid steps its SDE step spans.

    times: t_0 = 1 > ... > t_T = 0. eta: noise scale a. merges: one length per grid index. active: trained grid indices.
    sde_form: what a stochastic step looks like.
    """

    times: tuple[float, ...]
    eta: float
    merges: tuple[int, ...]
    active: tuple[int, ...]
    sde_form: SdeForm = "flow_grpo"

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    def sigma(self, index: int) -> float:
        """Noise scale at a grid index; one plain step has `s = sigma sqrt(D)`.

        flow_grpo: `a sqrt(t / (1 - t))`; at t = 1, where it would be infinite, 1 - t is replaced by 1 - t_1.
        dance_grpo: a. cps: what its plain step amounts to.
        """
        if self.sde_form == "dance_grpo":
            return self.eta
        if self.sde_form == "cps":
            return self.sde(index, 1).s / math.sqrt(self.times[index] - self.times[index + 1])
        return self.eta * math.sqrt(self.times[index] / (1.0 - self.times[max(index, 1)]))

    def ode(self, index: int, following: int) -> AffineStep:
        """`x' = x - D v` from grid index `index` to `following`, D the time between them."""
        return AffineStep(1.0, -(self.times[index] - self.times[following]), 0.0)

    def extrapolation(self, solver: Solver, before: int, index: int, following: int) -> float:
        """h of a multistep ODE step `x' = x - D [v + h (v - v_before)]` from `index` to `following`.

        v_before is the velocity at grid index `before`, where the trajectory's last step began. euler: 0. ab2:
        `D / (2 D_before)`, Adams-Bashforth. dpm2m: the same of log-SNR `log((1 - t) / t)` in place of time, as
        DPM-Solver++(2M) (arXiv 2211.01095) weighs its predictions; 0 from t = 1 and to t = 0, where that is infinite.
        """
        first, here, end = (self.times[place] for place in (before, index, following))
        if solver == "euler" or (solver == "dpm2m" and (first == 1.0 or end == 0.0)):
            return 0.0
        if solver == "dpm2m":
            first, here, end = (math.log(t / (1.0 - t)) for t in (first, here, end))
        return (here - end) / (2.0 * (first - here))

    def sde(self, index: int, length: int) -> AffineStep:
        """The stochastic step from grid index `index` over `length` grid steps, from time t to t', D = t - t'.

        flow_grpo, dance_grpo: `x' = x - D [v + sigma^2 / (2 t) (x + (1 - t) v)] + sigma sqrt(D) eps`, sigma and t of
        the starting time; as steps shrink, samples keep the flow's marginals.
        cps (coefficients-preserving sampling, arXiv 2509.05952): `x' = (1 - t') x_0 + sqrt(t'^2 - s^2) x_1 + s eps`,
        `s = t' sin(a pi / 2)`, with the predictions x_0 = x - t v and x_1 = x + (1 - t) v; the noise level is that of
        t' at any step size, as far as the predictions are right. No noise is added in a step to t' = 0.
        """
        t, end = self.times[index], self.times[index + length]
        if self.sde_form == "cps":
            s = end * math.sin(self.eta * math.pi / 2.0)
            kept = end * math.cos(self.eta * math.pi / 2.0)
            return AffineStep(c_x=1.0 - end + kept, c_v=kept * (1.0 - t) - (1.0 - end) * t, s=s)
        duration = t - end
        drift = self.sigma(index) ** 2 / (2.0 * t)
        return AffineStep(
            c_x=1.0 - duration * drift,
            c_v=-duration * (1.0 + drift * (1.0 - t)),
            s=self.sigma(index) * math.sqrt(duration),
        )

    def entropy(self, index: int, length: int) -> float:
        """Per-dimension entropy of the stochastic step at a grid index that spans `length` grid steps."""
        return self.sde(index, length).entropy


def make_schedule(
    num_steps: int = 16,
    shift: float | Sequence[float] = 3.0,
    eta: float = 0.7,
    entropy_threshold: float = 2.2,
    merge_lengths: int | Sequence[int] | None = None,
    max_merge: int | None = None,
    active_steps: Sequence[int] | None = None,
    sde_form: SdeForm = "flow_grpo",
) -> Schedule:
    """The schedule of a run.

    shift: of the grid; or the grid itself, num_steps + 1 times from 1 to 0.
    merge_lengths, one for all or a list by grid index, overrides the threshold; a single number is cut at t = 0.
    max_merge caps what the threshold asks for. active_steps: None for the first half of the grid.
    Arguments are trusted: `config/` refuses what is out of range.
    """
    times = time_grid(num_steps, shift) if isinstance(shift, int | float) else tuple(shift)
    plain = Schedule(times, eta, (1,) * num_steps, (), sde_form)
    remaining = [num_steps - index for index in range(num_steps)]
    if merge_lengths is None:
        reach = [min(left, max_merge or left) for left in remaining]
        merges = tuple(
            merge_length([plain.entropy(index, length) for length in range(1, reach[index] + 1)], entropy_threshold)
            for index in range(num_steps)
        )
    elif isinstance(merge_lengths, int):
        merges = tuple(min(merge_lengths, left) for left in remaining)
    else:
        merges = tuple(merge_lengths)
    active = tuple(range(num_steps // 2)) if active_steps is None else tuple(active_steps)
    return Schedule(times, eta, merges, active, sde_form)
