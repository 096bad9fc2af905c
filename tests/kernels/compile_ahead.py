"""Compiles every Triton kernel for GPUs that need not be there; prints one JSON line per kernel and target.

Run as a program without TRITON_INTERPRET: an interpreted kernel cannot be compiled. Arguments: a compute
capability and, if wanted, `ones`: every size is 1, which the launcher turns into a constant, the interpreter does not.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from egrpo_fast.kernels.triton.branch_rows import _branch_rows_kernel
from egrpo_fast.kernels.triton.gaussian_log_prob import (
    _gaussian_log_prob_backward_kernel,
    _gaussian_log_prob_kernel,
    _gaussian_log_prob_rows_kernel,
)
from egrpo_fast.kernels.triton.group_advantage_clip_loss import _group_advantage_clip_loss_kernel
from egrpo_fast.kernels.triton.launch import BLOCK, OPTIONS
from egrpo_fast.kernels.triton.replay_log_ratio import (
    _replay_log_ratio_backward_kernel,
    _replay_log_ratio_kernel,
    _replay_log_ratio_rows_kernel,
)
from egrpo_fast.kernels.triton.sde_step import _sde_step_kernel

ROW = {"BLOCK": BLOCK}
TILE = {"TILE": 512}
KERNELS = (
    (_sde_step_kernel, {"HAS_COPY": True, **ROW}),
    (_branch_rows_kernel, {"HAS_COPY": True, **ROW}),
    (_gaussian_log_prob_kernel, ROW),
    (_gaussian_log_prob_rows_kernel, TILE),
    (_gaussian_log_prob_backward_kernel, ROW),
    (_replay_log_ratio_kernel, ROW),
    (_replay_log_ratio_rows_kernel, TILE),
    (_replay_log_ratio_backward_kernel, ROW),
    (_group_advantage_clip_loss_kernel, {"BY_ADVANTAGE": True, "TILE": 32, "MEMBERS": 16}),
    (_group_advantage_clip_loss_kernel, {"BY_ADVANTAGE": False, "TILE": 32, "MEMBERS": 16}),
)
MODEL = ("velocity", "old_velocity", "velocity_gradient", "sample", "copy", "model_latents")
POINTERS = {
    **dict.fromkeys(MODEL, "*bf16"),
    **dict.fromkeys(("sources", "offsets", "destinations", "slots"), "*i32"),
    **dict.fromkeys(("streams", "draws", "prompts"), "*i64"),
    **dict.fromkeys(
        ("latents", "coefficients", "following", "partials", "log_prob", "log_ratio", "gradient", "rewards", "weights",
         "loss", "advantages", "clip_fraction"), "*fp32",
    ),
}  # fmt: skip
FLOATS = ("lowest", "highest", "advantage_clip")
ALIGNED = ("latents_stride", "velocity_stride", "sample_stride", "old_stride", "model_stride", "numel")
"""Multiples of 16 at every FLUX shape, as the launcher would find out."""
SIZES = (*ALIGNED, "blocks", "samples", "num_rewards", "groups", "steps", "group_size", "reward_stride")


def compile_for(kernel: triton.JITFunction, constants: dict, capability: int) -> triton.compiler.CompiledKernel:
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name, "fp32" if name in FLOATS else "i32")
        for name in kernel.arg_names
    }
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in POINTERS or (name in ALIGNED and name not in constants)
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a cubin: what ptxas gave it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", report)}


def cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


if __name__ == "__main__":
    capability, ones = int(sys.argv[1]), "ones" in sys.argv
    for kernel, constants in KERNELS:
        if ones:
            constants = constants | {name: 1 for name in SIZES if name in kernel.arg_names}
        compiled = compile_for(kernel, constants, capability)
        wide = len(re.findall(r"(?:ld|st)\.global\.v4\.b32", compiled.asm["ptx"]))
        found = resources(compiled.asm["cubin"])
        about = {"kernel": kernel.__name__, "sm": capability, "triton": triton.__version__}
        print(json.dumps({**about, "wide": wide, **found}), flush=True)
