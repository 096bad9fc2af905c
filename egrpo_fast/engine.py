"""The distributed engine, and the only room that imports DeepSpeed: init, gather, step, save, load, agree."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from egrpo_fast.config import Config


def _merge(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        base[key] = _merge(base[key], value) if both else value
    return base


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run."""
    return _merge(
        {
            "train_micro_batch_size_per_gpu": 1,
            # The trainer says itself which backward is the last of a step: `Engine.backward(last=...)`.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.optimizer.max_grad_norm,
            "bf16": {"enabled": config.model.dtype == "bfloat16"},
            # Gradients of all active steps and prompts add up before a step: in bfloat16 the sum would lose them.
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": config.deepspeed.zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
        config.deepspeed.overrides,
    )


class World:
    """This process among its ranks. Started by the `deepspeed` launcher, or alone."""

    def __init__(self) -> None:
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1")):
            os.environ.setdefault(name, str(value))
        os.environ.setdefault("MASTER_PORT", "29500")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        else:
            self.device = torch.device("cpu")
            local_ranks = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
        # For CPU ranks DeepSpeed would now compile a reduction for inference, for a minute. ZeRO does not call it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if self.device.type == "cuda" else "gloo", verbose=False)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks, in float64."""
        total = values.to(self.device, torch.float64, copy=True)
        dist.all_reduce(total)
        return total / self.size

    def largest(self, value: Tensor) -> float:
        """Largest over ranks of a scalar."""
        largest = value.to(self.device, torch.float64, copy=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        dist.destroy_process_group()


class Engine:
    """A module under DeepSpeed ZeRO with AdamW, linear warm-up and gradient clipping."""

    def __init__(self, module: nn.Module, config: Config) -> None:
        settings, warmup = config.optimizer, config.optimizer.warmup_steps
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # torch's own AdamW: DeepSpeed's are compiled on first use, which needs a toolchain where the run is.
        optimizer = torch.optim.AdamW(
            parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=scheduler, config=deepspeed_config(config)
        )

    @property
    def module(self) -> nn.Module:
        """The module for forwards with gradient: under ZeRO-3 its weights are gathered layer by layer."""
        return self._engine

    @contextlib.contextmanager
    def inference(self, gathered: bool) -> Iterator[nn.Module]:
        """The module for forwards without gradient.

        gathered: collect all weights once for the whole block and leave the per-layer hooks out, instead of gathering
        every layer at every call. Same weights, same numbers.
        """
        module = self._engine.module
        module.eval()
        offload = getattr(self._engine.optimizer, "parameter_offload", None)
        try:
            if gathered and offload is not None:
                # The hooks would release each layer after its first forward, gathered or not.
                offload._remove_module_hooks()
                try:
                    with deepspeed.zero.GatheredParameters(list(module.parameters())):
                        yield module
                finally:
                    offload.forward_hooks.clear()
                    offload.backward_hooks.clear()
                    offload.setup_zero_stage3_hooks()
            else:
                yield module
        finally:
            module.train()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate this loss's gradient; `last`: the next `step` applies it. Gradients are averaged over ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> tuple[float, float]:
        """One optimizer step. Returns the gradient norm before clipping and the learning rate that was used.

        FloatingPointError, on every rank alike, where the gradient is not finite.
        """
        rate = self._engine.get_lr()[0]
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        # DeepSpeed reports a norm that is not finite as -1.
        if norm is None or not 0.0 <= float(norm) < float("inf"):
            raise FloatingPointError("the gradient is not finite; resume the run from its last checkpoint")
        return float(norm), rate

    def state_dict(self) -> dict[str, Tensor]:
        """All weights on rank 0's CPU, gathered one parameter at a time; empty on the other ranks."""
        collected = {}
        for name, parameter in self._engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if dist.get_rank() == 0:
                    collected[name] = parameter.detach().to("cpu", copy=True)
        return collected

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Every rank's shard of weights, optimizer and scheduler under folder/tag, with the trainer's own `state`."""
        self._engine.save_checkpoint(str(folder), tag=tag, client_state=state)

    def load(self, folder: Path) -> dict[str, Any]:
        """The newest checkpoint under folder; returns its `state`."""
        path, state = self._engine.load_checkpoint(str(folder))
        if path is None:
            raise ValueError(f"output_dir: no checkpoint to resume from under {folder}")
        return state
