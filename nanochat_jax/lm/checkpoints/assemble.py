"""Stored parameters as a run wants them, one array at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.tree_util import KeyPath, keystr

from nanochat_jax.config import ModelConfig
from nanochat_jax.lm.model import Params

ReadLeaf = Callable[[str], np.ndarray]
"""Function from the path of a stored parameter, such as `embed/embedding`, to it."""


def assembled(
    stored: ModelConfig, read_leaf: ReadLeaf, config: ModelConfig, like: Params
) -> Params:
    """Returns stored parameters as another configuration of the same model has them.

    Args:
      stored: Settings of the model, as it is stored.
      read_leaf: Reader of the stored parameters.
      config: Settings of the run.
      like: Shapes and types of its parameters, and where they are on a mesh.
    """
    flat, treedef = jax.tree.flatten_with_path(like)
    read_leaf = functools.lru_cache(maxsize=1)(read_leaf)
    found: dict[int, jax.Array] = {}
    # Layers of one stacked array after each other, so that it is read once.
    by_kind = sorted(range(len(flat)), key=lambda i: _without_layer(flat[i][0]))
    for i in by_kind:
        path, leaf = flat[i]
        name = keystr(path, simple=True, separator="/")
        if config.scan_layers and not stored.scan_layers and name.startswith("blocks/"):
            x = np.empty(leaf.shape, leaf.dtype)
            for layer in range(config.n_layers):
                x[layer] = read_leaf(name.replace("blocks/", f"blocks/{layer}/", 1))
        elif stored.scan_layers and not config.scan_layers and "blocks/" in name:
            layer, rest = name.removeprefix("blocks/").split("/", 1)
            x = read_leaf(f"blocks/{rest}")[int(layer)]
        else:
            x = _padded(read_leaf(name), leaf.shape, stored.vocab_size)
        found[i] = put_as(leaf, x)
    return treedef.unflatten([found[i] for i in range(len(flat))])


def put_as(like: Any, x: np.ndarray) -> jax.Array:
    """Returns an array in the type and the place of another.

    Args:
      like: Shape, type and perhaps sharding.
      x: The array, on the host.
    """
    x = np.asarray(x, like.dtype)
    if getattr(like, "sharding", None) is None:
        # The state is donated, so that its memory must be JAX's own.
        return jax.block_until_ready(jax.device_put(x, may_alias=False))
    return jax.make_array_from_callback(x.shape, like.sharding, lambda at: x[at])


def paths_of(params: Params) -> dict[str, tuple[KeyPath, Any]]:
    """Returns path and shape of parameters by their names with slashes."""
    return {
        keystr(path, simple=True, separator="/"): (path, x)
        for path, x in jax.tree.leaves_with_path(params)
    }


def _padded(x: np.ndarray, shape: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Returns a table without its padding, or with another of zeros."""
    if x.shape == shape:
        return x
    axis = next(
        i for i, (a, b) in enumerate(zip(x.shape, shape, strict=True)) if a != b
    )
    kept = x.take(range(min(vocab_size, x.shape[axis])), axis)
    widths = [(0, b - a) for a, b in zip(kept.shape, shape, strict=True)]
    return np.pad(kept, widths)


def _without_layer(path: KeyPath) -> str:
    return keystr(
        tuple(key for key in path if not isinstance(getattr(key, "key", 0), int))
    )
