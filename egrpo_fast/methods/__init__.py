"""The methods, a file each: which steps are stochastic, where rows branch, what is trained, whose rewards are compared.

A file of this folder that defines a `Method` is registered by lying here. Everywhere the last grid step is
deterministic: noise that is added there would stay in the image. What each method takes from its paper, and where
public code differs: docs/methods.md.
"""

import pkgutil
from importlib import import_module

from egrpo_fast.methods.method import MERGING, METHODS, OPTIONAL, Method, Run

__all__ = ["MERGING", "METHODS", "OPTIONAL", "Method", "Run"]

for _file in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
