"""Further bits of bfloat16 weights, as state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jaxtyping import Array

from nanochat_jax.transforms import checks
from nanochat_jax.transforms.precision import pairs
from nanochat_jax.transforms.precision.short_leaves import is_short, require_params


class SplitMasterState(NamedTuple):
    """State of `split_master`.

    Attributes:
      low_bits: What rounding to bfloat16 took from the master weights, int8 or int16
        and shaped as the parameters; `None` for those that are not bfloat16.
    """

    low_bits: optax.Params


def split_master(bits: int = 8) -> optax.GradientTransformation:
    """Keeps master weights as bfloat16 weights and `bits` further bits of state.

    To nearest, a bfloat16 weight loses each update under 2⁻⁹ of it. Here the weight and
    its low bits are two parts of one master weight, as in FlashOptim
    (arXiv:2602.23349). After each step the master weight is the one before plus the
    update: to 2⁻¹⁶ of the largest of the three with 8 bits, and to 2⁻²³, as in float32,
    with 16. The weight is the bfloat16 nearest to it. With 8 bits, updates under 2⁻¹⁷
    of a weight are lost.

    It is the last link of a chain, after the learning rate and outside
    `quantize_state`, since its updates are float32: the difference of the new weight
    and the old, for `optax.apply_updates`. Parameters of 32 bits and more pass through.
    `master_weights` reads the float32 weights.

    Example:
      >>> tx = optax.chain(optax.sgd(1e-4), split_master())
      >>> params = {"w": jnp.ones(3, jnp.bfloat16)}
      >>> state = tx.init(params)
      >>> for _ in range(10):
      ...     updates, state = tx.update({"w": jnp.ones(3)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params["w"][0]), round(float(master_weights(state, params)["w"][0]), 3)
      (1.0, 0.999)

    Args:
      bits: Number of further bits, 8 or 16: 1 or 2 bytes of state a parameter.

    Returns:
      A transformation whose state is a `SplitMasterState`.

    Raises:
      ValueError: If `bits` is another number; at `update`, if it is given no
        parameters, or a state of parameters of other types.
      TypeError: At `init` and `update`, if a parameter is a float of fewer than 32 bits
        but not bfloat16.
    """
    if bits not in (8, 16):
        raise ValueError(f"`bits` of `split_master` must be 8 or 16, got {bits!r}.")

    def init_fn(params: optax.Params) -> SplitMasterState:
        require_params(params, "split_master")
        zeros = lambda p: jnp.zeros_like(p, f"int{bits}") if is_short(p) else None
        return SplitMasterState(jax.tree.map(zeros, params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, SplitMasterState]:
        params = require_params(params, "split_master")
        checks.require_state(state, SplitMasterState, "split_master")
        _require_low_bits(state.low_bits, params)
        step = lambda p, u, low: (u, None) if low is None else _step(p, u, low)
        results = jax.tree.map(step, params, updates, state.low_bits)
        new, low_bits = (
            jax.tree.map(lambda p, x, i=i: x[i], params, results) for i in range(2)
        )
        return new, SplitMasterState(low_bits)

    return optax.GradientTransformation(init_fn, update_fn)


def _step(weight: Array, update: Array, low: Array) -> tuple[Array, Array]:
    """Returns an update that leads to the bfloat16 next to a sum, and its low bits."""
    low_bits = 8 * low.dtype.itemsize
    total = pairs.total(pairs.join(weight, low), update.astype(jnp.float32))
    short, bits = pairs.nearest(total, low_bits)
    wide = pairs.widen(weight)
    update = jnp.where(jnp.isfinite(total), short - wide, total)
    # Not `short`: the difference of a large and a small weight is rounded itself.
    stored = (wide + update).astype(jnp.bfloat16)
    return update, pairs.low(bits, stored, low_bits)


def _require_low_bits(low_bits: optax.Params, params: optax.Params) -> None:
    """Refuses the state of parameters that were of other types."""
    flat, treedef = jax.tree.flatten_with_path(params)
    wrong = [
        f"  {keystr(path)} is {p.dtype} and has {'none' if low is None else 'some'}"
        for (path, p), low in zip(flat, treedef.flatten_up_to(low_bits), strict=True)
        if is_short(p) == (low is None)
    ]
    if wrong:
        raise ValueError(
            "`split_master` requires low bits for parameters in bfloat16 and for no "
            "others, but\n"
            + "\n".join(wrong)
            + "\nMake the state with `tx.init(params)`, and start from float32 weights "
            "with `split_weights`."
        )
