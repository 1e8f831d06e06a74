"""The validation loss of a run."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nanochat_jax.config import schema
from nanochat_jax.lm.model import (
    activation_sharding,
    count_predictions,
    gpt,
    next_token_loss,
)
from nanochat_jax.lm.training.device_batches import feed_evaluation
from nanochat_jax.lm.training.run import Run


class Evaluator:
    """Validation loss of a run, on the same windows each time."""

    def __init__(self, run: Run):
        """Cuts the windows; nothing is compiled yet.

        Args:
          run: The run.

        Raises:
          ValueError: If the windows hold no token that is predicted.
        """
        self._mesh, self._batches = run.mesh, feed_evaluation(run)
        some_are_read = np.issubdtype(run.corpus.val.dtype, np.signedinteger)
        schema.require(
            (
                not some_are_read
                or any(count_predictions(jnp.asarray(x)) for x in self._batches),
                f"{run.corpus.description}: no token of the held-out windows is "
                "predicted. Raise `eval_batches` or `seq_len`, or give more "
                "conversations.",
            )
        )
        self._bytes_per_token = run.corpus.bytes_per_token
        self._loss: Callable[[gpt.Params, Any], tuple[Array, Array]] = jax.jit(
            lambda params, batch: (
                next_token_loss(run.graphdef, params, batch),
                count_predictions(batch),
            )
        )

    def __call__(self, params: gpt.Params) -> dict[str, float]:
        """Returns `val_loss`, and `val_bpb` if the bytes of a token are known."""
        with activation_sharding.using(self._mesh):
            found = [self._loss(params, batch) for batch in self._batches]
        losses, counts = np.array(found, np.float64).T
        loss = float(np.sum(losses * counts) / max(np.sum(counts), 1))
        if self._bytes_per_token is None:
            return {"val_loss": loss}
        return {
            "val_loss": loss,
            "val_bpb": loss / math.log(2) / self._bytes_per_token,
        }
