"""What comes back from the low-rank space of `galore`, and what it cut off."""

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
class Residual:
    """How an update is put together; the fields are arguments of `galore`.

    Attributes:
      weight: `residual` there.
      rest: Transform of what is cut off, or `None`.
      match_norm: Whether it is scaled as `inner` scales.
      scale: Factor on what comes back.
    """

    weight: ArrayLike
    rest: optax.GradientTransformationExtraArgs | None
    match_norm: bool
    scale: ArrayLike

    def __post_init__(self) -> None:
        if self.rest is not None and self.is_zero:
            raise ValueError(
                "`rest` is a transform of what the projector cuts off, which "
                "`residual=0` leaves out. Give a `residual`, such as 1.0."
            )

    @property
    def is_zero(self) -> bool:
        """Whether the weight is known to be zero, and not traced."""
        return isinstance(self.weight, int | float) and self.weight == 0

    def init(self, params: optax.Params, projector: Any) -> optax.OptState | None:
        """Returns the state of `rest` for the parameters that are projected."""
        if self.rest is None:
            return None
        zeros = lambda x, p: None if p is None else jnp.zeros(x.shape, jnp.float32)
        return self.rest.init(jax.tree.map(zeros, params, projector))

    def combine(
        self,
        whole: optax.Updates,
        low: optax.Updates,
        inner: optax.Updates,
        projector: Any,
        state: Any,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, optax.OptState | None]:
        """Returns `scale·P·inner + weight·(I - PPᵀ)rest((I - PPᵀ)G)`, and a state.

        Args:
          whole: Gradients `G`, or arrays of their shapes if the weight is zero.
          low: `PᵀG`.
          inner: What the wrapped transform made of them.
          projector: Bases `P`, `None` for leaves that are not projected.
          state: State of `rest`.
          extra_args: What `rest` is given besides.
        """
        rest, within = whole, low
        if self.rest is not None:
            cut = jax.tree.map(
                lambda g, x, p: None if p is None else projection.cut_off(g, x, p),
                *(whole, low, projector),
            )
            rest, state = checks.update_without_params(
                self.rest, cut, state, "rest", extra_args
            )
            rest = jax.tree.map(
                lambda g, p, r: g if p is None else r, whole, projector, rest
            )
            within = jax.tree.map(projection.project, rest, projector)

        def back(g: Array, low: Array, u: Array, p: Array | None, w: Array) -> Array:
            if p is None:
                return u
            weight = self.weight
            if self.match_norm and not self.is_zero:
                weight = weight * projection.norm_ratio(u, low)
            return projection.project_back(g, w, u, p, self.scale, weight)

        return jax.tree.map(back, rest, low, inner, projector, within), state
