"""Axes of the parameters of Flax linen modules, from an abstract call."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from nanochat_jax.interop.axes.declared import (
    Declared,
    embedding,
    from_einsum,
    listed,
    matrix,
    vector,
)
from nanochat_jax.interop.axes.linen_init import Init, layouts
from nanochat_jax.interop.axes.requests import Requests
from nanochat_jax.interop.axes.settle import Found, settle
from nanochat_jax.interop.axes.stacks import Path


class Parameter(NamedTuple):
    """A parameter as the module that made it sees it, within its transforms.

    Attributes:
      module: The module.
      name: Name of the parameter.
      shape: Its shape there.
      equation: The `einsum_str` that the module was called with, if any.
    """

    module: Any
    name: str
    shape: tuple[int, ...]
    equation: str | None


def matrix_axes(
    model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any], requests: Requests
) -> Any:
    """Returns axes for each parameter of a linen module.

    Args:
      model: The module.
      inputs: Positional arguments of a call.
      kwargs: Keyword arguments of the call.
      requests: Parts that are to be a batch.

    Returns:
      A dict like `variables["params"]`, without boxes.

    Raises:
      TypeError: If there are no inputs.
      ValueError: If leaves have two readings, or a request meets no leaf.
    """
    if not inputs and not kwargs:
        raise TypeError(
            "a Flax linen module has parameters only once it is called: give "
            "`matrix_axes(module, *inputs)` the inputs, or their shapes as "
            "`jax.ShapeDtypeStruct`."
        )
    init = Init(model, inputs, kwargs)
    notes = Notes()
    params = init.params(notes.note)
    shapes = {
        _path(path): tuple(x.shape) for path, x in jax.tree.leaves_with_path(params)
    }
    declared = {path: notes.settled(path) for path in notes.declared if path in shapes}
    matrices = {p: shapes[p] for p, known in declared.items() if known.role == "matrix"}
    changed = {p: s for p, s in matrices.items() if declared[p].shape != s}
    kept = layouts(init, matrices) if notes.maps_variables else {}
    kept = kept or layouts(init, changed)
    found = {
        path: Found(known, shapes[path], kept.get(path))
        for path, known in declared.items()
        if kept.get(path, ()) is not None
    }
    answers = settle(found, requests)
    return jax.tree.map_with_path(lambda path, _: answers.get(_path(path)), params)


def _path(path: Any) -> Path:
    return tuple(str(key.key) for key in path)


class Notes:
    """Declarations of parameters by the modules that are called.

    Attributes:
      declared: By path of the parameter.
      attention: Paths of modules of attention.
      maps_variables: Whether `nn.map_variables` has been at work.
    """

    def __init__(self) -> None:
        self.declared: dict[Path, Declared] = {}
        self.attention: set[Path] = set()
        self.maps_variables = False

    def note(self, context: Any, args: Any, kwargs: Any) -> None:
        """Notes a call that has come to its end.

        Of several notes of a parameter the first is kept: the innermost module sees
        the parameter without the axes that transforms add.
        """
        from flax import linen as nn
        from flax.core import meta

        scope = context.module.scope
        if isinstance(context.module, nn.MultiHeadDotProductAttention):
            self.attention.add(scope.path)
        if type(context.module).__name__.startswith("Map_variables"):
            self.maps_variables = True
        strings = (x for x in (*args, *kwargs.values()) if isinstance(x, str))
        equation = next(strings, None)
        for name, value in scope.variables().get("params", {}).items():
            path = (*scope.path, name)
            if isinstance(value, Mapping) or path in self.declared:
                continue
            shape = tuple(meta.unbox(value).shape)
            known = declare(Parameter(context.module, name, shape, equation))
            if known is not None:
                self.declared[path] = known

    def settled(self, path: Path) -> Declared:
        """Returns the declaration at a path, with heads in attention only."""
        declared = self.declared[path]
        if path[:-2] in self.attention:
            return declared
        return dataclasses.replace(declared, heads={})


def declare(parameter: Parameter) -> Declared | None:
    """Returns the declaration of a parameter by the class of a linen module."""
    from flax import linen as nn
    from flax.linen import linear, recurrent

    for kind, rule in _RULES.items():
        homes = (nn, linear, recurrent)
        found = next((getattr(home, kind) for home in homes if hasattr(home, kind)), ())
        if isinstance(parameter.module, found):
            return rule(parameter, f"flax.linen.{kind}")
    return None


def _dense(parameter: Parameter, source: str) -> Declared | None:
    if parameter.name != "kernel":
        return _bias(parameter)
    return matrix(parameter.shape, [0], [1], source)


def _dense_general(parameter: Parameter, source: str) -> Declared | None:
    if parameter.name != "kernel":
        return _bias(parameter)
    module, shape = parameter.module, parameter.shape
    first, last = len(listed(module.batch_dims)), len(listed(module.features))
    fan_in = range(first, len(shape) - last)
    fan_out = range(len(shape) - last, len(shape))
    axis = fan_in[0] if module.name == "out" else fan_out[0]
    return matrix(shape, fan_in, fan_out, source, heads={axis: shape[axis]})


def _einsum(parameter: Parameter, source: str) -> Declared | None:
    equation = parameter.equation or parameter.module.einsum_str
    if parameter.name != "kernel" or not equation:
        return _bias(parameter)
    return from_einsum(equation, parameter.shape, source)


def _conv(parameter: Parameter, source: str) -> Declared | None:
    if parameter.name != "kernel":
        return _bias(parameter)
    shape = parameter.shape
    if getattr(parameter.module, "transpose_kernel", False):  # [*window, out, in]
        return matrix(shape, [*range(len(shape) - 2), -1], [-2], source)
    return matrix(shape, range(len(shape) - 1), [-1], source)


def _conv_local(parameter: Parameter, source: str) -> Declared | None:
    if parameter.name != "kernel":
        return _bias(parameter)
    return matrix(parameter.shape, [-2], [-1], source)  # [*places, window * in, out]


def _bias(parameter: Parameter) -> Declared | None:
    return vector(*parameter.shape) if parameter.name == "bias" else None


def _embed(parameter: Parameter, source: str) -> Declared | None:
    del source
    return embedding(*parameter.shape) if parameter.name == "embedding" else None


def _vector(parameter: Parameter, source: str) -> Declared | None:
    del source
    return vector(*parameter.shape)


_VECTORS = (
    "BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "PReLU", "RMSNorm",
    "SpectralNorm", "WeightNorm",
)  # fmt: skip
_RULES: dict[str, Callable[[Parameter, str], Declared | None]] = {
    "Dense": _dense,
    "DenseParams": _dense,
    "DenseGeneral": _dense_general,
    "Einsum": _einsum,
    "ConvLocal": _conv_local,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Embed": _embed,
    **dict.fromkeys(_VECTORS, _vector),
}
