"""The commands of `nanochat-jax`, one per module: a dataclass of flags that can `run`.

compare, doctor, export, generate, import_, plan, plot, prepare_data, train: the
commands.
help      what `--help` prints
messages  what `train` prints before and after the steps
shared    flags, output and errors that commands have in common
tables    flags for settings that are tables in a TOML file
"""

from nanochat_jax.commands import help as help, tables as tables
from nanochat_jax.commands.compare import Compare as Compare
from nanochat_jax.commands.doctor import Doctor as Doctor
from nanochat_jax.commands.export import Export as Export
from nanochat_jax.commands.generate import Generate as Generate
from nanochat_jax.commands.import_ import Import as Import
from nanochat_jax.commands.plan import Plan as Plan
from nanochat_jax.commands.plot import Plot as Plot
from nanochat_jax.commands.prepare_data import PrepareData as PrepareData
from nanochat_jax.commands.shared import (
    derived_settings as derived_settings,
    usage_errors as usage_errors,
)
from nanochat_jax.commands.train import Train as Train
