"""Labels and axes that are given: by the user, or by the modules of a model."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax
from jax.tree_util import KeyPath, keystr

from nanochat_jax.interop import as_arrays
from nanochat_jax.transforms import as_axes, is_axes, is_function, nearest

Label = Literal["matrix", "embedding", "head", "vector", "frozen"]
LABELS = ("matrix", "embedding", "head", "vector", "frozen")


def given_labels(
    labels: Any, params: optax.Params
) -> Callable[[KeyPath], Label | None]:
    """Returns the label that is given for a leaf, by its path; `None` for none.

    Args:
      labels: As for `settle`.
      params: The parameters.

    Raises:
      TypeError: If it is a function that does not take the parameters.
      ValueError: If a label is not known, or is for no parameter.
    """
    if is_function(labels):
        try:
            inspect.signature(labels).bind(params)
        except TypeError:
            raise TypeError(
                "`labels` as a function takes the parameters and returns a tree of "
                f"labels, as in Optax, got {labels}."
            ) from None
        labels = labels(params)
    table = entries(labels)
    unknown = sorted({str(x) for x in table.values()} - {*LABELS})
    if unknown:
        raise ValueError(f"`labels` must be of {[*LABELS]}, got {unknown}.")
    _require_met("labels", table, params)
    return finder(table)


def given_axes(
    axes: Any, params: optax.Params
) -> Callable[[KeyPath, tuple[int, ...]], Any]:
    """Returns the axes or label given for a leaf, by path and shape; `None` for none.

    Args:
      axes: As for `settle`.
      params: The parameters.

    Raises:
      TypeError: If an entry is neither axes nor a label.
      ValueError: If entries are for no parameter; see `_require_met`.
    """
    if is_function(axes):
        rule: Any = axes
        slashed = lambda path: keystr(path, simple=True, separator="/")
        return lambda path, shape: _axes_or_label(path, rule(slashed(path), shape))
    table = {path: _axes_or_label(path, x) for path, x in entries(axes).items()}
    derived = any(getattr(x, "source", "") for x in table.values())
    _require_met("matrix_axes", table, params, some=derived)
    find = finder(table)
    return lambda path, shape: find(path)


def _axes_or_label(path: KeyPath, given: Any) -> Any:
    """Returns axes or a label, and refuses anything else by its path."""
    if given is None or given in LABELS:
        return given
    try:
        return as_axes(given)
    except TypeError as error:
        raise TypeError(f"`matrix_axes` at {keystr(path)}: {error}") from None


def entries(tree: Any) -> dict[KeyPath, Any]:
    """Returns the entries of a tree or prefix by path, without `None`."""
    flat = jax.tree.leaves_with_path(as_arrays(tree), is_leaf=is_axes)
    return {path: node for path, node in flat if node is not None}


def finder(table: Mapping[KeyPath, Any]) -> Callable[[KeyPath], Any]:
    """Returns a function to the entry that a leaf belongs to, `None` for none."""
    named = {keystr(path): x for path, x in table.items()}

    def find(path: KeyPath) -> Any:
        name = nearest(named, path)
        return None if name is None else named[name]

    return find


def _require_met(
    argument: str,
    table: Mapping[KeyPath, Any],
    params: optax.Params,
    some: bool = False,
) -> None:
    """Refuses entries that are for no parameter, such as misspelt ones.

    Args:
      argument: Name of the argument that they came in.
      table: The entries by path.
      params: The parameters.
      some: Whether one entry that meets a parameter is enough, or is in one module with
        it, as with the axes of a model of which a part is trained, or adapters alone.
    """
    nodes = jax.tree.leaves_with_path(params, is_leaf=_is_absent)
    known = {keystr(path[:i]) for path, _ in nodes for i in range(len(path) + 1)}
    absent = {keystr(path) for path, node in nodes if _is_absent(node)}
    unmet = [
        keystr(path)
        for path in table
        if keystr(path) not in known and nearest(absent, path) is None
    ]
    beside = any(len(path) > 1 and keystr(path[:-1]) in known for path in table)
    if unmet and not (some and (beside or len(unmet) < len(table))):
        names = ", ".join(keystr(path) for path, _ in nodes[:8])
        raise ValueError(
            f"`{argument}` has entries for what is no parameter:\n  "
            + "\n  ".join(unmet[:8])
            + f"\nThe parameters are {names}{', ...' * (len(nodes) > 8)}. Give a tree "
            "like these, without a key such as 'params' above them in one of the two."
        )


def _is_absent(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)
