"""Groups of leaves of one shape."""

import math
from collections.abc import Hashable, Sequence

import jax
from jaxtyping import Array

CPU_GROUP_BYTES = 13 << 20
"""Bytes of a group on a processor: two matrices of 768 by 2,064."""

ACCELERATOR_GROUP_BYTES = 64 << 20
"""Bytes of a group elsewhere: small groups leave a GPU idle."""


def group_bytes() -> int:
    """Returns how many float32 bytes of leaves are worked on together by default.

    An update plans temporaries of two to three times that.
    """
    on_cpu = jax.default_backend() == "cpu"
    return CPU_GROUP_BYTES if on_cpu else ACCELERATOR_GROUP_BYTES


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
