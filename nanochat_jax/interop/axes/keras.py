"""Axes of the variables of Keras layers."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from nanochat_jax.interop.axes.declared import (
    Declared,
    embedding,
    from_einsum,
    matrix,
    vector,
)
from nanochat_jax.interop.axes.requests import Requests
from nanochat_jax.interop.axes.settle import Answer, Found, settle
from nanochat_jax.interop.axes.stacks import Path
from nanochat_jax.transforms import MatrixAxes

_HEADS = ("classifier", "head", "lm_head", "logits", "output_head", "predictions")


class Variable(NamedTuple):
    """A variable of a layer.

    Attributes:
      layer: The layer.
      name: Name of the variable in it.
      shape: Its shape.
      part: Part of attention that the layer is, such as `"query"`; empty elsewhere.
    """

    layer: Any
    name: str
    shape: tuple[int, ...]
    part: str = ""


def matrix_axes(model: Any, requests: Requests) -> list[Answer]:
    """Returns axes for each trainable variable of a Keras layer or model.

    Args:
      model: The layer, built.
      requests: Parts that are to be a batch.

    Returns:
      A list like `model.trainable_variables`, which `stateless_call` takes.

    Raises:
      ValueError: If the layer is not built, or a request meets no variable.
    """
    variables = model.trainable_variables
    if not variables:
        raise ValueError(
            f"{type(model).__name__} has no trainable variables: build it, or call it "
            "once, before `matrix_axes`."
        )
    place = {id(variable): i for i, variable in enumerate(variables)}
    layers = list(model._flatten_layers())
    parts = _parts_of_attention(layers)
    found: dict[Path, Found] = {}
    places = {}
    for layer in layers:
        for variable in layer._trainable_variables:
            shape, part = tuple(variable.shape), parts.get(id(layer), "")
            declared = declare(Variable(layer, variable.name, shape, part))
            if declared is not None and id(variable) in place:
                path = tuple(variable.path.split("/"))
                if path in found:  # names of layers need not be unique
                    path = (*path, str(place[id(variable)]))
                found[path] = Found(declared, shape)
                places[path] = place[id(variable)]
    settled = settle(found, requests)
    # A list keeps no names, by which output layers are told elsewhere.
    settled |= {
        path: "head"
        for path in settled
        if path[-2:-1] and path[-2] in _HEADS and isinstance(settled[path], MatrixAxes)
    }
    answers = {places[path]: a for path, a in settled.items()}
    return [answers.get(i) for i in range(len(variables))]


def _parts_of_attention(layers: list[Any]) -> dict[int, str]:
    """Returns the names of the layers that attention is made of, by identity."""
    names = ("MultiHeadAttention", "GroupQueryAttention")
    attention = tuple(getattr(sys.modules["keras"].layers, name) for name in names)
    return {
        id(part): part.name
        for layer in layers
        if isinstance(layer, attention)
        for part in layer._flatten_layers(include_self=False, recursive=False)
    }


def declare(variable: Variable) -> Declared | None:
    """Returns the declaration of a variable by the class of a Keras layer."""
    layers = sys.modules["keras"].layers
    for kind, rule in _RULES.items():
        if isinstance(variable.layer, getattr(layers, kind, ())):
            if variable.name.startswith("bias"):
                return vector(*variable.shape)
            return rule(variable, f"keras.layers.{kind}")
    return None


def _dense(variable: Variable, source: str) -> Declared | None:
    if variable.name not in ("kernel", "lora_kernel_a", "lora_kernel_b"):
        return None
    return matrix(variable.shape, [0], [1], source)


def _einsum(variable: Variable, source: str) -> Declared | None:
    if variable.name != "kernel":
        return None
    declared = from_einsum(variable.layer.equation, variable.shape, source)
    axis = {"query": 1, "key": 1, "value": 1, "attention_output": 0}.get(variable.part)
    if declared is None or axis is None or declared.role != "matrix":
        return declared
    heads = {axis: variable.shape[axis]}
    return matrix(
        variable.shape, declared.fan_in, declared.fan_out, source, heads=heads
    )


def _conv(variable: Variable, source: str) -> Declared | None:
    if variable.name != "kernel":
        return None
    return matrix(variable.shape, range(len(variable.shape) - 1), [-1], source)


def _conv_transpose(variable: Variable, source: str) -> Declared | None:
    if variable.name != "kernel":
        return None
    window = range(len(variable.shape) - 2)  # [*window, out, in]
    return matrix(variable.shape, [*window, -1], [-2], source)


def _conv_by_channel(variable: Variable, source: str) -> Declared | None:
    if variable.name in ("kernel", "depthwise_kernel"):  # [*window, in, multiplier]
        window = range(len(variable.shape) - 2)
        return matrix(variable.shape, window, [-2, -1], source)
    if variable.name == "pointwise_kernel":
        return matrix(variable.shape, range(len(variable.shape) - 1), [-1], source)
    return None


def _cell(variable: Variable, source: str) -> Declared | None:
    if variable.name not in ("kernel", "recurrent_kernel"):
        return None
    last = len(variable.shape) - 1
    gates = {"LSTM": 4, "GRU": 3}.get(source.split(".")[-1].removesuffix("Cell"))
    gates_of = {last: gates} if gates else {}
    return matrix(variable.shape, range(last), [last], source, gates=gates_of)


def _embedding(variable: Variable, source: str) -> Declared | None:
    del source
    return embedding(*variable.shape) if variable.name == "embeddings" else None


def _vector(variable: Variable, source: str) -> Declared | None:
    del source
    return vector(*variable.shape)


_RULES: dict[str, Callable[[Variable, str], Declared | None]] = {
    "Dense": _dense,
    "EinsumDense": _einsum,
    **dict.fromkeys(
        ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _conv_transpose
    ),
    **dict.fromkeys(
        ("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D"),
        _conv_by_channel,
    ),
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _conv),
    **dict.fromkeys(("LSTMCell", "GRUCell", "SimpleRNNCell"), _cell),
    "Embedding": _embedding,
    **dict.fromkeys(
        (
            "BatchNormalization", "GroupNormalization", "LayerNormalization",
            "RMSNormalization", "UnitNormalization", "PReLU",
        ),
        _vector,
    ),
}  # fmt: skip
