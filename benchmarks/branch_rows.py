"""`branch_rows`: the busiest step of the paper's plan, in place: every live row, and one group's branches."""

from functools import cache

import torch

from egrpo_fast.methods.e_grpo import e_grpo
from egrpo_fast.schedule import make_schedule


@cache
def plan(steps, samples):
    schedule = make_schedule(num_steps=2 * steps)
    return e_grpo(schedule, group_sizes=(samples,) * steps, tail_strides=(1,) * steps)


def table(problem):
    prefix = plan(problem.steps, problem.samples)
    busiest = max(range(len(prefix.waves)), key=lambda index: len(prefix.waves[index].edges))
    return prefix, prefix.tables(problem.prompts, problem.device, torch.float32)[busiest]


def arguments(problem):
    prefix, wave = table(problem)
    latents = problem.normal(problem.prompts * prefix.num_rows)
    return (
        latents,
        latents.bfloat16(),
        problem.normal(len(wave.sources), torch.bfloat16),
        wave.sources,
        wave.offsets,
        wave.destinations,
        wave.coefficients,
        wave.draws,
        wave.slots,
        torch.arange(problem.prompts, device=problem.device),
        3,
        7,
    )


def minimal_bytes(problem) -> int:
    """x and v read per source, x' and the model's copy written per edge."""
    _, wave = table(problem)
    return problem.numel * ((4 + 2) * len(wave.sources) + (4 + 2) * len(wave.destinations))


def eager(latents, model_latents, velocity, sources, offsets, destinations, coefficients, *_):
    source = torch.arange(len(sources), device=sources.device)
    source = torch.repeat_interleave(source, offsets.diff(), output_size=len(destinations))
    x = latents[sources[source]]
    c_x, c_v, s = coefficients[:, :, None, None].unbind(1)
    following = c_x * x + c_v * velocity[source].float() + s * torch.randn_like(x)
    latents.index_copy_(0, destinations.long(), following)
    model_latents.index_copy_(0, destinations.long(), following.to(model_latents.dtype))


def test_branch_rows(measure):
    measure("branch_rows", arguments, minimal_bytes, eager)
