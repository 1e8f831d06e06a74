"""What a builder hands over: a model's parameters, and the model where there is one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Tree:
    """Parameters of one small model.

    Attributes:
      params: Parameters as its users train them.
      model: What `matrix_axes` takes; None where the tree keeps the module classes, or
        where the package has no modules to ask.
      inputs: What a linen module is called with.
      keeps_classes: Whether the module classes are nodes of `params`.
    """

    params: Any
    model: Any = None
    inputs: tuple[Any, ...] = ()
    keeps_classes: bool = False


Builders = dict[str, Callable[[], Tree]]


def linen(model: Any, *inputs: Any, **options: Any) -> Tree:
    """Returns the tree of a linen module, without computing any parameter."""
    call = lambda *args: model.init(jax.random.key(0), *args, **options)
    return Tree(jax.eval_shape(call, *inputs)["params"], model, inputs)


def nnx(build: Callable[[], Any], *filters: Any) -> Tree:
    """Returns the tree of an NNX module, without computing any parameter.

    Args:
      build: Builds the module.
      *filters: Which variables are trained; `nnx.Param` if none is given.
    """
    from flax import nnx

    model = nnx.eval_shape(build)
    return Tree(nnx.state(model, *(filters or (nnx.Param,))), model)
