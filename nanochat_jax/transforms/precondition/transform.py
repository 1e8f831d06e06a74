"""SOAP before orthogonalisation: updates scaled in the eigenbases of their gradients.

Matrices `G` are `[*batch, m, n]`. The short side has a moving average of `GGᵀ`, or of
`GᵀG` if `m > n`, and its eigenbasis; so has the long side if that is asked for.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int32

from nanochat_jax.transforms import checks, precision
from nanochat_jax.transforms.momentum import momentum
from nanochat_jax.transforms.precondition import refresh, rotated
from nanochat_jax.transforms.precondition.power_step import PowerStep, start
from nanochat_jax.transforms.sharding import in_auto_mode

Sides = Literal["short", "both"]


class PreconditionState(NamedTuple):
    """State of `precondition`, in float32 but for counts.

    Attributes:
      count: Steps taken.
      gram_short: Moving average of `GGᵀ` on the short side, `[*batch, short, short]`,
        in the coordinates of `basis_short`.
      gram_long: The same on the long side; `None` for each leaf if that has none.
      basis_short: Eigenbasis of `gram_short`, one direction in each column.
      basis_long: Eigenbasis of `gram_long`, or `None`.
      second_moment: Moving average of the squares of rotated updates, `[*batch, m, n]`.
      inner: State of the wrapped transform.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    gram_short: Any
    gram_long: Any
    basis_short: Any
    basis_long: Any
    second_moment: Any
    inner: optax.OptState


def precondition(
    inner: optax.GradientTransformation = momentum(),  # noqa: B008 (it is stateless)
    *,
    sides: Sides = "short",
    beta: ArrayLike = 0.9,
    moment_beta: ArrayLike = 0.9,
    basis: PowerStep = PowerStep(),  # noqa: B008 (it is frozen)
) -> optax.GradientTransformationExtraArgs:
    """Divides the updates of `inner` by running mean squares, in eigenbases.

    For each matrix `G` of the gradients, with eigenbases `P` and `Q` of moving averages
    of `GGᵀ` and `GᵀG`, the result of `inner` is rotated, `R = PᵀUQ`, divided by the
    root of a moving average of `R²`, rotated back, and given its norm again. Averages
    and bases take in `G` after that, so the first update passes as it is. With
    `orthogonalize` after it this is SOAP-Muon (Vyas; modded-nanogpt, track 3, results
    14 and 44); without, it is SOAP (Vyas et al. 2024, arXiv:2409.11321) but for the
    norm.

    State in numbers per entry of a square matrix: 6 for both sides and 4 for one,
    momentum included; of a matrix four times as long, `2 + 2 (4 + 1/4)` and `2 + 1/2`.
    `quantize_state` stores every field of it in few bits, and belongs outside.

    A matrix whose gradient is zero or not finite keeps its averages and bases. Inside
    `galore` they outlive a change of its basis by some steps, until they have taken in
    new gradients; around it, as in `precondition(galore(momentum(), 64))`, they are of
    whole gradients.

    Example:
      >>> soap_muon = quantize_state(
      ...     optax.chain(precondition(momentum(0.95)), orthogonalize()),
      ...     {
      ...         "momentum": Int8(),
      ...         "gram_short": Dynamic8(),
      ...         "basis_short": Int8(),
      ...         "second_moment": Dynamic8(signed=False, zero=False),
      ...     },
      ... )
      >>> params = {"kernel": jnp.zeros((64, 128))}
      >>> updates, state = soap_muon.update(params, soap_muon.init(params))

    Args:
      inner: Transform of the gradients, momentum as a rule.
      sides: `"short"` for a basis of the shorter side, `"both"` for one of each.
      beta: Decay of the averages of `GGᵀ` and `GᵀG`.
      moment_beta: Decay of the average of squares.
      basis: Rule for when and how bases are computed; `PowerStep(1)` is the published
        one.

    Returns:
      A transformation whose state is a `PreconditionState`.

    Raises:
      ValueError: If `sides` is neither of these; at `init` and `update`, if a leaf has
        fewer than two axes.
      TypeError: If `basis` is no `PowerStep`; at `init`, if a leaf is complex.
    """
    if sides not in ("short", "both"):
        raise ValueError(f'`sides` must be "short" or "both", got {sides!r}.')
    if not isinstance(basis, PowerStep):
        raise TypeError(f"`basis` must be a `PowerStep`, got {basis!r}.")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> PreconditionState:
        checks.require_matrices(params, "precondition")
        square = lambda size, x: (*x.shape[:-2], size, size)
        zeros = lambda size, x: jnp.zeros(square(size, x), jnp.float32)
        eyes = lambda size, x: jnp.broadcast_to(start(size, size), square(size, x))
        short = lambda f: jax.tree.map(lambda x: f(min(x.shape[-2:]), x), params)
        long = lambda f: jax.tree.map(
            lambda x: f(max(x.shape[-2:]), x) if sides == "both" else None, params
        )
        return PreconditionState(
            jnp.zeros([], jnp.int32),
            *(short(zeros), long(zeros), short(eyes), long(eyes)),
            optax.tree.zeros_like(params, dtype=jnp.float32),
            inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PreconditionState]:
        checks.require_matrices(updates, "precondition")
        checks.require_state(state, PreconditionState, "precondition")
        new, inner_state = inner.update(updates, state.inner, params, **extra_args)
        flat, treedef = jax.tree.flatten_with_path(updates)
        paths, gradients = [path for path, _ in flat], [g for _, g in flat]
        before = _leaves(state, treedef)
        done = [
            rotated.divide(
                u, leaf.bases, leaf.second_moment, leaf.is_ready, moment_beta
            )
            for u, leaf in zip(treedef.flatten_up_to(new), before, strict=True)
        ]
        ready = [leaf.is_ready for leaf in before]
        leaves = [
            refresh.take_in(leaf._replace(second_moment=moment), g, beta)
            for leaf, g, (_, moment) in zip(before, gradients, done, strict=True)
        ]
        leaves = refresh.renew(paths, gradients, leaves, ready, basis, state.count)
        new = treedef.unflatten([u for u, _ in done])
        count = jnp.asarray(optax.safe_increment(state.count))
        state = _state(leaves, treedef, count, inner_state)
        return precision.cast_like(new, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, in_auto_mode(update_fn))


def _leaves(state: PreconditionState, treedef: Any) -> list[refresh.Leaf]:
    """Returns what the state keeps of each leaf."""
    fields = [getattr(state, name) for name in refresh.Leaf._fields]
    columns = [treedef.flatten_up_to(field) for field in fields]
    return [refresh.Leaf(*parts) for parts in zip(*columns, strict=True)]


def _state(
    leaves: list[refresh.Leaf], treedef: Any, count: Array, inner: optax.OptState
) -> PreconditionState:
    """Undoes `_leaves`."""
    fields = [
        treedef.unflatten([getattr(leaf, name) for leaf in leaves])
        for name in refresh.Leaf._fields
    ]
    return PreconditionState(count, *fields, inner=inner)
