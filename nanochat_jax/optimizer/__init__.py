"""Muon for matrices, AdamW or Lion for the rest, put together from transforms."""

from nanochat_jax.optimizer.build import (
    build_optimizer as build_optimizer,
    matrix_optimizer as matrix_optimizer,
)
from nanochat_jax.optimizer.describe import (
    Description as Description,
    describe as describe,
)
from nanochat_jax.optimizer.muon import MUON_STATIC as MUON_STATIC, muon as muon
from nanochat_jax.optimizer.rule import Rule as Rule, schedule as schedule
from nanochat_jax.optimizer.storage import (
    fallback_codecs as fallback_codecs,
    projector_cost as projector_cost,
    state_codecs as state_codecs,
)
