"""Labels and matrix axes of the parameters of this model.

They are declared, since names and shapes are ambiguous in small models where the number
of layers equals the number of heads.
"""

import optax

from nanochat_jax import optimizer
from nanochat_jax.config import OptimizerConfig
from nanochat_jax.optimizer import roles
from nanochat_jax.transforms import MatrixAxes, per_leaf

_LINEAR = MatrixAxes(-2, -1, source="nanochat_jax.lm.model.block")


def kernel_axes(path: str, shape: tuple[int, ...]) -> MatrixAxes | None:
    """Returns the axes of kernels, which are `[..., fan_in, fan_out]`.

    Args:
      path: Path of a parameter, such as `"blocks/0/query/kernel"`.
      shape: Its shape; not needed.
    """
    del shape
    return _LINEAR if path.endswith("/kernel") else None


def label_params(params: optax.Params) -> optax.Params:
    """Returns the labels of the parameters, as a tree of the same structure.

    Args:
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.
    """
    return roles.label_params(params, matrix_axes=kernel_axes)


def build_optimizer(
    config: OptimizerConfig, params: optax.Params
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer of `config` for the parameters of this model.

    Args:
      config: Settings of the optimizer.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.
    """
    tx = optimizer.build_optimizer(config, params, matrix_axes=kernel_axes)
    # A layer at a time is updated there, with its part of the state of each leaf.
    return per_leaf(tx) if getattr(config, "update_in_backward", False) else tx
