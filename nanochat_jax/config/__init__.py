"""Settings, one flat TOML file for a whole run, of which each class reads its own keys.

schema     keys declared at their fields; reading, checking and describing them
spelling   known names that an unknown one stands for
coerce     values as the types of their fields
byte_sizes sizes in bytes as text
removed    keys and values of earlier versions
depth      settings that follow from the depth of a model
presets    settings that follow from the name of a model
base       base class of the settings: from TOML to checked values
group      `Group`, settings of some of the parameters
optimizer  `OptimizerConfig`
optimizer_checks  its checks
model      `ModelConfig`
run        `Config`, all settings of a run
"""

from nanochat_jax.config import (
    coerce as coerce,
    depth as depth,
    presets as presets,
    schema as schema,
    spelling as spelling,
)
from nanochat_jax.config.base import (
    PARENT_ONLY as PARENT_ONLY,
    derived_from as derived_from,
)
from nanochat_jax.config.group import Group as Group, Rate as Rate
from nanochat_jax.config.model import ModelConfig as ModelConfig
from nanochat_jax.config.optimizer import (
    HARDWARE_RANKS as HARDWARE_RANKS,
    OptimizerConfig as OptimizerConfig,
)
from nanochat_jax.config.presets import ModelName as ModelName
from nanochat_jax.config.removed import (
    REMOVED as REMOVED,
    without_removed as without_removed,
)
from nanochat_jax.config.run import (
    MESH_AXES as MESH_AXES,
    Config as Config,
    DatasetName as DatasetName,
    TokenDtype as TokenDtype,
    TokenFormat as TokenFormat,
)
