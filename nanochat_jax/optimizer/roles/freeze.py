"""Parameters that are frozen by patterns on their paths."""

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from nanochat_jax.config import Group
from nanochat_jax.optimizer.groups import (
    groups_of,
    layer_paths,
    nearest_paths,
    slashed_paths,
    with_parents,
)


def frozen_by(
    patterns: Collection[str], params: optax.Params, groups: Sequence[Group] = ()
) -> dict[str, str]:
    """Returns the parameters that patterns and groups freeze.

    A pattern is a glob of the shell, of `*`, `?` and `[...]`, where `*` takes slashes
    too. It is matched to the path of a parameter, such as
    `blocks/0/attention/query/kernel`, and to those of the modules around it: `blocks/1`
    freezes all of that block, and nothing of `blocks/10`.

    Example:
      >>> params = {"embed": {"embedding": jnp.ones((8, 4))}, "out": jnp.ones(4)}
      >>> frozen_by(["embed"], params)
      {"['embed']['embedding']": 'embed'}

    Args:
      patterns: The patterns.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.
      groups: Groups of parameters, some of which may be frozen.

    Returns:
      The first pattern that matches, or that of the group, by path of the parameter as
      `jax.tree_util.keystr` gives it.

    Raises:
      ValueError: If a pattern or a group matches nothing, or single layers of stacked
        blocks; if nothing is left to train.
    """
    flat = jax.tree.leaves_with_path(params)
    slashed = slashed_paths(params)
    shapes = dict(slashed.values())
    found: dict[str, str] = {}
    errors = []
    for pattern in patterns:
        matched = [
            name for name, (path, _) in slashed.items() if _matches(path, pattern)
        ]
        found = dict.fromkeys(matched, pattern) | found
        if not matched:
            errors.append(_why_unmet(pattern, shapes))
    in_group = groups_of(groups, params) if not errors else {}
    held = {name: group.match for name, group in in_group.items() if group.freeze}
    found = held | found
    left = any(_trains(x) and keystr(path) not in found for path, x in flat)
    if (patterns or held) and not errors and not left:
        named = [*patterns, *dict.fromkeys(held.values())]
        errors.append(f"`freeze` {named} leaves no parameter to train.")
    if errors:
        raise ValueError("\n".join(errors))
    return found


def stop_gradients(tree: Any, frozen: Collection[str], under: str = "") -> Any:
    """Returns parameters of which the frozen ones are constants to a gradient.

    Example:
      >>> loss = lambda x: jnp.sum(stop_gradients({"x": x, "y": x}, ["['x']"])["x"])
      >>> float(jax.grad(loss)(1.0))
      0.0

    Args:
      tree: Parameters.
      frozen: Paths of those that are frozen, from `frozen_by`.
      under: Path of the tree, if it is a part of the parameters.
    """
    return jax.tree.map_with_path(
        lambda path, x: (
            jax.lax.stop_gradient(x) if under + keystr(path) in frozen else x
        ),
        tree,
    )


def _trains(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _matches(path: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(part, pattern) for part in with_parents(path))


def _why_unmet(pattern: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Returns why a pattern matches no parameter, and what to give instead."""
    for path, shape in shapes.items():
        for layer in layer_paths(path, shape):
            if _matches(layer, pattern):
                return (
                    f"`freeze` {pattern!r} is for layers by their number, such as "
                    f"{layer}, but these are stacked in one array, {path} "
                    f"{list(shape)}. Freeze that one, or set `scan_layers` and "
                    "`update_in_backward` to false."
                )
    near = nearest_paths(pattern, shapes)
    return (
        f"`freeze` {pattern!r} matches no parameter. It must be a path, such as "
        f"{', '.join(near)}, or a glob that matches one."
    )
