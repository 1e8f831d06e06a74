"""Naming the leaves of updates and states, for transforms that treat them one by one.

A leaf of an Optax state is named by the field it stands in and by the parameter it
belongs to: `.inner[0].momentum['block']['kernel']` is the `momentum` of
`['block']['kernel']`. Codecs, keys and projections are looked up by these names, so a
leaf is treated alike in a whole tree and in a part of it.
"""

import math
import zlib
from collections.abc import Collection, Hashable, Sequence

import jax
import jax.numpy as jnp
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


def owner(path: KeyPath, names: Collection[str]) -> str | None:
    """Returns which of the parameters `names` a state leaf belongs to, if to any.

    It is the one whose path the leaf's own path ends in.
    """
    ends = (keystr(path[i:]) for i in range(len(path) + 1))
    return next((end for end in ends if end in names), None)


def group_bytes() -> int:
    """Returns how many float32 bytes of leaves are worked on together by default.

    13 MiB on a processor, which holds two matrices of 768 by 2,064, and 64 MiB
    elsewhere: small groups leave a GPU idle. An update plans temporaries of two to
    three times that.
    """
    return (13 if jax.default_backend() == "cpu" else 64) << 20


def piece_bytes() -> int:
    """Returns how many float32 bytes are iterated on, or copied out, at a time.

    Half of a group on a processor, which is no faster on more, and all of it elsewhere.
    """
    return group_bytes() // (2 if jax.default_backend() == "cpu" else 1)


def group_by_shape(
    leaves: Sequence[Array],
    max_bytes: int,
    kinds: Sequence[Hashable] | None = None,
    devices: int = 1,
) -> list[list[int]]:
    """Groups leaves of one shape and type, in order, each group within `max_bytes`.

    Args:
      leaves: Arrays.
      max_bytes: Most bytes of a group, counted in float32; a larger leaf is alone.
      kinds: What else leaves of a group must agree in, one of each leaf.
      devices: Number of devices that a group is shared out to. `max_bytes` is for each
        of them, and a group that others follow has as many matrices for each.

    Returns:
      The indices of each group.
    """
    groups: list[list[int]] = []
    last: dict[tuple, list[int]] = {}  # the group in which a shape has room
    for i, x in enumerate(leaves):
        kind = (x.shape, x.dtype, kinds and kinds[i])
        group = last.get(kind)
        if group is None or len(group) == _group_size(x, max_bytes, devices):
            group = last[kind] = []
            groups.append(group)
        group.append(i)
    return groups


def _group_size(x: Array, max_bytes: int, devices: int) -> int:
    """Returns how many leaves like `x` are worked on together."""
    together = devices // math.gcd(devices, math.prod(x.shape[:-2]))
    fitting = max_bytes * devices // (4 * max(x.size, 1))
    return max(together, fitting // together * together)


def field_names(path: KeyPath) -> set[str]:
    """Returns the names of the NamedTuple fields on `path`."""
    return {key.name for key in path if isinstance(key, GetAttrKey)}


def leaf_key(seed: int, count: Array, name: str) -> PRNGKeyArray:
    """Returns the random key of one leaf at one step.

    Keys follow from seed, step and name, so that no state holds one.
    """
    # Put together, not derived, which would be code of its own for each leaf. The step
    # first, so that hashes of it are not kept from one turn of a loop to the next.
    words = [count, jnp.uint32(zlib.crc32(f"{seed} {name}".encode()))]
    data = jnp.stack([word.astype(jnp.uint32) for word in words])
    return jax.random.wrap_key_data(data, impl="threefry2x32")
