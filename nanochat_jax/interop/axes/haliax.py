"""Axes of the parameters of Haliax modules, by the names of their axes."""

import sys
from collections.abc import Callable
from typing import Any

from nanochat_jax.interop.axes.declared import (
    Declared,
    Place,
    embedding,
    matrix,
    vector,
)


def is_named(node: Any) -> bool:
    """Returns whether a node is a `NamedArray`, which holds one array."""
    return isinstance(node, sys.modules["haliax"].NamedArray)


def declare(place: Place) -> Declared | None:
    """Returns the declaration of a field by the class of a Haliax module.

    Axes of a stack have names of their own, so that nothing need be told from sizes.
    """
    if not is_named(place.value):
        return None
    nn = sys.modules["haliax"].nn
    for kind, rule in _RULES.items():
        if isinstance(place.module, _class(nn, kind)):
            return rule(place, f"haliax.nn.{kind}")
    return None


def is_vector(module: Any) -> bool:
    """Returns whether a module holds vectors only."""
    return isinstance(module, _class(sys.modules["haliax"].nn, "LayerNormBase"))


def _class(nn: Any, kind: str) -> Any:
    """Returns a class of `haliax.nn` or of one of its modules."""
    homes = (nn, *(getattr(nn, home, None) for home in _HOMES))
    return next((getattr(home, kind) for home in homes if hasattr(home, kind)), ())


def _linear(place: Place, source: str) -> Declared | None:
    return _by_names(place, source, place.module.In, place.module.Out)


def _conv(place: Place, source: str) -> Declared | None:
    inputs = [place.module.In, *place.module.Spatial]
    return _by_names(place, source, inputs, place.module.Out)


def _by_names(place: Place, source: str, inputs: Any, outputs: Any) -> Declared | None:
    if place.name == "bias":
        return vector()
    if place.name != "weight":
        return None
    names = [axis.name for axis in place.value.axes]
    fan_in = [names.index(name) for name in _names(inputs) if name in names]
    fan_out = [names.index(name) for name in _names(outputs) if name in names]
    if not fan_in or not fan_out or {*fan_in} & {*fan_out}:
        return None
    sizes = [axis.size for axis in place.value.axes]
    return matrix(sizes, sorted(fan_in), sorted(fan_out), source)


def _names(axes: Any) -> list[str]:
    """Returns the names of an axis or of several."""
    several = [axes] if isinstance(axes, str) or hasattr(axes, "name") else axes
    return [getattr(axis, "name", axis) for axis in several]


def _embedding(place: Place, source: str) -> Declared | None:
    del source
    return embedding() if place.name == "weight" else None


def _vector(place: Place, source: str) -> Declared | None:
    del place, source
    return vector()


_HOMES = ("linear", "conv", "embedding", "normalization")
_RULES: dict[str, Callable[[Place, str], Declared | None]] = {
    "Linear": _linear,
    "MoELinear": _linear,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Embedding": _embedding,
    "LayerNormBase": _vector,
}
