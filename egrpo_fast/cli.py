"""The `egrpo` command: looks at runs without running them. Training itself is `deepspeed egrpo_fast/train.py`."""

import argparse
import json
from pathlib import Path
from typing import Any

from egrpo_fast.config import Config, load_config, recipe_names
from egrpo_fast.plan import Plan, e_grpo_plan


def describe(config: Config) -> dict[str, Any]:
    """The schedule and the work of one prompt's iteration, as plain numbers. Loads no model."""
    schedule = config.schedule.build()
    sizes = config.per_active_step(config.rollout.group_size)
    plan = e_grpo_plan(schedule, sizes, config.per_active_step(config.rollout.tail_stride))
    group_size = dict(zip(schedule.active, sizes))
    return {
        "steps": [
            {
                "step": index,
                "t": schedule.times[index],
                "sigma": schedule.sigma(index),
                "duration": schedule.times[index] - schedule.times[index + length],
                "entropy_unmerged": schedule.entropy(index, 1),
                "merge": length,
                "entropy": schedule.entropy(index, length),
                "trained": index in schedule.active,
                "group_size": group_size.get(index, 0),
            }
            for index, length in enumerate(schedule.merges)
        ],
        "work": _work(plan, config),
    }


def _work(plan: Plan, config: Config) -> dict[str, Any]:
    prompts = config.rollout.prompts_per_call
    rows = [len(wave.sources) * prompts for wave in plan.waves]
    micro_batch = config.rollout.micro_batch
    return {
        "prompts_per_call": prompts,
        "rows_by_step": rows,
        "model_calls": sum(-(-count // (micro_batch or count)) for count in rows),
        "evaluations_without_gradient": plan.evaluations * prompts,
        "evaluations_with_gradient": len(plan.groups) * prompts,
        "pictures": len(plan.picture_rows) * prompts,
        # What sampling every picture by itself would take, from the noise on: a prefix of ODE steps, then its branch.
        "evaluations_one_picture_at_a_time": prompts * sum(_alone(plan, index) for index in range(len(plan.groups))),
    }


def _alone(plan: Plan, n: int) -> int:
    group = plan.groups[n]
    tail = sum(row in wave.sources for wave in plan.waves for row in group.rows[:1])
    return len(group.rows) * (group.index + 1 + tail)


def _print_plan(description: dict[str, Any]) -> None:
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
        f"one wavefront of {work['prompts_per_call']} prompt(s), {work['pictures']} pictures:\n"
        f"  rows by step                       {' '.join(map(str, work['rows_by_step']))}\n"
        f"  model calls                        {work['model_calls']}\n"
        f"  evaluations without gradient       {work['evaluations_without_gradient']}\n"
        f"  evaluations with gradient          {work['evaluations_with_gradient']}\n"
        f"  one picture at a time: evaluations {work['evaluations_one_picture_at_a_time']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="egrpo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="print the schedule, the rows and the model calls of a recipe")
    plan.add_argument("recipe", help=f"a YAML file, or one of: {', '.join(recipe_names())}")
    plan.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings of the recipe to change")
    plan.add_argument("--json", action="store_true", help="for machines")
    plan.add_argument("--plot", type=Path, metavar="PNG", help="entropy by step and merge length, as a picture")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.recipe, arguments.overrides)
        if arguments.plot and (arguments.plot.suffix != ".png" or not arguments.plot.resolve().parent.is_dir()):
            raise ValueError(f"--plot: {arguments.plot} is not the name of a .png file in a folder that exists")
    except ValueError as error:
        raise SystemExit("\n".join(f"error: {line}" for line in str(error).splitlines())) from None
    description = describe(config)
    if arguments.json:
        print(json.dumps(description, indent=2))
    else:
        _print_plan(description)
    if arguments.plot:
        from egrpo_fast.figures import entropy_plot

        entropy_plot(arguments.plot, config.schedule.build(), config.schedule.entropy_threshold)


if __name__ == "__main__":
    main()
