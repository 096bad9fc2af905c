"""`egrpo plan`: a recipe's schedule and the work it makes. What it costs: `commands/cost.py`."""

from typing import Any

from egrpo_fast.config import Config, plan_of
from egrpo_fast.plan import Plan


def describe(config: Config) -> dict[str, Any]:
    """The schedule and the work of one wavefront, as plain numbers. Loads no model."""
    plan = plan_of(config, 0)
    schedule, group_size = plan.schedule, {group.index: group.size for group in plan.groups}
    return {
        "method": config.method.name,
        "steps": [
            {
                "step": index,
                "t": schedule.times[index],
                "sigma": schedule.sigma(index),
                "duration": schedule.times[index] - schedule.times[index + length],
                "entropy_unmerged": schedule.entropy(index, 1),
                "merge": length,
                "entropy": schedule.entropy(index, length),
                "trained": index in group_size,
                "group_size": group_size.get(index, 0),
            }
            for index, length in enumerate(schedule.merges)
        ],
        "work": _work(plan, config),
    }


def _work(plan: Plan, config: Config) -> dict[str, Any]:
    prompts = config.rollout.prompts_per_rollout
    rows = [len(wave.sources) * prompts for wave in plan.waves]
    micro_batch = config.rollout.most_rows
    return {
        "prompts_per_rollout": prompts,
        "rows_by_step": rows,
        "model_calls": sum(-(-count // (micro_batch or count)) for count in rows),
        "evaluations_without_gradient": plan.evaluations * prompts,
        "evaluations_with_gradient": plan.trained_states * prompts,
        "images": len(plan.image_rows) * prompts,
        # What sampling every image by itself would take, from the noise on: a prefix of ODE steps, then its branch.
        "evaluations_one_image_at_a_time": prompts * plan.evaluations_alone,
    }


def print_plan(description: dict[str, Any]) -> None:
    print(f"{'step':>4} {'t':>7} {'sigma':>7} {'D':>7} {'H plain':>8} {'merge':>6} {'H':>7}  trained")
    for step in description["steps"]:
        trained = f"G = {step['group_size']}" if step["trained"] else "-"
        print(
            f"{step['step']:>4} {step['t']:>7.4f} {step['sigma']:>7.4f} {step['duration']:>7.4f} "
            f"{step['entropy_unmerged']:>8.3f} {step['merge']:>6} {step['entropy']:>7.3f}  {trained}"
        )
    work = description["work"]
    print(
        f"\nH: per-dimension entropy sqrt(2 pi e) sigma sqrt(D) of the SDE step; D: time it spans, merged.\n\n"
        f"one wavefront of {work['prompts_per_rollout']} prompt(s), {work['images']} images:\n"
        f"  rows by step                       {' '.join(map(str, work['rows_by_step']))}\n"
        f"  model calls                        {work['model_calls']}\n"
        f"  evaluations without gradient       {work['evaluations_without_gradient']}\n"
        f"  evaluations with gradient          {work['evaluations_with_gradient']}\n"
        f"  one image at a time: evaluations {work['evaluations_one_image_at_a_time']}"
    )
