"""DanceGRPO: Flow-GRPO's trajectories, from one noise and with a constant noise scale."""

from typing import ClassVar, Literal

from pydantic import Field

from egrpo_fast.methods.flow_grpo import chosen_steps, flow_grpo
from egrpo_fast.methods.method import Method, Run
from egrpo_fast.plan import Plan
from egrpo_fast.schedule import SdeForm


class DanceGrpo(Method):
    name: Literal["dance_grpo"] = "dance_grpo"
    """DanceGRPO."""
    fraction: float = Field(0.6, gt=0.0, le=1.0)
    """Share of the steps that is trained, drawn anew every iteration."""
    same_noise: bool = True
    """Whether the trajectories of a prompt share their initial noise."""

    sde_form: ClassVar[SdeForm] = "dance_grpo"

    def plan(self, run: Run) -> Plan:
        trained = chosen_steps(run.schedule.num_steps - 1, self.fraction, run.seed, run.iteration)
        return flow_grpo(run.schedule, run.group_size, trained, self.same_noise, run.antithetic)
