"""Our transforms in Flax's `nnx.Optimizer`."""

from typing import Any

import optax
from flax import nnx


def for_nnx(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` as `nnx.Optimizer` can hold it, with or without a mesh.

    `nnx.Optimizer` gives `init` a tree of `nnx.Variable`s and `update` one of arrays.
    State that is made from the former inherits the variables with all they are marked
    with, so that what has not the parameter's shape, such as codes with their scales or
    a low-rank momentum, comes to `update` in another structure, or is sharded along
    axes it lacks (google/flax issues 4901 and 5372). Here `init` is given arrays too.

    Example:
      >>> model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
      >>> params = nnx.as_pure(nnx.state(model, nnx.Param))
      >>> tx = build_optimizer(OptimizerConfig(use_8bit_optim=True), params)
      >>> optimizer = nnx.Optimizer(model, for_nnx(tx), wrt=nnx.Param)

    Args:
      tx: A transformation, built for parameters as `nnx.as_pure` gives them.

    Returns:
      The same transformation, but for the variables that `init` no longer sees.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: Any) -> optax.OptState:
        return tx.init(nnx.as_pure(params))

    return optax.GradientTransformationExtraArgs(init_fn, tx.update)
