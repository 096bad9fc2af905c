"""Imports run one way, and each foreign giant is known to one room."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [  # from the top; a room imports from rooms below it and from itself, never from its own floor or above
    ("train", "cli"),
    ("run_folder",),
    ("trainer", "evaluation", "fidelity", "reward_server", "encoding", "cost", "doctor", "launch"),
    ("report",),
    ("sampler",),
    ("tail_check", "progress"),
    ("export", "inputs"),
    ("engine", "metrics", "figures", "page", "guards", "rewards", "backbones", "objective"),
    ("rollout", "beside", "checkpoint", "masters", "heartbeat", "interruption"),
    ("methods", "config_reference"),
    ("plan", "prompts", "config", "embeddings"),
    ("schedule", "noise", "ops", "shapes", "recipes", "recipe_files", "transfer", "claim", "prompt_files"),
    ("kernels", "files", "terminal"),
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
KNOWN_TO = {
    "deepspeed": {"egrpo_fast.engine", "egrpo_fast.masters"},
    # The scripts that make pipelines build them from its parts; no module imports them.
    "diffusers": {
        "egrpo_fast.backbones.flux",
        "egrpo_fast.backbones.flux_folder",
        "egrpo_fast.backbones.flux_forward",
        "egrpo_fast.backbones.lora",
        "egrpo_fast.backbones.random_flux",
        "egrpo_fast.shapes.pretrain",
    },
    "torchao": {"egrpo_fast.backbones.tail"},
    "open_clip": {"egrpo_fast.rewards.clip", "egrpo_fast.rewards.hps", "egrpo_fast.shapes.pretrain"},
    "pyarrow": {"egrpo_fast.evaluation", "egrpo_fast.prompt_files"},
    "datasets": {"egrpo_fast.prompt_files"},
    "httpx2": {"egrpo_fast.rewards.http"},
    "starlette": {"egrpo_fast.reward_server"},
    "uvicorn": {"egrpo_fast.reward_server"},
}


def modules():
    for folder, package in ((ROOT / "egrpo_fast", "egrpo_fast"), (ROOT / "kernels", "egrpo_fast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            dotted = ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
            yield pytest.param(dotted, path, id=dotted)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "egrpo_fast":
                yield from (f"egrpo_fast.{alias.name}" for alias in node.names)
            else:
                yield node.module


def breaches(module, imported):
    """What is wrong with `module` importing `imported`; None: nothing."""
    room = module.split(".")[1] if "." in module else None
    top, *rest = imported.split(".")
    if imported == "egrpo_fast.shapes.pretrain":
        return f"{module} imports a script"
    if top in KNOWN_TO and module not in KNOWN_TO[top]:
        return f"{module} imports {imported}, which only {sorted(KNOWN_TO[top])} may know"
    if top == "kernels":
        return f"{module} imports the bare name kernels"
    if top != "egrpo_fast" or not rest or rest == ["__version__"] or room is None:
        return None
    assert room in FLOOR and rest[0] in FLOOR, f"{module} or {imported} has no room: give it a floor in ROOMS"
    if room != rest[0] and FLOOR[rest[0]] <= FLOOR[room]:
        return f"{module} imports {imported}, which is not below it"
    return None


@pytest.mark.parametrize(("module", "path"), list(modules()))
def test_imports_run_downwards(module, path):
    found = [breach for imported in imports_of(path) if (breach := breaches(module, imported))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("egrpo_fast.plan", "egrpo_fast.rollout"),
        ("egrpo_fast.ops", "egrpo_fast.schedule"),
        ("egrpo_fast.kernels.reference.philox", "egrpo_fast.noise"),
        ("egrpo_fast.trainer", "deepspeed"),
        ("egrpo_fast.rollout", "diffusers"),
        ("egrpo_fast.backbones.other", "diffusers"),
        ("egrpo_fast.rewards.shapes", "egrpo_fast.shapes.pretrain"),
        ("egrpo_fast.ops", "kernels"),
    ],
)
def test_a_breach_is_seen(module, imported):
    assert breaches(module, imported)


def test_the_repository_root_may_be_on_the_path():
    """diffusers and transformers look for a package of the bare name `kernels`; the root has a folder of that name."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    code = "import sys; assert sys.path[0] == ''; import egrpo_fast.backbones.flux, egrpo_fast.kernels.reference"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_folder_kernels_hides_no_package(tmp_path):
    """A package of that name is found although the root comes before it on the path."""
    (tmp_path / "kernels.py").write_text("installed = True")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    code = "import kernels; assert kernels.installed"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
