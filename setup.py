"""The mapped layout: `kernels/` at the top level is imported as `egrpo_fast.kernels`. Everything else: pyproject.toml."""

from setuptools import find_packages, setup

mapped = {"egrpo_fast": "egrpo_fast", "egrpo_fast.kernels": "kernels"}

setup(
    packages=[
        *find_packages(include=["egrpo_fast", "egrpo_fast.*"]),
        "egrpo_fast.kernels",
        *(f"egrpo_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir=mapped,
)
