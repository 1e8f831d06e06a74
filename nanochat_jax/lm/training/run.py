"""A run before it trains: settings, data, model and optimizer."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from nanochat_jax.config import Config, schema
from nanochat_jax.lm.checkpoints import Source, record
from nanochat_jax.lm.data import (
    Batches,
    Corpus,
    FileOptions,
    Tokenizer,
    load_corpus,
    load_tokenizer,
)
from nanochat_jax.lm.model import (
    activation_sharding,
    build_optimizer,
    gpt,
    param_sharding,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run before anything is trained.

    Attributes:
      config: Its settings.
      graphdef: Structure of the model.
      params: Shapes and types of the parameters, and where they are on a mesh.
      tx: The optimizer.
      tokenizer: Text to ids and back.
      corpus: Tokens to train and validate on.
      source: Model to start from, where it is found already.
    """

    config: Config
    graphdef: nnx.GraphDef[gpt.GPT]
    params: gpt.Params
    tx: optax.GradientTransformationExtraArgs
    tokenizer: Tokenizer
    corpus: Corpus
    source: Source | None = None

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The mesh that parameters, state and batches are on, if there is one."""
        sharding = jax.tree.leaves(self.params)[0].sharding
        return sharding and sharding.mesh

    @property
    def meta(self) -> dict[str, Any]:
        """Record of the run in a checkpoint."""
        return record.make(
            self.config,
            data=self.corpus.fingerprint,
            tokenizer=self.corpus.tokenizer,
        )


def make_run(
    config: Config, epochs: int | None = None, source: Source | None = None
) -> Run:
    """Loads the data and builds model and optimizer; allocates no parameters.

    Args:
      config: Settings of the run.
      epochs: Times to go through the data, in place of `config.total_steps`.
      source: Model to start from, if its settings and tokenizer are to be checked.

    Returns:
      The run.

    Raises:
      ValueError: If data or settings are not usable.
    """
    if source:
        source.check(config)
    tokenizer = load_tokenizer(config.tokenizer, config.end_token)
    corpus = load_corpus(
        config.dataset,
        config.data_path,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        seed=config.seed,
        seq_len=config.sequence,
        files=FileOptions(config.token_dtype, config.token_format, config.text_field),
    )
    if source:
        _check_ids(source, config, corpus)
    if epochs is not None:
        total = epochs * train_batches(config, corpus).steps_per_epoch
        config = dataclasses.replace(config, total_steps=total)
    graphdef, params = gpt.abstract_model(config)
    if config.mesh or jax.process_count() > 1:
        devices = param_sharding.make_mesh(config.mesh)
        activation_sharding.check_batch(devices, config.batch_size)
        params = param_sharding.place(params, devices, config)
    tx = build_optimizer(config, params)
    return Run(config, graphdef, params, tx, tokenizer, corpus, source)


def _check_ids(source: Source, config: Config, corpus: Corpus) -> None:
    """Refuses ids of another tokenizer than that of the model, unless it is given."""
    given = config.tokenizer not in (None, source.tokenizer_file)
    ids, known = corpus.tokenizer, source.fingerprint
    is_text = config.dataset not in ("tokens", "synthetic")
    schema.require(
        (
            given or not is_text or known is not None,
            f"{source.path}: has no tokenizer, so the ids of its vocabulary are not "
            "known. Give its `tokenizer.json` by `--tokenizer`.",
        ),
        (
            given or None in (ids, known) or ids == known,
            f"{source.path}: the model to start from takes ids of the tokenizer "
            f"{known}, but {corpus.description} has ids of {ids} (SHA-256). Prepare "
            f"data with {source.tokenizer_file or 'that tokenizer'}, or give theirs by "
            "`--tokenizer` to train the model on other ids.",
        ),
    )


def train_batches(
    config: Config, corpus: Corpus, rows: np.ndarray | None = None
) -> Batches:
    """Returns the batches of a run, int32 `[A, B, S + 1]`.

    Args:
      config: Settings of the run.
      corpus: Its data.
      rows: As for `Batches`.
    """
    return Batches(
        corpus.train,
        batch_size=config.batch_size,
        seq_len=config.sequence,
        seed=config.seed,
        microbatches=config.grad_accum_steps,
        rows=rows,
    )
