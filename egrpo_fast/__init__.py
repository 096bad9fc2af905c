"""E-GRPO for flow models: entropy-guided group relative policy optimisation, fast and exact (arXiv 2601.00423).

    from egrpo_fast import Trainer, load_config, ops
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from egrpo_fast import ops
    from egrpo_fast.api import Result, Trainer
    from egrpo_fast.config import load_config

__version__ = "0.1.0"
__all__ = ["Result", "Trainer", "load_config", "ops"]

_WHERE = {"Result": "api", "Trainer": "api", "load_config": "config"}


def __getattr__(name: str) -> Any:
    """What takes seconds to import is imported when it is first asked for."""
    if name == "ops":
        return import_module("egrpo_fast.ops")
    if name in _WHERE:
        return getattr(import_module(f"egrpo_fast.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'egrpo_fast' has no attribute {name!r}")
