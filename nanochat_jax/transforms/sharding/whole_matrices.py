"""Work on whole matrices that are sharded over devices, each device on some of them.

Everything here runs under `jax.shard_map`, so that collectives are written down rather
than left to a compiler.

Axis letters: `m` rows and `n` columns of a matrix; a device's part is `a x b`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from nanochat_jax.transforms.sharding import placement, specs
from nanochat_jax.transforms.sharding.bits import from_bits, to_bits

Names = tuple[str, ...]
"""Names of mesh axes, major first."""


class Route(NamedTuple):
    """The way of matrices to owners and back.

    Attributes:
      sharding: Sharding of arrays `[*batch, m, n]`, which may be replicated; `None` if
        they are on one device.
      replicas: Mesh axes of replicas that share the work.
      rows: Mesh axes that shard rows.
      columns: Mesh axes that shard columns.
    """

    sharding: Any
    replicas: Names = ()
    rows: Names = ()
    columns: Names = ()

    @classmethod
    def of(cls, ndim: int, sharding: NamedSharding, count: int) -> "Route":
        """Returns the way of matrices of arrays of one shape.

        Mesh axes over which the arrays are replicated share in the work if there is
        some for every device.

        Args:
          ndim: Number of axes of each array.
          sharding: Its sharding.
          count: Number of matrices on a device, or parts of them, of all arrays.
        """
        *batch, rows, columns = specs.axes_of(sharding, ndim)
        used = [axis for axes in (*batch, rows, columns) for axis in axes]
        return cls(sharding, _replicas(used, sharding, count), rows, columns)

    @property
    def names(self) -> Names:
        """The mesh axes by which owners are counted, major first."""
        return (*self.replicas, *self.rows, *self.columns)

    @property
    def devices(self) -> int:
        """Number of owners."""
        return specs.ways(self.sharding, self.names) if self.sharding else 1

    def there(self, parts: Sequence[Array], size: int, dtype: DTypeLike) -> Array:
        """Returns the whole matrices of which this device is the owner, `[s, m, n]`.

        Args:
          parts: Its parts of the arrays.
          size: Number of matrices, with zero matrices that fill the stack.
          dtype: Type in which they are sent.
        """
        stack = jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in parts])
        x = jnp.pad(stack.astype(dtype), ((0, size - len(stack)), (0, 0), (0, 0)))
        return _assemble(_own_share(x, self.replicas), self.rows, self.columns)

    def back(self, x: Array, like: Sequence[Array]) -> list[Array]:
        """Undoes `there`.

        Args:
          x: Whole matrices, in the type in which they are sent.
          like: Parts of the arrays.
        """
        x = _gather(_take_apart(x, self.rows, self.columns), self.replicas)
        count = sum(math.prod(part.shape[:-2]) for part in like)
        parts = jnp.split(x[:count].astype(like[0].dtype), len(like))
        return [x.reshape(part.shape) for x, part in zip(parts, like, strict=True)]


def share_out(
    work: Callable[[Array], Array],
    leaves: Sequence[Array],
    sharding: NamedSharding,
    dtype: DTypeLike,
) -> list[Array]:
    """Returns `work` of the matrices of all leaves, each device working on some.

    The matrices are stacked, and one all-to-all turns a part of each on every device
    into some whole ones; another sends the results back. Zero matrices fill the stack
    up to a multiple of the number of devices. Mesh axes over which the leaves are
    replicated share in the work if there is some for every device, and gather results.

    Args:
      work: Function of a stack `[s, m, n]` that keeps its shape and type.
      leaves: Arrays of one shape, `[*batch, m, n]`.
      sharding: Sharding of each of them; they may be replicated too.
      dtype: Type in which matrices are sent and worked on.

    Returns:
      Arrays of the shape, type and sharding of `leaves`.
    """
    count = len(leaves) * math.prod(leaves[0].shape[:-2])
    route = Route.of(leaves[0].ndim, sharding, count)

    def body(*parts: Array) -> list[Array]:
        here = len(parts) * math.prod(parts[0].shape[:-2])
        size = here + -here % route.devices
        return route.back(work(route.there(parts, size, dtype)), parts)

    return _on_shards(body, sharding, len(leaves))(*leaves)


def in_columns(
    work: Callable[[Array, Names], Array], leaf: Array, sharding: NamedSharding
) -> Array:
    """Returns `work` of each matrix of a leaf, all its devices working on it together.

    Args:
      work: Function of some columns of matrices, `[s, short, columns]`, and of the mesh
        axes over which these are spread. It keeps the shape, and makes zero columns of
        zero columns.
      leaf: `[*batch, m, n]`; matrices with `m > n` are worked on transposed.
      sharding: Its sharding.

    Returns:
      An array of the shape, type and sharding of `leaf`.
    """
    *_, rows, columns = specs.axes_of(sharding, leaf.ndim)
    wide = leaf.shape[-2] <= leaf.shape[-1]
    short, long = (rows, columns) if wide else (columns, rows)

    def body(part: Array) -> list[Array]:
        x = part if wide else part.mT
        x = x.reshape(-1, *x.shape[-2:])
        size = x.shape[-1]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -size % specs.ways(sharding, short))))
        x = work(_exchange(x, short, split=2, concat=1), (*long, *short))
        x = _exchange(x, short, split=1, concat=2)[..., :size]
        return [(x if wide else x.mT).reshape(part.shape)]

    return _on_shards(body, sharding, 1)(leaf)[0]


def _on_shards(
    body: Callable[..., list[Array]], sharding: NamedSharding, count: int
) -> Callable[..., list[Array]]:
    """Returns `body`, run on each device with its shards of `count` arrays."""
    # Replicas come out the same by construction, which the check of types cannot see.
    return jax.shard_map(
        body,
        mesh=placement.mesh_of(sharding),
        in_specs=(sharding.spec,) * count,
        out_specs=[sharding.spec] * count,
        check_vma=False,
    )


def _replicas(used: Sequence[str], sharding: NamedSharding, count: int) -> Names:
    """Returns the mesh axes of replicas that share the work."""
    taken: list[str] = []
    for axis, size in sharding.mesh.shape.items():
        devices = specs.ways(sharding, (*used, *taken, axis))
        if size > 1 and axis not in used and devices <= count:
            taken.append(axis)
    return tuple(taken)


def _own_share(x: Array, replicas: Names) -> Array:
    """Returns the part of a stack that is not left to the other replicas."""
    share = len(x) // _axis_size(replicas)
    start = lax.axis_index(replicas) * share if replicas else 0
    return lax.dynamic_slice_in_dim(x, start, share)


def _gather(x: Array, replicas: Names) -> Array:
    """Undoes `_own_share`."""
    return _on_bits(lambda x: lax.all_gather(x, replicas, tiled=True), x, replicas)


def _assemble(x: Array, rows: Names, columns: Names) -> Array:
    """Returns some whole matrices, `[s, m, n]`, for a part of each, `[k*s, a, b]`."""
    r, c = _axis_size(rows), _axis_size(columns)
    x = _exchange(x, (*rows, *columns), split=0, concat=0)
    x = x.reshape(r, c, -1, *x.shape[1:]).transpose(2, 0, 3, 1, 4)
    return x.reshape(len(x), r * x.shape[2], c * x.shape[4])


def _take_apart(x: Array, rows: Names, columns: Names) -> Array:
    """Undoes `_assemble`."""
    r, c = _axis_size(rows), _axis_size(columns)
    s, m, n = x.shape
    x = x.reshape(s, r, m // r, c, n // c).transpose(1, 3, 0, 2, 4)
    x = x.reshape(r * c * s, m // r, n // c)
    return _exchange(x, (*rows, *columns), split=0, concat=0)


def _exchange(x: Array, names: Names, *, split: int, concat: int) -> Array:
    """Splits one axis over devices and puts the parts of another together."""
    # Zeros known to the compiler get a layout that its all-to-all refuses.
    x = lax.optimization_barrier(x)
    return _on_bits(
        lambda x: lax.all_to_all(x, names, split, concat, tiled=True), x, names
    )


def _axis_size(names: Names) -> int:
    return lax.axis_size(names) if names else 1


def _on_bits(send: Callable[[Array], Array], x: Array, names: Names) -> Array:
    return from_bits(send(to_bits(x)), x.dtype) if names else x
