"""Which axes of each parameter are the matrix, by the modules of a model."""

import sys
from collections.abc import Mapping
from typing import Any

from nanochat_jax.interop.axes import keras, linen, nnx, trees
from nanochat_jax.interop.axes.requests import Requests


def matrix_axes(
    model: Any,
    *inputs: Any,
    split: bool | Mapping[str, int] | None = None,
    per_head: bool = False,
    **kwargs: Any,
) -> Any:
    """Returns which axes of each parameter are the matrix, as its module says.

    A layer knows which axes of its kernel it sums over and which it makes, however
    many they are and in whatever order; no name and no guess is needed. Stacks made by
    `vmap` and `scan` are found along any axis.

    Example:
      >>> from flax import linen as nn
      >>> attention = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=64)
      >>> axes = matrix_axes(attention, jnp.ones((1, 8, 64)))
      >>> print(axes["query"]["kernel"])
      MatrixAxes(fan_in=(0,), fan_out=(1, 2))
      >>> print(axes["out"]["kernel"], axes["out"]["bias"])
      MatrixAxes(fan_in=(0, 1), fan_out=(2,)) vector

    Args:
      model: A Flax NNX module, a Flax linen module, a Keras layer or model, or a pytree
        that is or holds Equinox, Haliax or NNX modules. Parameters may be abstract.
      *inputs: For linen, positional arguments of a call: arrays or their shapes. Other
        values are taken as they are.
      split: Kernels to see as several matrices side by side: `True` for the gates of
        recurrent cells; or a mapping from patterns of paths to numbers of
        parts of the output, such as `{"*/qkv/kernel": 3}`.
      per_head: Whether each head of attention is a matrix of its own.
      **kwargs: For linen, keyword arguments of the call.

    Returns:
      A tree like the parameters: the dict of linen's `"params"` without boxes, a dict
      like `nnx.as_pure(nnx.state(model, nnx.Param))`, modules like `eqx.filter(model,
      eqx.is_inexact_array)`, a list like Keras's `trainable_variables`. Its leaves are
      `MatrixAxes`; `"embedding"` or `"vector"` where the class says so; `None` for
      a class that is not known.

    Raises:
      TypeError: If the model is of another kind, or linen has no inputs.
      ValueError: If the axis of a stack cannot be told, with all such leaves, or
        `split` or `per_head` meets no parameter.
    """
    requests = Requests(split, per_head)
    if _is_a(model, "flax.linen", "Module"):
        return linen.matrix_axes(model, inputs, kwargs, requests)
    if inputs or kwargs:
        raise TypeError(
            "only a Flax linen module needs inputs, got some with "
            f"{type(model).__name__}."
        )
    if _is_a(model, "keras", "Layer"):
        return keras.matrix_axes(model, requests)
    if _is_a(model, "flax.nnx", "Module"):
        return nnx.matrix_axes(model, requests)
    if trees.holds_modules(model):
        return trees.matrix_axes(model, requests)
    raise TypeError(
        "`matrix_axes` needs a Flax NNX or linen module, a Keras layer, or a pytree of "
        f"Equinox or Haliax modules, got {type(model).__name__}. For other models give "
        "`MatrixAxes(fan_in, fan_out)` for each leaf by hand: a tree, or a function of "
        "path and shape."
    )


def in_tree(params: Any) -> Any:
    """Returns axes and labels from the modules in a pytree of parameters, if any.

    Args:
      params: Parameters as an optimizer is given them.

    Returns:
      A tree like `params` as `matrix_axes` returns it, with `None` too where the axis
      of a stack cannot be told; `None` if no node is a module of a known framework.
    """
    if not trees.holds_modules(params):
        return None
    return trees.matrix_axes(params, Requests(None, False), strict=False)


def _is_a(model: Any, framework: str, kind: str) -> bool:
    """Returns whether a model is of a class of a framework, if that is imported."""
    found = getattr(sys.modules.get(framework), kind, None)
    return found is not None and isinstance(model, found)
