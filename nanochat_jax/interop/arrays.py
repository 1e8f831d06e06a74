"""Trees of a framework's variables as trees of arrays."""

import sys
from typing import Any

import jax
import optax


def as_arrays(tree: Any) -> Any:
    """Returns a tree with the arrays that `flax.nnx` variables hold in their place.

    `nnx.Optimizer` gives `init` a tree of variables and `update` one of arrays. State
    made from the former would inherit the variables with all they are marked with, so
    that codes or a low-rank momentum would come to `update` in another structure, or be
    sharded along axes they lack (google/flax issues 4901 and 5372).

    Example:
      >>> from flax import nnx
      >>> state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
      >>> type(as_arrays(state)["kernel"]).__name__
      'ArrayImpl'

    Args:
      tree: Any tree; one without such variables comes back as it is.
    """
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    is_variable = lambda node: isinstance(node, nnx.Variable)
    if not any(map(is_variable, jax.tree.leaves(tree, is_leaf=is_variable))):
        return tree
    return nnx.as_pure(tree)


def for_nnx(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation as `nnx.Optimizer` can hold it, with or without a mesh.

    `muon` and `build_optimizer` need no such thing. A chain made by hand does if its
    state has other shapes than the parameters, as under `quantize_state` and `galore`:
    see `as_arrays`.

    Example:
      >>> from flax import nnx
      >>> model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
      >>> tx = quantize_state(momentum(), {"momentum": Int8()})
      >>> optimizer = nnx.Optimizer(model, for_nnx(tx), wrt=nnx.Param)

    Args:
      tx: A transformation.

    Returns:
      The same transformation, but for the variables that `init` no longer sees.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> optax.OptState:
        return tx.init(as_arrays(params))

    return tx._replace(init=init_fn)
