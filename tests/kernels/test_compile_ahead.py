"""Every kernel compiles for GPUs that are not here, without spills; their registers are printed (`pytest -rA`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REGISTERS = 128
"""More would halve the warps that hide memory latency; a bound, not a tuning target."""


def compile_ahead(*arguments: str) -> list[dict]:
    # Kernels of an interpreting process cannot be compiled, so another one does it.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py")), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({report["kernel"] for report in reports}) == 9
    return reports


@pytest.mark.parametrize("capability", [80, 90, 100], ids="sm_{}".format)
def test_kernels_fit_the_registers(capability):
    reports = compile_ahead(str(capability))
    for report in reports:
        print("{kernel:42} sm_{sm:<4} {REG:3} registers {STACK:3} stack {SHARED:5} shared".format(**report))
    assert all(report["STACK"] == report["LOCAL"] == 0 for report in reports), "spills"
    assert all(report["REG"] <= REGISTERS for report in reports)
    wide = {report["kernel"]: report["wide"] for report in reports}
    assert wide["_sde_step_kernel"] == wide["_branch_rows_kernel"] == 2, "state is read and written 16 bytes at a time"


def test_sizes_of_one_compile():
    compile_ahead("90", "ones")
