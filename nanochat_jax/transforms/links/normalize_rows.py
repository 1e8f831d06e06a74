"""Neurons of equal size: rows or columns of updates divided by their norms."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float32

from nanochat_jax.transforms import checks, precision
from nanochat_jax.transforms.sharding import in_auto_mode

Neurons = Literal["fan_out", "fan_in", "both"]
"""Which vectors of a kernel have norms: one for each output, each input, or both."""


class NormalizeRowsState(NamedTuple):
    """State of `normalize_rows` with `beta`.

    Attributes:
      row_moment: Moving average of the mean squares of each neuron, in float32:
        `[*batch, fan_out]`, or `[*batch, fan_in]`, for kernels
        `[*batch, fan_in, fan_out]`.
    """

    row_moment: Any


def normalize_rows(
    neurons: Neurons = "fan_out", *, beta: ArrayLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Divides the entries of each neuron by their root mean square.

    Kernels are `[*batch, fan_in, fan_out]`, as in Flax, so the weights of one output
    neuron are a column; papers, whose weights are `[out, in]`, call them a row. The
    Frobenius norm of each matrix is kept. By place and arguments it is:

      * NorMuon (Li et al. 2025, arXiv:2510.05491, algorithm 1) after `orthogonalize`,
        with `beta=0.95`: the mean square is a moving average;
      * MuonEq (Chang et al. 2026, arXiv:2603.28254) before `orthogonalize`: `"fan_out"`
        is its R, `"fan_in"` its C, and `"both"`, by the norms of outputs and inputs at
        once, its RC;
      * Muon+ (Zhang et al. 2026, arXiv:2602.21545) after `orthogonalize`: `"fan_out"`,
        `"fan_in"`, or two of these one after the other. There each neuron gets the norm
        1; here the matrix keeps its norm, which is a constant times that.

    Example:
      >>> normuon = optax.chain(momentum(), orthogonalize(), normalize_rows(beta=0.95))
      >>> params = {"kernel": jnp.ones((64, 128))}
      >>> state = normuon.init(params)
      >>> state[2].row_moment["kernel"].shape
      (128,)
      >>> muon_eq = optax.chain(momentum(), normalize_rows(), orthogonalize())

    Args:
      neurons: `"fan_out"` for the weights of each output neuron, `"fan_in"` for those
        of each input, or `"both"`.
      beta: Decay of a moving average of mean squares. Without it, those of the present
        updates are divided by, and there is no state.

    Returns:
      A transformation whose state is a `NormalizeRowsState`, or empty without `beta`.

    Raises:
      ValueError: If `neurons` is none of these, or `"both"` with `beta`; at `update`,
        if a leaf has fewer than two axes.
      TypeError: At `init`, if a leaf is complex.
    """
    axes = {"fan_out": (-2,), "fan_in": (-1,), "both": (-2, -1)}
    if neurons not in axes:
        raise ValueError(f"`neurons` must be one of {list(axes)}, got {neurons!r}.")
    if beta is not None and neurons == "both":
        raise ValueError(
            'A moving average is of "fan_out" or "fan_in", got `neurons="both"` and '
            f"beta={beta}. Leave `beta` out, or chain two of these links."
        )

    def init_fn(params: optax.Params) -> NormalizeRowsState | optax.EmptyState:
        checks.require_matrices(params, "normalize_rows")
        if beta is None:
            return optax.EmptyState()
        [axis] = axes[neurons]
        moment = lambda x: jnp.zeros(_without(x.shape, axis), jnp.float32)
        return NormalizeRowsState(jax.tree.map(moment, params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        checks.require_matrices(updates, "normalize_rows")
        wide = precision.widened(updates)
        if beta is None:
            even = lambda x: _normalized(x, axes[neurons])
            return precision.cast_like(jax.tree.map(even, wide), updates), state
        checks.require_state(state, NormalizeRowsState, "normalize_rows")
        [axis] = axes[neurons]
        leaves, treedef = jax.tree.flatten(wide)
        moments = treedef.flatten_up_to(state.row_moment)
        pairs = zip(leaves, moments, strict=True)
        done = [_by_average(x, v, axis, beta) for x, v in pairs]
        scaled = treedef.unflatten([x for x, _ in done])
        moment = treedef.unflatten([v for _, v in done])
        return precision.cast_like(scaled, updates), NormalizeRowsState(moment)

    return optax.GradientTransformationExtraArgs(init_fn, in_auto_mode(update_fn))


def _by_average(
    x: Array, moment: Array, axis: int, beta: ArrayLike
) -> tuple[Array, Float32[Array, "..."]]:
    """Returns `x` divided by the root of its averaged mean squares, and the average."""
    mean = jnp.mean(x * x, axis, dtype=jnp.float32)
    # An average that was not finite once would never be so again.
    new = jnp.where(jnp.isfinite(mean), beta * moment + (1 - beta) * mean, moment)
    new = new.astype(jnp.float32)
    scale = _inverse_root(new)
    # The norms before and after follow from the means: no second pass over `x`.
    total = lambda squares: jnp.sum(squares, -1, keepdims=True)
    kept = jnp.sqrt(total(mean)) * _inverse_root(total(mean * scale * scale))
    return x * jnp.expand_dims(scale * kept, axis).astype(x.dtype), new


def _normalized(x: Array, axes: tuple[int, ...]) -> Array:
    """Returns `x` divided by the norms of its vectors along each of `axes`."""
    largest = jnp.max(jnp.abs(x), (-2, -1), keepdims=True, initial=0)
    # Or squares of large and of small entries would over- and underflow.
    unit = x / jnp.where(largest > 0, largest, 1)
    squares = unit * unit
    scale = jnp.ones([], x.dtype)
    for axis in axes:
        scale *= _inverse_root(jnp.sum(squares, axis, keepdims=True))
    total = lambda squares: jnp.sum(squares, (-2, -1), keepdims=True)
    kept = jnp.sqrt(total(squares)) * _inverse_root(total(squares * scale * scale))
    return x * (scale * kept)


def _inverse_root(squares: Array) -> Array:
    """Returns `1 / √squares`, and zero for zero."""
    return jnp.where(squares > 0, jax.lax.rsqrt(squares), 0)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    axis %= len(shape)
    return (*shape[:axis], *shape[axis + 1 :])
