"""The engine against plain PyTorch: one training iteration under ZeRO, and the same iteration without DeepSpeed."""

import copy
import os
import subprocess
import sys

import pytest
import torch

TINY = [
    "schedule.num_steps=4", "rollout.group_size=3", "prompts.per_iteration=2", "optimizer.warmup_steps=0",
    "optimizer.lr=1e-3", "optimizer.weight_decay=0.1", "evaluation.num_prompts=2",
]  # fmt: skip


def plain_iteration(trainer, transformer, batch, settings):
    """The paper's update written out with torch.optim: mean loss over active steps and prompts, clip, AdamW."""
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=settings.lr, betas=settings.betas, eps=settings.eps,
        weight_decay=settings.weight_decay,
    )  # fmt: skip
    losses = []
    for n, group in enumerate(trainer.plan.groups):
        for experience in batch:
            rows = torch.arange(len(experience.rollout.states[n]))
            v = trainer.backbone.velocity(
                transformer, experience.rollout.states[n], group.time, experience.conditioning, rows
            )
            rewards = trainer.plan.by_group(experience.rewards)[n]
            losses.append(trainer.objective(group, experience.rollout.key, v, v.detach(), rewards).loss)
    torch.stack(losses).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(transformer.parameters(), settings.max_grad_norm)
    optimizer.step()
    return norm.item()


def check(stage, folder, max_grad_norm):
    from egrpo_fast.config import load_config
    from egrpo_fast.train import make_trainer

    overrides = [f"output_dir={folder}", f"deepspeed.zero_stage={stage}", f"optimizer.max_grad_norm={max_grad_norm}"]
    trainer = make_trainer(load_config("shapes", [*TINY, *overrides]))
    before = trainer.engine.state_dict()
    transformer = type(trainer.backbone.transformer).from_config(trainer.backbone.transformer.config)
    transformer.load_state_dict(copy.deepcopy(before))
    batch = trainer.sample(trainer.order.iteration(0, 2))
    told = trainer.update(batch)
    norm = plain_iteration(trainer, transformer, batch, trainer.config.optimizer)
    assert told["grad_norm"] == pytest.approx(norm, rel=1e-4)
    moved = 0.0
    for name, ours in trainer.engine.state_dict().items():
        theirs = transformer.state_dict()[name]
        moved = max(moved, (ours - before[name]).abs().max().item())
        assert torch.allclose(ours, theirs, rtol=0, atol=2e-6), name
    assert moved > 5e-4, "AdamW's first step moves a weight by about lr"
    trainer.world.close()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_iteration_under_zero_equals_plain_pytorch(stage, tmp_path):
    """Gradient accumulation over active steps and prompts, clipping (which bites here) and AdamW with weight decay."""
    # In a process of its own: DeepSpeed keeps one world per process.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "MASTER_PORT": f"{29630 + stage}"}
    command = [sys.executable, __file__, str(stage), str(tmp_path / "run"), "0.002"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    check(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
