"""Naming the leaves of updates and states, for transforms that treat them one by one.

A leaf of an Optax state is named by the field it stands in and by the parameter it
belongs to: `.inner[0].momentum['block']['kernel']` is the `momentum` of
`['block']['kernel']`. Codecs, keys and projections are looked up by these names, so a
leaf is treated alike in a whole tree and in a part of it.
"""

import zlib
from collections.abc import Collection

import jax
from jax.tree_util import GetAttrKey, KeyPath, keystr
from jaxtyping import Array, PRNGKeyArray


def split_path(path: KeyPath, fields: Collection[str]) -> tuple[str, str] | None:
    """Splits the path of a state leaf at the outermost of `fields`.

    Args:
      path: Path of the leaf in a state.
      fields: Names of NamedTuple fields to look for.

    Returns:
      The field and the path below it as a string, or `None` if no field is on the path.
    """
    for i, key in enumerate(path):
        if isinstance(key, GetAttrKey) and key.name in fields:
            return key.name, keystr(path[i + 1 :])
    return None


def field_names(path: KeyPath) -> set[str]:
    """Returns the names of the NamedTuple fields on `path`."""
    return {key.name for key in path if isinstance(key, GetAttrKey)}


def leaf_key(seed: int, count: Array, name: str) -> PRNGKeyArray:
    """Returns the random key of one leaf at one step.

    Keys follow from seed, step and name, so that no state holds one.
    """
    key = jax.random.key(zlib.crc32(f"{seed} {name}".encode()))
    return jax.random.fold_in(key, count)
