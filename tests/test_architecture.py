"""Imports run one way, and each foreign giant is known to one room."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [  # from the top, every floor from left to right; a room imports only from rooms that come after it
    ("cli", "api", "train", "commands"),
    ("trainer", "sampler"),
    ("runs", "policy"),
    ("models", "rewards", "scoring", "distributed"),
    ("objective", "rollout"),
    ("config", "methods", "plan", "prompts", "shapes", "recipes"),
    ("section", "schedule", "entropy", "noise", "ops", "kernels", "terminal", "files", "folder_lock", "host_to_device"),
]
PLACE = {room: place for place, room in enumerate(room for rooms in ROOMS for room in rooms)}
KNOWN_TO = {
    "deepspeed": {
        "egrpo_fast.distributed.engine",
        "egrpo_fast.distributed.loading",
        "egrpo_fast.distributed.master_weights",
        "egrpo_fast.distributed.world",
    },
    # Every module of a family's folder may. The scripts that make pipelines build them from its parts; no module
    # imports them.
    "diffusers": {
        "egrpo_fast.models.attention",
        "egrpo_fast.models.vae",
        "egrpo_fast.models.quantization",
        "egrpo_fast.models.tail",
        "egrpo_fast.models.scheduler",
        "egrpo_fast.models.protocol",
        "egrpo_fast.models.random",
        *(f"egrpo_fast.models.{file.parent.name}.{file.stem}" for file in (ROOT / "egrpo_fast/models").glob("*/*.py")),
    },
    "torchao": {"egrpo_fast.models.quantization", "egrpo_fast.models.tail"},
    "open_clip": {"egrpo_fast.rewards.clip", "egrpo_fast.rewards.hps"},
    "pyarrow": {"egrpo_fast.commands.evaluate", "egrpo_fast.prompts.formats"},
    "datasets": {"egrpo_fast.prompts.formats"},
    "httpx2": {"egrpo_fast.rewards.http"},
    "starlette": {"egrpo_fast.commands.serve_rewards"},
    "uvicorn": {"egrpo_fast.commands.serve_rewards"},
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
    if top in KNOWN_TO and module not in KNOWN_TO[top]:
        return f"{module} imports {imported}, which only {sorted(KNOWN_TO[top])} may know"
    if top == "kernels":
        return f"{module} imports the bare name kernels"
    if top != "egrpo_fast" or not rest or rest == ["__version__"] or room is None:
        return None
    assert room in PLACE and rest[0] in PLACE, f"{module} or {imported} has no room: give it a floor in ROOMS"
    if room != rest[0] and PLACE[rest[0]] <= PLACE[room]:
        return f"{module} imports {imported}, which is not below it"
    return None


@pytest.mark.parametrize(("module", "path"), list(modules()))
def test_imports_run_downwards(module, path):
    found = [breach for imported in imports_of(path) if (breach := breaches(module, imported))]
    assert not found, "\n".join(found)


def test_no_imports_go_in_a_circle():
    """Within a room neither."""
    names = [parameter.values for parameter in modules()]
    known = {module for module, _ in names}
    TopologicalSorter({module: known.intersection(imports_of(path)) - {module} for module, path in names}).prepare()


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("egrpo_fast.plan", "egrpo_fast.rollout"),
        ("egrpo_fast.ops", "egrpo_fast.schedule"),
        ("egrpo_fast.kernels.reference.philox", "egrpo_fast.noise"),
        ("egrpo_fast.trainer", "deepspeed"),
        ("egrpo_fast.rollout", "diffusers"),
        ("egrpo_fast.models.other", "diffusers"),
        ("egrpo_fast.ops", "kernels"),
    ],
)
def test_a_breach_is_seen(module, imported):
    assert breaches(module, imported)


def test_the_repository_root_may_be_on_the_path():
    """diffusers and transformers look for a package of the bare name `kernels`; the root has a folder of that name."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    code = "import sys; assert sys.path[0] == ''; import egrpo_fast.models.flux.backbone, egrpo_fast.kernels.reference"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_folder_kernels_hides_no_package(tmp_path):
    """A package of that name is found although the root comes before it on the path."""
    (tmp_path / "kernels.py").write_text("installed = True")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    code = "import kernels; assert kernels.installed"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
