"""Sampling from a model, token by token, with a cache of keys and values.

One function reads the prompt, padded to a power of two, and the single tokens after it.
So it compiles once for decoding, and once for each padded prompt size.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int32, Key

from nanochat_jax.config import ModelConfig, schema
from nanochat_jax.lm.model import gpt


def generate(
    graphdef: nnx.GraphDef[gpt.GPT],
    params: gpt.Params,
    config: ModelConfig,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yields tokens that continue `prompt`.

    A token depends only on the seed and on the tokens before it. So the same arguments
    give the same tokens, and a smaller `max_tokens` gives the first of them.

    Args:
      graphdef: Structure of the model, from `gpt.init`.
      params: Its parameters.
      config: Its shape.
      prompt: Token ids to continue, at least one.
      max_tokens: Most tokens to yield.
      temperature: Divisor of the logits; 0 always takes the most likely token.
      top_k: Number of most likely tokens to sample from; all if not given.
      seed: Seed of the sampling.

    Returns:
      An iterator over token ids, each computed on demand.

    Raises:
      ValueError: Before anything is computed, if an argument is out of range, or
        prompt and continuation do not fit into `config.max_seq_len`.
    """
    _check(config, prompt, max_tokens, temperature, top_k)
    next_token = functools.partial(
        _next_token,
        graphdef,
        params,
        key=jax.random.key(seed),
        temperature=float(temperature),
        top_k=None if top_k is None else min(top_k, config.vocab_size),
    )
    return _decode(next_token, config, prompt, max_tokens)


def sample(
    logits: Float[Array, "V"],
    key: Key[Array, ""],
    temperature: ArrayLike,
    top_k: int | None = None,
) -> Int32[Array, ""]:
    """Samples a token id.

    Args:
      logits: Unnormalised log-probabilities.
      key: PRNG key.
      temperature: Divisor of `logits`; 0 takes the most likely token.
      top_k: Number of most likely tokens to sample from; all if not given.

    Returns:
      A token id.
    """
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][-1]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    # Selected by value, so that another temperature does not recompile.
    divisor = jnp.where(temperature == 0, 1.0, temperature)
    sampled = jax.random.categorical(key, logits / divisor)
    return jnp.where(temperature == 0, logits.argmax(), sampled).astype(jnp.int32)


def _decode(
    next_token: Callable[..., tuple[Int32[Array, ""], gpt.Cache]],
    config: ModelConfig,
    prompt: Sequence[int],
    max_tokens: int,
) -> Iterator[int]:
    cache = gpt.init_cache(config, 1, config.max_seq_len)
    tokens = _pad(prompt, config.max_seq_len)
    count = len(prompt)
    for _ in range(max_tokens):
        token, cache = next_token(tokens, count, cache)
        yield int(token)
        tokens, count = token[None, None], 1


def _pad(prompt: Sequence[int], max_len: int) -> Int32[np.ndarray, "1 S"]:
    """Returns `prompt` padded with zeros to a power of two, at most `max_len`."""
    size = min(1 << (len(prompt) - 1).bit_length(), max_len)
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(prompt)] = prompt
    return tokens


@functools.partial(jax.jit, static_argnames="top_k", donate_argnames="cache")
def _next_token(
    graphdef: nnx.GraphDef[gpt.GPT],
    params: gpt.Params,
    tokens: Int32[Array, "1 S"],
    count: Int32[Array, ""],
    cache: gpt.Cache,
    *,
    key: Key[Array, ""],
    temperature: ArrayLike,
    top_k: int | None,
) -> tuple[Int32[Array, ""], gpt.Cache]:
    """Reads the first `count` of `tokens`, then samples the token after them."""
    model = nnx.merge(graphdef, params)
    length = cache.length + count
    features, cache = model.extend(tokens, cache)
    last = jax.lax.dynamic_index_in_dim(features[0], count - 1, keepdims=False)
    key = jax.random.fold_in(key, length)
    token = sample(model.logits(last), key, temperature, top_k)
    # The cache of the padding is masked by `length`, and overwritten later.
    return token, cache._replace(length=length)


def _check(
    config: ModelConfig,
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float,
    top_k: int | None,
) -> None:
    total = len(prompt) + max_tokens
    foreign = sorted({int(t) for t in prompt if not 0 <= t < config.vocab_size})
    schema.require(
        (len(prompt) > 0, "`prompt` must have at least one token, got none."),
        (
            not foreign,
            f"`prompt` must have token ids from 0 to {config.vocab_size - 1}, got "
            f"{foreign[:5]}. Encode it with the tokenizer of the model.",
        ),
        (max_tokens >= 0, f"`max_tokens` must not be negative, got {max_tokens}."),
        (
            total <= config.max_seq_len,
            f"prompt and `max_tokens` must fit into {config.max_seq_len} tokens, "
            f"got {len(prompt)} + {max_tokens} = {total}. Shorten either.",
        ),
        (temperature >= 0, f"`temperature` must not be negative, got {temperature}."),
        (
            top_k is None or top_k >= 1,
            f"`top_k` must be at least 1, or None for all tokens, got {top_k}.",
        ),
    )
