"""Warnings of `describe`: what a user should look at."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from nanochat_jax.optimizer.notes import Note
from nanochat_jax.optimizer.sharding import shardings_of
from nanochat_jax.transforms import record, specs

_PLURALS = {"matrix": "matrices", "embedding": "embeddings", "head": "output layers"}
_SHOWN = 4


class Leaf(Protocol):
    """A described parameter, as far as warnings look at it."""

    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def label(self) -> str: ...  # noqa: D102
    @property
    def state(self) -> str: ...  # noqa: D102


def without_effect(leaves: Sequence[Leaf], notes: Mapping[str, Note]) -> Iterator[str]:
    """Yields a warning for each setting that changes no parameter's state.

    Args:
      leaves: The parameters.
      notes: Notes on their optimizers, by label.
    """
    for label, plural in _PLURALS.items():
        states = [leaf.state for leaf in leaves if leaf.label == label]
        if not states or label not in notes:
            continue
        projected = any("basis " in state for state in states)
        unmet = [
            f"{field} {codec}"
            for field, codec in notes[label].codecs.items()
            if not any(f"{field} {codec}" in state for state in states)
            and (projected or field != "complement")
            and field != "basis"  # whose bits nobody need have asked for
        ]
        if unmet:
            yield (
                f"no state of {plural} is stored as {', '.join(unmet)}: all have too "
                "few entries. Lower `min_size` of `muon`, or `quant_min_size` of the "
                "settings, to store it so."
            )
        if "GaLore" in notes[label].name and not projected:
            yield (
                f"{notes[label].name} projects no matrix: at that rank it saves bytes "
                "of none. Lower the rank, or leave it out."
            )


def frozen(params: optax.Params, leaves: Sequence[Leaf]) -> Iterator[str]:
    """Yields a warning that names the parameters that are frozen, if any are.

    Args:
      params: The parameters; leaves that are no arrays of floats never train.
      leaves: The same, described, in the same order.
    """
    found = [
        leaf.path
        for x, leaf in zip(jax.tree.leaves(params), leaves, strict=True)
        if leaf.label == "frozen" and _is_float(x)
    ]
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        yield f"frozen, never updated: {', '.join(found[:_SHOWN])}{more}."


def unnamed_heads(leaves: Sequence[Leaf]) -> Iterator[str]:
    """Yields a warning for each matrix that has the shape of an output layer.

    Args:
      leaves: The parameters.
    """
    tables = {
        tuple(sorted(leaf.shape)): leaf.path
        for leaf in leaves
        if leaf.label == "embedding" and len({*leaf.shape}) == len(leaf.shape) == 2
    }
    alike: dict[tuple[int, ...], list[Leaf]] = {}
    for leaf in leaves:
        if leaf.label == "matrix" and tuple(sorted(leaf.shape)) in tables:
            alike.setdefault(tuple(sorted(leaf.shape)), []).append(leaf)
    for shape, found in alike.items():
        if len(found) == 1:
            yield (
                f"{found[0].path} has the shape of the embedding {tables[shape]} and "
                "looks like an output layer, which Muon trains worse than AdamW; if "
                'it is one, label it "head".'
            )


def moved(told: record.Record, params: optax.Params) -> Iterator[str]:
    """Yields a warning for each parameter whose view is not sharded as it is.

    Args:
      told: What transforms told at `init`.
      params: The parameters, which may have shardings.
    """
    shardings = shardings_of(params)
    if shardings is None:
        return
    by_path: Mapping[str, Any] = {
        keystr(path): s for path, s in jax.tree.leaves_with_path(shardings)
    }
    for name, view in told.views.items():
        axes = specs.moved_axes(view, by_path[name])
        if axes:
            yield (
                f"{name} is sharded over {list(axes)} along an axis that its matrix "
                "merges into another; its state is sharded otherwise, and gradients "
                "are sent for it."
            )


def _is_float(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
