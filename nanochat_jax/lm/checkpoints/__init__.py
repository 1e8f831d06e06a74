"""Checkpoints: states on disk, trained models, exported weights.

store         states of a run, one folder a step, written by Orbax
record        settings, data and versions beside a state; formats that are read
relaid        states in the layout of another number of devices
renamed       trees whose fields are stored under other names
differences   two records or layouts, key by key
checksums     SHA-256 of the files of a checkpoint
pretrained    a trained model, its parameters alone
source        a model to start from: its settings, tokenizer and weights
assemble      stored parameters as a run wants them, one array at a time
imported      checkpoints of weights alone
weights_file  parameters as safetensors, with a JSON file beside them
"""

from nanochat_jax.lm.checkpoints import (
    differences as differences,
    record as record,
    weights_file as weights_file,
)
from nanochat_jax.lm.checkpoints.imported import write_imported as write_imported
from nanochat_jax.lm.checkpoints.pretrained import load_trained as load_trained
from nanochat_jax.lm.checkpoints.source import (
    Source as Source,
    open_source as open_source,
)
from nanochat_jax.lm.checkpoints.store import Checkpoints as Checkpoints
