"""Paths of parameters, of the modules around them, and of layers in a stack."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.tree_util import keystr


def slashed_paths(params: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns path and shape of each parameter, by path as `keystr` gives it.

    Example:
      >>> slashed_paths({"embed": {"embedding": jnp.ones((8, 4))}})
      {"['embed']['embedding']": ('embed/embedding', (8, 4))}

    Args:
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.
    """
    return {
        keystr(path): (
            keystr(path, simple=True, separator="/"),
            tuple(getattr(x, "shape", ())),
        )
        for path, x in jax.tree.leaves_with_path(params)
    }


def with_parents(path: str) -> Iterator[str]:
    """Yields the paths of the modules around a parameter, and its own.

    Args:
      path: Path of the parameter.
    """
    parts = path.split("/")
    for i in range(len(parts)):
        yield "/".join(parts[: i + 1])


def layer_paths(path: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Yields the paths of the layers of an array, if it is one of stacked layers.

    Args:
      path: Path of the array.
      shape: Its shape.
    """
    parts = path.split("/")
    count = shape[0] if len(shape) > 1 else 0
    for at in range(1, len(parts)):
        if not any(part.isdigit() for part in parts[at - 1 : at + 1]):
            for layer in range(count):
                yield "/".join([*parts[:at], str(layer), *parts[at:]])


def nearest_paths(pattern: str, paths: Iterable[str]) -> list[str]:
    """Returns the paths that are most like a pattern, or the first of all.

    Args:
      pattern: The pattern.
      paths: Paths of parameters.
    """
    known = list(dict.fromkeys(part for path in paths for part in with_parents(path)))
    return difflib.get_close_matches(pattern, known, n=3) or known[:8]
