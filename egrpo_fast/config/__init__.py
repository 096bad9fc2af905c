"""The typed configuration of a run: named YAML recipes, `key.path=value` overrides, everything checked before loading.

Every field has a type, a range and a line on what it means. A mistake is a `ConfigError` of one line per field.
"""

from egrpo_fast.config.config import Config, plan_of
from egrpo_fast.config.loading import load_config
from egrpo_fast.config.recipe_files import ConfigError
from egrpo_fast.config.sections import (
    CHECKPOINTS,
    CONFIG_FILE,
    OWNED_BY_US,
    PIPELINE,
    RUN_FILE,
    GuardsConfig,
    GuidanceConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    TailConfig,
    TaylorSeerConfig,
    takes,
)

__all__ = [
    "CHECKPOINTS",
    "CONFIG_FILE",
    "OWNED_BY_US",
    "PIPELINE",
    "RUN_FILE",
    "Config",
    "ConfigError",
    "GuardsConfig",
    "GuidanceConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RolloutConfig",
    "TailConfig",
    "TaylorSeerConfig",
    "load_config",
    "plan_of",
    "takes",
]
