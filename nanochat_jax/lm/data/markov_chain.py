"""A Markov chain of known entropy, a lower bound to compare losses with."""

import itertools
import math

import numpy as np

from nanochat_jax.config import schema

# Probabilities of the four possible next tokens.
CHANCES = (0.5, 0.25, 0.125, 0.125)
# Lowest loss of any model on the chain, in nats per token.
ENTROPY_RATE = -sum(p * math.log(p) for p in CHANCES)


def markov_chain(vocab_size: int, length: int, seed: int) -> np.ndarray:
    """Samples a Markov chain with four possible next tokens in each state.

    The four differ, and their probabilities are the same in every state. So the entropy
    rate is `ENTROPY_RATE` for any vocabulary and seed, and all tokens are equally
    frequent: a model that ignores the context has a loss of `ln vocab_size`.

    Args:
      vocab_size: Number of states, at least four.
      length: Tokens to sample.
      seed: Seed of the chain and of the sample.

    Returns:
      Ids, `[length]`, of the smallest unsigned type.

    Raises:
      ValueError: If the vocabulary is too small.
    """
    schema.require(
        (
            vocab_size >= len(CHANCES),
            "the data set synthetic needs a `vocab_size` of at least "
            f"{len(CHANCES)}, got {vocab_size}.",
        )
    )
    rng = np.random.default_rng(seed)
    following = rng.permutation(vocab_size).tolist()
    draws = np.searchsorted(np.cumsum(CHANCES), rng.random(length), side="right")
    chain = itertools.accumulate(
        draws.tolist(), lambda state, draw: following[(state + draw) % vocab_size]
    )
    return np.fromiter(chain, np.min_scalar_type(vocab_size - 1), length)
