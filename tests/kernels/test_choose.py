"""Which backend serves which op, and what a forced one says that cannot run."""

import os
import subprocess
import sys

import pytest

from egrpo_fast.kernels.triton.launch import INTERPRETED
from egrpo_fast.ops import BACKENDS, choose


def test_auto_on_a_cpu_never_interprets():
    assert set(choose("auto", "cpu").chosen.values()) <= {"extension", "reference"}
    assert set(choose("reference", "cpu").chosen.values()) == {"reference"}


def test_triton_has_every_op(device):
    assert set(choose("triton", device).chosen.values()) == {"triton"}


def test_unknown_backend():
    with pytest.raises(ValueError, match=f"^backend: 'cuda', allowed: auto, {', '.join(BACKENDS)}$"):
        choose("cuda")


def reason(backend: str, device: str) -> str:
    with pytest.raises(ValueError) as refusal:
        choose(backend, device)
    return str(refusal.value)


def test_a_forced_backend_says_why_it_cannot_run(monkeypatch):
    if not INTERPRETED:
        assert "its interpreter needs TRITON_INTERPRET=1" in reason("triton", "cpu")
    else:
        assert "would be interpreted" in reason("triton", "cuda")
    assert "not 'meta'" in reason("triton", "meta")
    monkeypatch.setattr("egrpo_fast.kernels.triton.INSTALLED", False)
    assert reason("triton", "cpu") == "backend: 'triton' cannot run on cpu: triton is not installed"


def test_auto_without_triton(monkeypatch):
    monkeypatch.setattr("egrpo_fast.kernels.triton.INSTALLED", False)
    assert set(choose("auto", "cuda").chosen.values()) <= {"extension", "reference"}


def test_triton_is_not_imported_unasked():
    """A CPU run neither needs nor loads Triton; without the interpreter it refuses to serve a CPU."""
    program = """
import sys
from egrpo_fast.ops import choose
choose("auto", "cpu")
assert "triton" not in sys.modules
try:
    choose("triton", "cpu")
except ValueError as refusal:
    print(refusal)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "its interpreter needs TRITON_INTERPRET=1" in done.stdout
