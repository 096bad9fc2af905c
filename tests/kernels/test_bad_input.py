"""Wrong arguments are a ValueError that names the argument, the same from every backend."""

import inspect
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from egrpo_fast.ops import BACKENDS, Ops, choose

ROWS, NUMEL, GROUP = 3, 8, 4


def good(op: str) -> dict[str, object]:
    """Arguments that the op takes."""
    table = torch.tensor([[1.0, -0.1, 0.5]]).repeat(ROWS, 1)
    x, v = torch.ones(ROWS, NUMEL), torch.ones(ROWS, NUMEL, dtype=torch.bfloat16)
    words = torch.arange(ROWS, dtype=torch.int32)
    streams = torch.zeros(ROWS, 3, dtype=torch.int64)
    return {
        "sde_step": {"latents": x, "velocity": v, "coefficients": table, "streams": streams, "seed": 0},
        "gaussian_log_prob": {"sample": v, "latents": x, "velocity": v, "coefficients": table},
        "replay_log_ratio": {
            "velocity": v,
            "old_velocity": v,
            "coefficients": table,
            "streams": streams[:, None].repeat(1, GROUP, 1),
            "seed": 0,
        },
        "group_advantage_clip_loss": {
            "rewards": torch.ones(2, 1, ROWS, GROUP),
            "log_ratio": torch.zeros(1, ROWS, GROUP),
            "weights": torch.ones(2),
            "mix": "reward",
            "clip_range": 1e-4,
            "advantage_clip": 5.0,
        },
        "branch_rows": {
            "latents": x,
            "model_latents": v.clone(),
            "velocity": v,
            "sources": words,
            "offsets": torch.arange(ROWS + 1, dtype=torch.int32),
            "destinations": words,
            "coefficients": table,
            "draws": words.long(),
            "slots": torch.zeros_like(words),
            "prompts": torch.zeros(1, dtype=torch.int64),
            "iteration": 0,
            "seed": 0,
        },
    }[op]


def put(value: float, index: tuple) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def columns_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def flat(tensor: Tensor) -> Tensor:
    return tensor.flatten()


def longer(tensor: Tensor) -> Tensor:
    return torch.cat((tensor, tensor[:1]))


OPS = ("sde_step", "gaussian_log_prob", "replay_log_ratio", "group_advantage_clip_loss", "branch_rows")
TENSORS = [
    pytest.param(op, name, id=f"{op}-{name}")
    for op in OPS
    for name, value in good(op).items()
    if isinstance(value, Tensor)
]
VALUES = [
    ("sde_step", "latents", lambda x: x[:, :0]),
    ("sde_step", "coefficients", put(-1.0, (0, 2))),
    ("sde_step", "coefficients", put(float("nan"), (0, 2))),
    ("gaussian_log_prob", "coefficients", put(0.0, (1, 2))),
    ("gaussian_log_prob", "coefficients", put(-0.5, (1, 2))),
    ("replay_log_ratio", "coefficients", put(0.0, (0, 2))),
    ("replay_log_ratio", "coefficients", put(float("nan"), (0, 2))),
    ("group_advantage_clip_loss", "rewards", put(float("nan"), (1, 0, 2, 3))),
    ("group_advantage_clip_loss", "rewards", put(float("-inf"), (1, 0, 2, 3))),
    ("group_advantage_clip_loss", "rewards", lambda x: x * torch.tensor([3e38, -3e38, 0.0, 0.0])),
    ("branch_rows", "latents", lambda x: x[:1].expand(ROWS, NUMEL)),
    ("branch_rows", "model_latents", lambda x: x[:1].expand(ROWS, NUMEL)),
    ("group_advantage_clip_loss", "rewards", lambda x: x[:0]),
    ("group_advantage_clip_loss", "log_ratio", lambda x: x[..., :0]),
    ("group_advantage_clip_loss", "log_ratio", lambda x: x[..., :1].expand(*x.shape[:2], 2049)),
    ("group_advantage_clip_loss", "mix", lambda _: "sum"),
    ("group_advantage_clip_loss", "clip_range", lambda _: 0.0),
    ("group_advantage_clip_loss", "advantage_clip", lambda _: float("nan")),
    ("sde_step", "seed", lambda _: -1),
    ("replay_log_ratio", "seed", lambda _: 2**63),
    ("branch_rows", "iteration", lambda _: 2**32),
    ("branch_rows", "seed", lambda _: -1),
]


@pytest.fixture(params=BACKENDS)
def ops(request) -> Ops:
    try:
        return choose(request.param)
    except ValueError as reason:
        pytest.skip(str(reason))


def refuses(ops: Ops, op: str, name: str, change: Callable) -> None:
    arguments = good(op)
    with pytest.raises(ValueError, match=f"^{name}: "):
        getattr(ops, op)(**arguments | {name: change(arguments[name])})


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_are_taken(ops, op):
    assert list(good(op)) == [name for name in inspect.signature(getattr(ops, op)).parameters if name in good(op)]
    getattr(ops, op)(**good(op))


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_dtype(ops, op, name):
    refuses(ops, op, name, lambda tensor: tensor.to(torch.complex64))


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_device(ops, op, name):
    refuses(ops, op, name, to_meta)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_rank(ops, op, name):
    if good(op)[name].ndim == 1:
        refuses(ops, op, name, lambda tensor: tensor[None])
    else:
        refuses(ops, op, name, flat)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_strides(ops, op, name):
    arguments = good(op)
    if op == "group_advantage_clip_loss" and name != "weights":
        getattr(ops, op)(**arguments | {name: columns_first(arguments[name])})
    elif arguments[name].ndim > 1:
        refuses(ops, op, name, columns_first)


@pytest.mark.parametrize(
    ("op", "name", "change"), [pytest.param(*case, id=f"{case[0]}-{case[1]}-{i}") for i, case in enumerate(VALUES)]
)
def test_values(ops, op, name, change):
    refuses(ops, op, name, change)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("s", [-0.5, float("nan"), 0.0], ids=str)
@pytest.mark.parametrize("op", ["sde_step", "gaussian_log_prob", "replay_log_ratio"])
def test_where_values_are_not_read_a_wrong_one_gives_nan(device, backend, op, s):
    """As on a GPU, where to read one the host would have to wait: the row's own result is NaN, and no other."""
    arguments = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in good(op).items()}
    arguments["coefficients"][1, 2] = s
    if op == "sde_step":
        arguments["model_dtype"] = torch.bfloat16
    result = import_module(f"egrpo_fast.kernels.{backend}").OPS[op](*arguments.values())
    for value in result if isinstance(result, tuple) else (result,):
        lost = value.isnan().reshape(ROWS, -1)
        assert not lost[[0, 2]].any() and (lost[1].all() or (op == "sde_step" and s == 0)), value


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("op", OPS)
def test_every_op_can_be_captured_in_a_cuda_graph(backend, op):
    ops = choose(backend, "cuda")
    arguments = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in good(op).items()}
    state = [arguments[name] for name in ("latents", "model_latents") if op == "branch_rows"]
    began = [value.clone() for value in state]

    def call() -> list[Tensor]:
        for value, kept in zip(state, began):
            value.copy_(kept)
        result = getattr(ops, op)(**arguments)
        return state or list(result if isinstance(result, tuple) else (result,))

    expected = [value.clone() for value in call()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for value in captured:
        value.fill_(float("nan"))
    graph.replay()
    assert all(map(torch.equal, captured, expected))


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("sde_step", "velocity"),
        ("sde_step", "streams"),
        ("gaussian_log_prob", "sample"),
        ("replay_log_ratio", "old_velocity"),
        ("group_advantage_clip_loss", "weights"),
        ("branch_rows", "model_latents"),
        ("branch_rows", "sources"),
        ("branch_rows", "offsets"),
        ("branch_rows", "coefficients"),
    ],
)
def test_length(ops, op, name):
    refuses(ops, op, name, longer)


def test_a_group_is_as_long_as_its_rewards(ops):
    refuses(ops, "group_advantage_clip_loss", "rewards", lambda rewards: rewards[..., 1:])


def test_only_the_reference_takes_float64(ops):
    arguments = good("sde_step")
    doubled = {name: arguments[name].double() for name in ("latents", "velocity", "coefficients")}
    if ops.chosen["sde_step"] == "reference":
        assert ops.sde_step(**arguments | doubled)[0].dtype == torch.float64
    else:
        with pytest.raises(ValueError, match=r"^latents: dtype torch.float64, allowed: torch.float32"):
            ops.sde_step(**arguments | doubled)
