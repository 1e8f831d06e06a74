"""Groups of leaves of one shape, and the random keys of leaves."""

import math
import zlib
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray


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


def leaf_key(seed: int, count: Array, name: str) -> PRNGKeyArray:
    """Returns the random key of one leaf at one step.

    Keys follow from seed, step and name, so that no state holds one.
    """
    # Put together, not derived, which would be code of its own for each leaf. The step
    # first, so that hashes of it are not kept from one turn of a loop to the next.
    words = [count, jnp.uint32(zlib.crc32(f"{seed} {name}".encode()))]
    data = jnp.stack([word.astype(jnp.uint32) for word in words])
    return jax.random.wrap_key_data(data, impl="threefry2x32")
