"""BranchGRPO: a tree of stochastic trajectories."""

from collections.abc import Container, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from egrpo_fast.methods.method import Method, Run, require_increasing
from egrpo_fast.methods.trajectories import trajectories
from egrpo_fast.plan import Plan
from egrpo_fast.schedule import Schedule, SdeForm
from egrpo_fast.section import Natural, Positive


class BranchGrpo(Method):
    name: Literal["branch_grpo"] = "branch_grpo"
    """BranchGRPO; its tree says how many images there are."""
    splits: list[Natural] = Field([0, 3, 6, 9], min_length=1)
    """Grid indices at which every row splits."""
    branching: Annotated[int, Field(ge=2, le=65536)] = 2
    """Children of a split."""
    max_rows: Annotated[int, Field(ge=2, le=65536)] = 64
    """Most leaves of a prompt's tree."""
    pruned_steps: Natural = 0
    """Steps in a row that are not trained: from the end, sliding towards the last split."""
    slide_every: Positive = 30
    """Iterations until they slide by one."""
    extremes: Natural = 0
    """Only the nodes above so many best and as many worst leaves are trained; 0: all are."""

    sde_form: ClassVar[SdeForm] = "dance_grpo"

    @property
    def uses(self) -> set[str]:
        return set()

    def check(self, num_steps: int) -> None:
        last, last_split = num_steps - 1, max(self.splits)
        if last_split >= last:
            raise ValueError(f"method.splits: {last_split} is the last step or past it; allowed: 0 to {last - 1}")
        leaves = self.branching ** min(len(self.splits), 17)  # 2^17 are too many already
        if leaves > self.max_rows:
            raise ValueError(f"method.max_rows: a tree of {leaves} leaves is wider than {self.max_rows}")
        if 2 * self.extremes > leaves:
            raise ValueError(f"method.extremes: {self.extremes} best and worst of {leaves}; at most {leaves // 2}")
        if self.pruned_steps >= last - last_split:
            message = f"{self.pruned_steps}; after the last split at most {last - last_split - 1}"
            raise ValueError(f"method.pruned_steps: {message}")
        require_increasing("splits", self.splits)

    def plan(self, run: Run) -> Plan:
        count, last_split = run.schedule.num_steps - 1, max(self.splits)
        trained = unpruned_steps(count, self.pruned_steps, self.slide_every, last_split, run.iteration)
        return branch_grpo(run.schedule, self.splits, self.branching, trained, self.extremes, run.antithetic)


def branch_grpo(
    schedule: Schedule,
    splits: Sequence[int],
    branching: int,
    trained: Container[int],
    extremes: int = 0,
    antithetic: bool = False,
) -> Plan:
    """BranchGRPO (arXiv 2509.06040): a tree, stochastic from its first split on, each split into `branching` children.

    A node's reward is the mean of the leaves under it, its advantage is among the nodes of its depth. extremes: only
    the nodes above so many best and worst leaves are trained; 0: all.
    """
    stochastic = range(min(splits), schedule.num_steps - 1)
    return trajectories(schedule, stochastic, trained, dict.fromkeys(splits, branching), 1, 1, antithetic, extremes)


def unpruned_steps(count: int, size: int, every: int, last_split: int, iteration: int) -> list[int]:
    """Grid indices below `count` but a window of `size`, which begins at the end and slides towards the last split."""
    start = max(count - size - iteration // every, last_split + 1)
    return [index for index in range(count) if not start <= index < start + size]
