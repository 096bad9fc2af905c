"""A family is one folder: what `tests/models/toy_family.py` defines trains, is planned and exported like any other."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import egrpo_fast
from egrpo_fast.models.protocol import families

PROGRAM = """
import torch
import toy_family
from diffusers import ModelMixin
from egrpo_fast import Trainer
from egrpo_fast.commands.cluster import Cluster
from egrpo_fast.commands.cost import Cost
from egrpo_fast.config import load_config

toy_family.save("toy")
def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
model = {"path": "toy", "height": 8, "width": 8, "dtype": "float32", "guidance_scale": None}
settings = dict(model=model, iterations=6, optimizer={"lr": 0.01},
    schedule={"num_steps": 6}, rollout={"group_size": 8}, checkpoint={"every": 6},
    evaluation={"num_prompts": 4, "num_inference_steps": 4}, output_dir="run")
result = Trainer("shapes", rewards={"redness": redness}, prompts=["a bad leg", "a red tag", "glad", "dear"],
    **settings).train()
overrides = ["model.path=toy", "model.height=8", "model.width=8", "model.guidance_scale=null"]
cost = Cost(load_config("shapes", overrides), Cluster(1, 1, "cpu"))
trained = toy_family.ToyTransformer.from_pretrained(result.pipeline / "transformer")
first = toy_family.ToyTransformer.from_pretrained("toy/transformer")
print("RESULT", cost.parameters == sum(p.numel() for p in first.parameters()), cost.flops["evaluation"],
    result.after["redness"] > result.before["redness"],
    not torch.equal(first.blocks[0].weight, trained.blocks[0].weight))
"""


def test_a_family_is_one_folder(tmp_path):
    here = Path(__file__).parent
    (tmp_path / "toy_family.py").write_text((here / "toy_family.py").read_text())
    told = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-3000:]
    flops = 2 * 64 * 9 * (13 * 16 + 16 * 4)
    assert told.stdout.splitlines()[-1] == f"RESULT True {float(flops)} True True", told.stdout[-500:]


FAMILIES = re.compile("flux|sd3|stable_?diffusion|qwen|z_?image", re.IGNORECASE)


def test_no_code_names_a_family_outside_its_folder():
    """Names and imports. The script that makes small models for trials has parts that families share, and is exempt."""
    package = Path(egrpo_fast.__file__).parent
    checked = [file for file in package.rglob("*.py") if file != package / "models" / "random.py"]
    outside = [file for file in checked if file.relative_to(package).parts[:-2] != ("models",)]
    assert len(checked) > len(outside) > 60
    found = {file.relative_to(package): sorted(set(filter(FAMILIES.search, named(file)))) for file in checked}
    assert found[Path("models/flux/backbone.py")]
    assert {file: names for file, names in found.items() if names and package / file in outside} == {}


def named(file):
    for node in ast.walk(ast.parse(file.read_text())):
        yield from (str(getattr(node, field, "")) for field in ("id", "attr", "name", "arg", "module"))


def test_families_are_found_by_their_folders():
    names = ("Flux2Klein", "Flux2", "Flux", "QwenImage", "QwenImage21", "StableDiffusion3", "ZImage")
    assert families().keys() == {f"{name}Pipeline" for name in names}
