"""TODO."""

from nanochat_jax.lm.checkpoints import (
    differences as differences,
    weights_file as weights_file,
)
from nanochat_jax.lm.checkpoints.pretrained import load_trained as load_trained
from nanochat_jax.lm.checkpoints.store import Checkpoints as Checkpoints
