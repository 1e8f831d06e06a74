"""Settings, one flat TOML file for a whole run.

A file may hold any of the keys, and each class reads its own from it.
"""

from nanochat_jax.config.base import PARENT_ONLY as PARENT_ONLY
from nanochat_jax.config.model import ModelConfig as ModelConfig
from nanochat_jax.config.optimizer import (
    HARDWARE_RANKS as HARDWARE_RANKS,
    OptimizerConfig as OptimizerConfig,
)
from nanochat_jax.config.run import (
    Config as Config,
    DatasetName as DatasetName,
    TokenDtype as TokenDtype,
)
