"""The doctor tells what is broken and how to mend it, survives everything being broken, and keeps secrets."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from egrpo_fast.commands import doctor
from egrpo_fast.commands.doctor import FAILED, OK, WARNING, Child, Finding
from egrpo_fast.kernels import extension

SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY",
    "EGRPO_REWARD_TOKEN": "correct-horse-battery",
    "HTTP_PROXY": "http://someone:proxy-p@ssword@proxy.example:3128",
    "PIP_INDEX_URL": "https://__token__:pypi-index-word@index.example/simple",
}
WORDS = [*list(SECRETS.values())[:4], "someone", "proxy-p", "ssword", "proxy.example", "pypi-index-word"]


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_the_command_tells_no_secret(tmp_path):
    """Not even one that comes by another way than its variable: in a path, in the hub's file."""
    in_a_file = "hf_FromTheFileOfTheHub0123456789"
    (tmp_path / "token").write_text(in_a_file)
    out = tmp_path / f"runs-{SECRETS['AWS_SECRET_ACCESS_KEY']}"
    environment = {
        **os.environ, **SECRETS, "HF_HOME": str(tmp_path),
        "LD_LIBRARY_PATH": f"/opt/{SECRETS['WANDB_API_KEY']}:https://user:short@host/lib",
    }  # fmt: skip
    told = subprocess.run(
        [sys.executable, "-m", "egrpo_fast.cli", "doctor", "--output-dir", out], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    print(told.stdout, told.stderr)
    assert told.returncode == 0 and "0 FAILED" in told.stdout
    assert not [word for word in [*WORDS, in_a_file, "user:short"] if word in told.stdout + told.stderr]
    for line in ("torch_version: 2.", "hub token: there is one", "gloo, one rank: works", "imports: works"):
        assert f"ok       {line}" in told.stdout
    assert "runs-***" in told.stdout, "the path itself is told"
    assert not out.exists(), "nothing is left behind"


def test_the_scrubber_takes_secrets_out_of_any_text():
    scrub = doctor.scrubber({**SECRETS, "HOME": "/", "MODE": "not-secret-value"})
    for secret in WORDS[:-4]:
        assert secret not in scrub(f"cannot open {secret}!")
    assert scrub("at https://me:pa@ss@host/x") == "at https://***@host/x"
    assert scrub("ghp_0123456789abcdefghij") == "***"
    assert scrub("mode not-secret-value") == "mode not-secret-value"
    assert scrub(f"{Path.home()}/models") == "~/models"


def test_status_and_json(monkeypatch, capsys):
    findings = [Finding("a", "x", OK, "fine"), Finding("a", "y", FAILED, "broken", "mend it")]
    for count, status in ((1, 0), (2, 1)):
        monkeypatch.setattr(doctor, "examine", lambda folder, count=count: iter(findings[:count]))
        assert doctor.main(Path("runs"), as_json=True) == status
        told = json.loads(capsys.readouterr().out)
        assert told["findings"][0]["value"] == "fine" and told[FAILED] == status
    assert doctor.main(Path("runs"), as_json=False) == 1
    assert "FAILED   y: broken\n             -> mend it" in capsys.readouterr().out


def test_missing_and_old_packages(monkeypatch):
    versions = {"torch": "1.0", "numpy": "2.1"}

    def version(name):
        if name in versions:
            return versions[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    found = by_name(doctor.dependencies())
    assert found["torch"].verdict == FAILED and found["torch"].remedy == "pip install 'torch>=2.10'"
    assert found["numpy"].verdict == OK
    assert found["deepspeed"].verdict == FAILED
    assert found["wandb"].verdict == found["flash-attn"].verdict == OK and "optional" in found["wandb"].value


def test_a_look_that_breaks_is_a_finding(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    (found,) = doctor.guarded("dependencies", doctor.dependencies)
    assert found.verdict == FAILED and "packaging" in found.value


def test_a_missing_extension_is_a_warning(monkeypatch):
    monkeypatch.setattr(extension, "_MISSING", "_C.abi3.so is not built")
    found = by_name(doctor.kernels())
    assert found["extension"].verdict == WARNING and "pip install" in found["extension"].remedy
    assert "branch_rows: reference" in found["auto on cpu"].value
    assert list(doctor.check_ops("extension", "cpu")) == []


def test_a_wrong_kernel_fails(monkeypatch):
    if extension.unavailable(doctor.torch.device("cpu")):
        pytest.skip("the extension is not built")

    def wrong(latents, *arguments):
        extension.branch_rows(latents, *arguments)
        latents += 1e-3

    monkeypatch.setitem(extension.OPS, "branch_rows", wrong)
    (ops,), (rollout,) = doctor.check_ops("extension", "cpu"), doctor.check_rollout("cpu")
    assert ops.verdict == FAILED and ops.value == "branch_rows: not as the reference"
    assert rollout.verdict == FAILED


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (Path("/proc/runs"), tmp_path / "file" / "runs"):
        (found,) = doctor.check_writing(folder)
        assert found.verdict == FAILED and "output_dir" in found.remedy
        assert all(finding.verdict != FAILED for finding in doctor.storage(folder))
    (found,) = doctor.check_writing(tmp_path / "deep" / "runs")
    assert found.verdict == OK and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("pass", "works"),
        ("raise ImportError('no such thing')", "status 1: ImportError: no such thing"),
        ("import os; os.abort()", "status -6: no message"),
        ("import time; time.sleep(600)", "no answer within 1 s"),
    ],
    ids=["works", "raises", "crashes", "hangs"],
)
def test_children(monkeypatch, code, told):
    monkeypatch.setattr(doctor, "CHILD_SECONDS", 1 if "sleep" in code else 600)
    child = Child("child", code, "mend it")
    found = child.finding()
    child.end()
    assert found.value == told and found.verdict == (OK if told == "works" else FAILED)
