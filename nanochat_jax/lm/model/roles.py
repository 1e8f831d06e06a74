"""Labels and axes of the parameters of this library's own model.

Names and shapes would tell them too, but for small models in which a number of layers
happens to be a number of heads.
"""

import optax

from nanochat_jax import optimizer
from nanochat_jax.config import OptimizerConfig
from nanochat_jax.optimizer import roles
from nanochat_jax.transforms import MatrixAxes

_LINEAR = MatrixAxes(-2, -1, source="nanochat_jax.lm.layers.Linear")


def kernel_axes(path: str, shape: tuple[int, ...]) -> MatrixAxes | None:
    """Returns the axes of kernels, which are `[..., fan_in, fan_out]`.

    Args:
      path: Path of a parameter, such as `"blocks/0/query/kernel"`.
      shape: Its shape.
    """
    del shape
    return _LINEAR if path.endswith("/kernel") else None


def label_params(params: optax.Params) -> optax.Params:
    """Returns a tree like the parameters of the model, of labels.

    Args:
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.
    """
    return roles.label_params(params, matrix_axes=kernel_axes)


def build_optimizer(
    config: OptimizerConfig, params: optax.Params
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer that `config` asks for, for the model.

    Args:
      config: What to build.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.
    """
    return optimizer.build_optimizer(config, params, matrix_axes=kernel_axes)
