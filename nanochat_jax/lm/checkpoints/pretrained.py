"""A trained model, read from a checkpoint: parameters, structure and tokenizer."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from nanochat_jax.config import Config, ModelConfig, schema
from nanochat_jax.lm.checkpoints import record
from nanochat_jax.lm.checkpoints.source import tokenizer_beside
from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.data import Tokenizer, load_tokenizer
from nanochat_jax.lm.model import build_optimizer, gpt
from nanochat_jax.transforms import averaged_weights


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
      config: Its shape and arithmetic.
      graphdef: Its structure.
      params: Its parameters.
      step: Steps it was trained for.
      tokenizer_file: Where its tokenizer was, None for bytes.
      end_token: Token that ends a document, if it was set.
      fingerprint: Fingerprint of its tokenizer, if known.
    """

    config: ModelConfig
    graphdef: nnx.GraphDef[gpt.GPT]
    params: gpt.Params
    step: int
    tokenizer_file: str | None
    end_token: str | None
    fingerprint: str | None

    def load_tokenizer(self, path: str | Path | None = None) -> Tokenizer:
        """Returns the tokenizer of the model.

        Args:
          path: Where it is now, if it was moved or was not known. For a model of ids of
            an unknown tokenizer any is taken that the vocabulary has room for.

        Raises:
          ValueError: If the file is missing or not known, or not the one of the
            training.
        """
        path = path or self.tokenizer_file
        schema.require(
            (
                self.fingerprint is not None or path is not None,
                "the model was trained on ids of an unknown tokenizer. Give its file "
                "by `--tokenizer`.",
            )
        )
        tokenizer = load_tokenizer(path, self.end_token)
        vocab_size = self.config.vocab_size
        schema.require(
            (
                self.fingerprint in (None, tokenizer.fingerprint),
                f"{path or 'bytes'}: the model was trained on ids of the tokenizer "
                f"{self.fingerprint}, but this one is {tokenizer.fingerprint} "
                "(SHA-256). Give that file by `--tokenizer`.",
            ),
            (
                tokenizer.vocab_size <= vocab_size,
                f"{path or 'bytes'}: the tokenizer has {tokenizer.vocab_size} ids, but "
                f"the model's `vocab_size` is only {vocab_size}.",
            ),
        )
        return tokenizer


def load_trained(directory: str | Path) -> Trained:
    """Reads a model from a checkpoint, without the optimizer state.

    If the run kept an average of its weights, they are read as it evaluated them.

    Args:
      directory: Checkpoint folder, or the folder of one step; else the latest is read.

    Returns:
      The model, its parameters on the default device.

    Raises:
      ValueError: If there is no checkpoint, or it is damaged or of another model.
    """
    checkpoints = Checkpoints(directory)
    step, meta = checkpoints.latest_step(), checkpoints.read_meta()
    source = f"{checkpoints.directory}/{step}"
    stored = record.settings_in(meta, source)
    config = schema.build(ModelConfig, stored, source, others=stored)
    graphdef, params = gpt.abstract_model(config)
    whole = Config.from_values(stored, source, derive=lambda values: {})
    if whole.average is None or meta.get("contains") == "weights":
        params = checkpoints.restore({"params": params}, step, partial=True)["params"]
    else:
        params = _averaged(checkpoints, whole, params, step, meta)
    return Trained(
        config,
        graphdef,
        params,
        step or 0,
        tokenizer_beside(checkpoints.directory) or stored["tokenizer"],
        stored["end_token"],
        meta["tokenizer"],
    )


def _averaged(
    checkpoints: Checkpoints,
    config: Config,
    params: gpt.Params,
    step: int | None,
    meta: Mapping[str, Any],
) -> gpt.Params:
    """Reads parameters and the state of their optimizer, and returns the average."""
    tx = build_optimizer(config, params)
    target = {"params": params, "opt_state": jax.eval_shape(tx.init, params)}
    names = record.stored_names(meta)
    found = checkpoints.restore(target, step, partial=True, names=names)
    averaged = averaged_weights(
        tx, found["opt_state"], found["params"], config.average_share
    )
    return jax.tree.map(lambda x, p: x.astype(p.dtype), averaged, params)
