"""The Triton ops as PyTorch operators: schemas, fake kernels, autograd, and torch.compile without a graph break."""

import pytest
import torch

from egrpo_fast.kernels import triton as backend
from egrpo_fast.ops import Ops

SEED = 9


@pytest.fixture
def arguments(normal, coefficients, streams, device) -> dict[str, tuple]:
    """Operator name -> arguments, with a gradient asked for where the op has one."""

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return normal(*shape, dtype=dtype).requires_grad_()

    def words(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    c, s = coefficients(2, noisy=True), streams(2, 3)
    x, sample = normal(2, 40), normal(2, 40, dtype=torch.bfloat16)
    rewards = normal(2, 2, 1, 3)
    return {
        "sde_step": (x, sample, c, streams(2), SEED, torch.bfloat16),
        "gaussian_log_prob": (sample, x, leaf(2, 40), c),
        "gaussian_log_prob_backward": (normal(2), sample, x, normal(2, 40), c),
        "replay_log_ratio": (leaf(2, 40, dtype=torch.bfloat16), sample, c, s, SEED),
        "replay_log_ratio_backward": (normal(2, 3), x, sample, c, s, SEED),
        "group_advantage_clip_loss": (rewards, leaf(2, 1, 3), normal(2), True, 0.2, 5.0),
        "branch_rows": (
            normal(5, 40), normal(5, 40, dtype=torch.bfloat16), sample, words(0, 3), words(0, 2, 3), words(0, 1, 3),
            coefficients(3), torch.tensor([1, 2, 3], device=device), words(0, 0, 1),
            torch.tensor([4, 5], device=device), 6, SEED,
        ),
    }  # fmt: skip


OPERATORS = [
    name for op in backend.OPS for name in (op, f"{op}_backward") if hasattr(torch.ops.egrpo_fast_triton, name)
]


def test_every_operator_is_here(arguments):
    assert set(OPERATORS) == set(arguments)


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(arguments, operator):
    torch.library.opcheck(getattr(torch.ops.egrpo_fast_triton, operator).default, arguments[operator])


def test_fake_kernels_tell_shape_and_dtype(arguments):
    for name in OPERATORS:
        operator = getattr(torch.ops.egrpo_fast_triton, name)
        real = operator(*arguments[name])
        meta = operator(*(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in arguments[name]))
        pairs = zip(real, meta) if isinstance(real, tuple) else [(real, meta)]
        for ours, theirs in pairs:
            assert ours is theirs is None or (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def update(ops: Ops, velocity, old_velocity, coefficients, streams, rewards, weights):
    """What lies between the model's forward and backward in a training step, argument checks included."""
    ratio = ops.replay_log_ratio(velocity * 1.0, old_velocity, coefficients, streams, SEED)
    loss, _, clip_fraction = ops.group_advantage_clip_loss(rewards, ratio.unsqueeze(1), weights, "advantage", 0.2, 5.0)
    return loss, clip_fraction


def rollout(ops: Ops, latents, velocity, coefficients, streams):
    following, copy = ops.sde_step(latents * 1.0, velocity, coefficients, streams, SEED, torch.bfloat16)
    return following, copy.float().square()


def test_compile_has_no_graph_break(triton_ops, normal, coefficients, streams):
    velocity, old, c = normal(2, 300), normal(2, 300), coefficients(2, noisy=True)
    inputs = (old, c, streams(2, 4), normal(3, 2, 1, 4), normal(3))
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        call = torch.compile(update, fullgraph=True, backend="aot_eager") if compiled else update
        leaf = velocity.clone().requires_grad_()
        loss, clip_fraction = call(triton_ops, leaf, *inputs)
        loss.backward()
        results.append((loss.detach(), clip_fraction, leaf.grad))
    assert all(map(torch.equal, *results))

    step = torch.compile(rollout, fullgraph=True, backend="aot_eager")
    inputs = (normal(2, 300), velocity, c, streams(2))
    assert all(map(torch.equal, step(triton_ops, *inputs), rollout(triton_ops, *inputs)))
