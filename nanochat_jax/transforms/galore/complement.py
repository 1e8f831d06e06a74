"""The complement of the space of `galore`, and the update put together with it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from nanochat_jax.transforms import checks
from nanochat_jax.transforms.galore import projection


@dataclasses.dataclass(frozen=True)
class Complement:
    """What becomes of the part of a gradient outside the basis.

    Attributes:
      weight: Its weight.
      tx: Transform that runs on it, or `None`.
      scale: Factor on the part within the basis.
    """

    weight: ArrayLike
    tx: optax.GradientTransformationExtraArgs | None
    scale: ArrayLike

    @classmethod
    def of(
        cls, given: ArrayLike | optax.GradientTransformation, scale: ArrayLike
    ) -> "Complement":
        """Reads the arguments of `galore`.

        Args:
          given: Its `complement`.
          scale: Its `scale`.
        """
        if isinstance(given, optax.GradientTransformation):
            return cls(1.0, optax.with_extra_args_support(given), scale)
        return cls(given, None, scale)

    def init(self, params: optax.Params, bases: Any) -> optax.OptState | None:
        """Returns the state of the transform for the parameters that are projected.

        Args:
          params: Parameters.
          bases: Basis of each parameter, `None` for one that is not projected.
        """
        if self.tx is None:
            return None
        zeros = lambda x, p: None if p is None else jnp.zeros(x.shape, jnp.float32)
        return self.tx.init(jax.tree.map(zeros, params, bases))

    def combine(
        self,
        whole: optax.Updates,
        low: optax.Updates,
        inner: optax.Updates,
        bases: Any,
        state: Any,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, optax.OptState | None]:
        """Returns `scale·P·inner + weight·(I - PPᵀ)tx((I - PPᵀ)G)`, and a state.

        Args:
          whole: Gradients `G`.
          low: Projected gradients `PᵀG`.
          inner: Updates of the wrapped transform.
          bases: Bases `P`, `None` for leaves that are not projected.
          state: State of the transform.
          extra_args: Extra arguments of the transform.
        """
        outside, within = whole, low
        if self.tx is not None:
            cut = jax.tree.map(
                lambda g, x, p: None if p is None else projection.cut_off(g, x, p),
                *(whole, low, bases),
            )
            outside, state = checks.update_without_params(
                self.tx, cut, state, "complement", extra_args
            )
            outside = jax.tree.map(
                lambda g, p, x: g if p is None else x, whole, bases, outside
            )
            # The transform may have left the complement: its result is cut off again.
            within = jax.tree.map(projection.project, outside, bases)

        def back(g: Array, u: Array, p: Array | None, w: Array) -> Array:
            if p is None:
                return u
            return projection.project_back(g, w, u, p, self.scale, self.weight)

        return jax.tree.map(back, outside, inner, bases, within), state
