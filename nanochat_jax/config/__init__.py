"""Settings, one flat TOML file for a whole run.

A file may hold any of the keys, and each class reads its own from it.
"""

from nanochat_jax.config import depth as depth, presets as presets, schema as schema
from nanochat_jax.config.base import (
    PARENT_ONLY as PARENT_ONLY,
    derived_from as derived_from,
)
from nanochat_jax.config.model import ModelConfig as ModelConfig
from nanochat_jax.config.optimizer import (
    HARDWARE_RANKS as HARDWARE_RANKS,
    OptimizerConfig as OptimizerConfig,
)
from nanochat_jax.config.presets import ModelName as ModelName
from nanochat_jax.config.run import (
    MESH_AXES as MESH_AXES,
    Config as Config,
    DatasetName as DatasetName,
    TokenDtype as TokenDtype,
)
