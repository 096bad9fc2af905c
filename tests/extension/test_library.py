"""The library as an artefact: fake kernel, no tie to a Python, and what happens where it is missing."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

MISSING = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from egrpo_fast.ops import choose
    chosen = [choose("auto", "cpu").chosen["branch_rows"] for _ in range(3)]
print(chosen, [str(warning.message) for warning in caught if "egrpo_fast extension" in str(warning.message)])
try:
    choose("extension", "cpu")
except ValueError as error:
    print("refused:", error)
"""


def lacking(path):
    """The output of MISSING with another file in the library's place."""
    environment = os.environ | {"EGRPO_EXTENSION": str(path)}
    return subprocess.run(
        [sys.executable, "-c", MISSING], env=environment, check=True, text=True, capture_output=True
    ).stdout


def test_missing_library_warns_once_and_falls_back(tmp_path):
    chosen, refused = lacking(tmp_path / "_C.abi3.so").splitlines()
    assert chosen.startswith("['reference', 'reference', 'reference']")
    assert chosen.count("egrpo_fast extension") == 1 and "is not built" in chosen
    assert refused.startswith("refused: backend: 'extension'") and "is not built" in refused


def test_broken_library_warns_and_falls_back(tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    chosen, refused = lacking(tmp_path / "_C.abi3.so").splitlines()
    assert chosen.startswith("['reference', 'reference', 'reference']") and "cannot be loaded" in chosen
    assert "cannot be loaded" in refused


def test_devices(extension):
    assert extension.unavailable(torch.device("cpu")) is None
    assert "no mps code" in extension.unavailable(torch.device("mps"))
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("egrpo_fast::branch_rows", "CUDA")
    assert (extension.unavailable(torch.device("cuda")) is None) == has_cuda


@pytest.mark.parametrize("copy", [None, torch.bfloat16], ids=["no-copy", "bf16"])
def test_opcheck(extension, make_wave, copy):
    wave = make_wave([3, 1], (4, 4), model_dtype=copy)
    wave.latents.nan_to_num_(7.0)
    if copy is not None:
        wave.model_latents.nan_to_num_(7.0)
    torch.library.opcheck(torch.ops.egrpo_fast.branch_rows.default, tuple(wave.arguments()))


def test_fake_tensors_run_it(extension, make_wave):
    wave = make_wave([3, 1], (4, 4))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in wave.arguments()]
        assert torch.ops.egrpo_fast.branch_rows(*fake) is None


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_one_binary_for_every_python_and_later_torch(extension):
    symbols = subprocess.check_output(["nm", "-D", "-C", str(extension.LIBRARY)], text=True)
    undefined = [line.split(maxsplit=1)[1] for line in symbols.splitlines() if line.split()[0] in "Uw"]
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
    assert not [name for name in undefined if name.startswith(("at::", "c10::", "torch::"))]
    assert [name for name in undefined if name.startswith("aoti_torch_")]
    exported = [line for line in symbols.splitlines() if " T " in line]
    assert not [line for line in exported if "egrpo::" in line], "implementation details are exported"
