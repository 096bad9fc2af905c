"""All of E-GRPO on a model of your own: one process, no files, no DeepSpeed, on a CPU.

A small network first learns a flow whose samples are points in eight clusters on a circle. It does not know what its
prompts mean. E-GRPO then teaches it to put each prompt's samples where that prompt asks for them. To use it for your
model, replace `Velocity` and `reward`.

    python examples/minimal.py
"""

import math

import torch
from torch import Tensor, nn

from egrpo_fast import ops
from egrpo_fast.methods.e_grpo import e_grpo
from egrpo_fast.objective import Objective
from egrpo_fast.plan import ode_plan
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.schedule import make_schedule

PROMPTS = ("east", "north", "west", "south")
SHAPE = (1, 2)
"""Tokens and channels of one sample: a point in the plane."""


class Velocity(nn.Module):
    """The flow model. It takes samples [R, 1, 2], one time, and the index of each sample's prompt [R]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 + len(PROMPTS), 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        )

    def forward(self, x: Tensor, t: float | Tensor, prompts: Tensor) -> Tensor:
        time = torch.as_tensor(t, dtype=x.dtype).expand(len(x)).reshape(-1, 1, 1)
        prompt = nn.functional.one_hot(prompts.long(), len(PROMPTS)).to(x)[:, None]
        return self.layers(torch.cat((x, time, prompt), -1))


def reward(points: Tensor) -> Tensor:
    """Points [P, samples, 1, 2] to rewards [P, samples]: near 1 in the cluster that the prompt names, else near 0."""
    angles = torch.arange(len(PROMPTS)) * (math.pi / 2)
    clusters = torch.stack((angles.cos(), angles.sin()), -1)[:, None]
    return (-2.0 * (points[:, :, 0] - clusters).square().sum(-1)).exp()


def pretrain(model: Velocity, steps: int = 1500) -> None:
    """Flow matching: x_t = (1 - t) x_0 + t x_1 with noise x_1, and the model predicts x_1 - x_0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        angle = torch.randint(8, (256,)) * (math.pi / 4)
        data = torch.stack((angle.cos(), angle.sin()), -1)[:, None] + 0.05 * torch.randn(256, *SHAPE)
        noise, t = torch.randn_like(data), torch.rand(256)
        x = torch.lerp(data, noise, t[:, None, None])
        loss = (model(x, t, torch.randint(len(PROMPTS), (256,))) - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train(model: Velocity, iterations: int = 60, group_size: int = 12, lr: float = 2e-3, seed: int = 0) -> list[float]:
    """E-GRPO. Returns the mean reward of every iteration's samples."""
    schedule = make_schedule(num_steps=16, shift=3.0, eta=0.7, entropy_threshold=2.2)
    # At every active step, `group_size` samples leave one shared state by one stochastic step, and finish as an ODE.
    plan = e_grpo(schedule, [group_size] * len(schedule.active), [1] * len(schedule.active))
    kernels = ops.choose("auto")
    wavefront = Wavefront(plan, len(PROMPTS), SHAPE, kernels)
    objective = Objective(kernels, weights=(1.0,), clip_range=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    prompts, history = torch.arange(len(PROMPTS)), []
    for iteration in range(iterations):
        rollout = wavefront.run(model, NoiseKey(seed, iteration, prompts))
        rewards = reward(rollout.final_latents)
        optimizer.zero_grad()
        for group, states, scores in zip(plan.groups, rollout.states, plan.by_group(rewards[None])):
            # The samples of a group left one state, so one forward serves them all. Their noise is drawn again.
            velocity = model(states, group.time, prompts)
            loss = objective(group, rollout.key, velocity, velocity.detach(), scores).loss
            (loss / len(plan.groups)).backward()
        optimizer.step()
        history.append(rewards.mean().item())
    return history


def evaluate(model: Velocity, samples: int = 64) -> float:
    """Mean reward of ODE samples from noise that training does not use."""
    prompts = torch.arange(len(PROMPTS)).repeat_interleave(samples)
    wavefront = Wavefront(ode_plan(make_schedule(32)), len(prompts), SHAPE, ops.choose("auto"))
    key = NoiseKey(1, 0, torch.arange(len(prompts)))
    rollout = wavefront.run(lambda x, t, rows: model(x, t, prompts[rows]), key)
    return reward(rollout.final_latents.unflatten(0, (len(PROMPTS), samples)).squeeze(2)).mean().item()


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    model = Velocity()
    pretrain(model)
    before = evaluate(model)
    train(model)
    after = evaluate(model)
    print(f"mean reward of new samples: {before:.2f} before, {after:.2f} after E-GRPO; 1.00 is the best there is")
    return before, after


if __name__ == "__main__":
    main()
