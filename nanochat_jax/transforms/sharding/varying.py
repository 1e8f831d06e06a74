"""Mesh axes over which arrays vary under `jax.shard_map`, which are part of types.

Branches of a `cond` and the carry of a loop must agree in them, as in shapes.
"""

from typing import Any

import jax
from jaxtyping import Array


def varying_axes(tree: Any) -> tuple[str, ...]:
    """Returns the mesh axes over which arrays of a tree vary; none outside."""
    return tuple(sorted(frozenset().union(*map(_axes, jax.tree.leaves(tree)))))


def vary_over(tree: Any, axes: tuple[str, ...]) -> Any:
    """Returns arrays as such that vary over these mesh axes, whatever they are.

    Args:
      tree: Arrays.
      axes: Names of mesh axes.
    """

    def cast(x: Array) -> Array:
        missing = tuple(axis for axis in axes if axis not in _axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _axes(x: Array) -> frozenset[str]:
    kind: Any = jax.typeof(x)
    # JAX has renamed it.
    named = getattr(kind, "manual_axis_type", None)
    return named.varying if named is not None else getattr(kind, "vma", frozenset())
