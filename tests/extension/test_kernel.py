"""The CUDA kernel without a GPU: run on the host under sanitizers, and what nvcc says it needs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
ARCHITECTURES = ("80", "90", "100")
REGISTERS = 64
"""Per thread: 128 threads of 64 registers fill half of a multiprocessor's threads, enough to hide memory's latency."""


def test_kernel_emulated_on_the_host(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "emulated_kernel"
    source = Path(__file__).with_name("emulated_kernel.cpp")
    flags = ["-std=c++17", "-O0", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command = [compiler, *flags, f"-I{CSRC}", str(source), "-o", str(program)]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if subprocess.run([*command, *sanitizers], capture_output=True).returncode:
        subprocess.run(command, check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_cuda_branch_compiles_against_this_torch():
    """No CUDA toolkit is needed for it, so that the oldest torch, built for an older CUDA, is tried as well."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    headers = ["-isystem", str(Path(torch.__file__).parent / "include")]
    command = [compiler, "-std=c++17", "-fsyntax-only", *defines, *headers, str(CSRC / "library.cpp")]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-3000:]


@pytest.fixture(scope="module")
def nvcc():
    if (found := shutil.which("nvcc")) is None:
        pytest.skip("no nvcc")
    known = subprocess.check_output([found, "--list-gpu-arch"], text=True).split()

    def compile(arch, out, *flags):
        if f"compute_{arch}" not in known:
            pytest.skip(f"this nvcc does not know compute_{arch}")
        command = [found, "-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{arch}", *flags]
        source = str(CSRC / "branch_rows_cuda.cu")
        return subprocess.run([*command, source, "-o", str(out)], check=True, capture_output=True, text=True).stderr

    return compile


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_resources(nvcc, arch, tmp_path):
    """No local memory, no spills; `-s` prints the report."""
    report = nvcc(arch, tmp_path / "kernel.cubin", "-cubin", "-Xptxas=-v")
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    print(f"\nsm_{arch}: {len(registers)} kernels, {min(registers)} to {max(registers)} registers, stack and spills 0")
    assert len(registers) == len(memory) == 12  # 3 velocity dtypes, 4 kinds of copy
    assert set(memory) == {("0", "0", "0")}
    assert max(registers) <= REGISTERS


def test_ptx_fuses_nothing_and_moves_packets(nvcc, tmp_path):
    nvcc("80", tmp_path / "kernel.ptx", "-ptx")
    ptx = (tmp_path / "kernel.ptx").read_text()
    assert not re.findall(r"\bfma\.|\bmad\.\w*\.?f32|\.approx|\.ftz", ptx)
    assert "sqrt.rn.f32" in ptx and "cvt.rn.bf16.f32" in ptx and "cvt.rn.f16.f32" in ptx
    assert not re.findall(r"\.local\b", ptx)
    assert re.search(r"ld\.global\.v4\.\w*32", ptx), "no 16-byte load"
    kernels = ptx.split(".visible .entry ")[1:]
    assert len(kernels) == 12
    for kernel in kernels:
        stores = re.findall(r"\bst\.global\.\S+", kernel)
        whole = [store for store in stores if ".v" in store]
        # A packet of the row and, where there is one, one of its copy. The two branches without packets store elements.
        assert len(whole) == (1 if "None" in kernel.partition("(")[0] else 2), stores
        assert len(stores) - len(whole) == 2 * 4 * len(whole), f"a packet in pieces: {stores}"
