"""The validation loss of a run."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float32

from nanochat_jax.lm.model import activation_sharding, gpt
from nanochat_jax.lm.training.device_batches import feed_evaluation
from nanochat_jax.lm.training.run import Run


class Evaluator:
    """Validation loss of a run, on the same windows each time."""

    def __init__(self, run: Run):
        """Cuts the windows; nothing is compiled yet."""
        self._mesh, self._batches = run.mesh, feed_evaluation(run)
        self._bytes_per_token = run.corpus.bytes_per_token
        self._loss: Callable[[gpt.Params, Any], Float32[Array, ""]] = jax.jit(
            lambda params, batch: gpt.next_token_loss(run.graphdef, params, batch)
        )

    def __call__(self, params: gpt.Params) -> dict[str, float]:
        """Returns `val_loss`, and `val_bpb` if the bytes of a token are known."""
        with activation_sharding.using(self._mesh):
            losses = [self._loss(params, batch) for batch in self._batches]
        loss = float(np.mean(losses))
        if self._bytes_per_token is None:
            return {"val_loss": loss}
        return {
            "val_loss": loss,
            "val_bpb": loss / math.log(2) / self._bytes_per_token,
        }
