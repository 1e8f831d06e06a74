"""From the declarations of classes to the axes of leaves."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jax.tree_util import keystr

from nanochat_jax.interop.axes import stacks
from nanochat_jax.interop.axes.declared import Declared
from nanochat_jax.interop.axes.requests import Requests
from nanochat_jax.transforms import MatrixAxes

Answer = MatrixAxes | str | None


class Found(NamedTuple):
    """A leaf whose class is known.

    Attributes:
      declared: Declaration of the class.
      shape: Shape of the leaf.
      kept: Where the declared axes are in the leaf, if that is known for sure.
    """

    declared: Declared
    shape: tuple[int, ...]
    kept: tuple[int, ...] | None = None


def settle(
    found: Mapping[stacks.Path, Found], requests: Requests, *, strict: bool = True
) -> dict[stacks.Path, Answer]:
    """Returns the answer for each leaf whose class is known.

    Args:
      found: Declarations of the classes, by path.
      requests: Parts that are to be a batch.
      strict: Whether a leaf of two readings, and a request that meets no leaf, is an
        error. Without, the leaf has the answer `None`.

    Raises:
      ValueError: If leaves have two readings, with all of them, or a request meets no
        leaf.
    """
    leaves = {
        path: stacks.Leaf(leaf.declared.shape, leaf.shape)
        for path, leaf in found.items()
        if leaf.declared.shape is not None
    }
    answers: dict[stacks.Path, Answer] = {}
    doubtful: list[str] = []
    for path, (declared, shape, kept) in found.items():
        if declared.role != "matrix":
            answers[path] = declared.role
            continue
        places = stacks.read(leaves, path) if kept is None else [kept]
        answers[path] = None
        if len(places) == 1:
            answers[path] = requests.axes(name(path), declared, places[0])
        if len(places) > 1:
            doubtful.append(
                f"  {name(path)} of shape {shape}: a stack of {declared.shape} "
                f"({declared.source})"
            )
    if strict:
        _refuse(doubtful)
        requests.check([name(p) for p, axes in answers.items() if _is_matrix(axes)])
    return answers


def _is_matrix(answer: Answer) -> bool:
    return isinstance(answer, MatrixAxes)


def name(path: Iterable[Any]) -> str:
    """Returns a path of keys, or of names, such as `"block/query/kernel"`."""
    return keystr(tuple(path), simple=True, separator="/")


def _refuse(doubtful: list[str]) -> None:
    if doubtful:
        raise ValueError(
            "it cannot be told which axis of these leaves is the stack:\n"
            + "\n".join(doubtful)
            + "\nSizes do not matter for axes: give `matrix_axes` the same model with "
            "a number of stacked layers that is no other size of it (abstract, from "
            "`eval_shape`, will do), or give `MatrixAxes` by hand."
        )
