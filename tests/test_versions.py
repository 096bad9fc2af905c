"""The versions that are claimed to be supported are the versions that are tested."""

import os
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNTESTED = {"wandb", "flash-attn"}
"""Extras of one package each that no test runs: they have no bound."""


def bounds():
    """Package -> oldest version, of everything that a user installs."""
    lines = list(PROJECT["dependencies"])
    for extra, more in PROJECT["optional-dependencies"].items():
        lines += [] if extra in {"dev", *UNTESTED} else more
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(each.name): [s.version for s in each.specifier if s.operator == ">="] for each in found}


def pins(name):
    lines = (ROOT / ".ci" / name).read_text().splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.+]+)", line) for line in lines if not line.startswith("#")]
    assert all(found), f"{name} holds a line that is no pin"
    return {canonicalize_name(each[1]): Version(each[2]) for each in found}


def test_the_oldest_environment_is_what_pyproject_promises():
    promised = {name: Version(*oldest) for name, oldest in bounds().items()}
    assert pins("oldest.txt") == promised


def test_the_newest_environment_pins_everything_that_is_promised():
    newest = pins("newest.txt")
    assert bounds().keys() <= newest.keys()
    assert all(newest[name] >= Version(*oldest) for name, oldest in bounds().items())


def test_this_environment_is_the_one_that_was_asked_for():
    """`make test` and `make test-oldest` say what they install. Else a green run would say nothing of versions."""
    file = os.environ.get("EGRPO_CONSTRAINTS")
    if not file:
        pytest.skip("started without make, or with what the index has today: nobody says which versions are tested")
    wanted = pins(Path(file).name)
    found = {name: Version(version(name)).public for name in bounds()}
    assert found == {name: wanted[name].public for name in found}


def test_python_is_as_old_as_promised_or_newer():
    promised = Version(PROJECT["requires-python"].removeprefix(">="))
    assert sys.version_info[:2] >= promised.release
    made = (ROOT / "Makefile").read_text()
    assert f"sys.version_info < {promised.release}" in made and f"Python {promised} or newer is needed" in made
    assert f"With Python {promised} or newer" in (ROOT / "README.md").read_text()
    assert f'"py_limited_api": "cp{promised.major}{promised.minor}"' in (ROOT / "setup.py").read_text()
