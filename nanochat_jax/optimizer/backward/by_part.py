"""Two optimizers in one: for a stack of blocks, and for the rest."""

from typing import Any

import optax

from nanochat_jax.transforms import AppliesUpdates


def by_part(
    tx: optax.GradientTransformation, rest_tx: optax.GradientTransformation, stack: str
) -> optax.GradientTransformationExtraArgs:
    """Gives the blocks of a tree of parameters to one optimizer, the rest to another.

    Example:
      >>> tx = by_part(optax.sgd(0.1), optax.adam(0.1), "blocks")
      >>> state = tx.init({"blocks": {"w": jnp.ones((4, 8, 8))}, "out": jnp.ones(8)})

    Args:
      tx: Optimizer of the blocks.
      rest_tx: Optimizer of the rest.
      stack: Key of the blocks.

    Returns:
      A transformation of both.
    """
    label = lambda tree: {key: key == stack for key in tree}
    both = optax.partition(
        {True: _of_part(tx, stack, True), False: _of_part(rest_tx, stack, False)}, label
    )
    if isinstance(tx, AppliesUpdates) and isinstance(rest_tx, AppliesUpdates):
        return AppliesUpdates(both.init, both.update)
    return both


def _of_part(
    tx: optax.GradientTransformation, stack: str, of_stack: bool
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that is told the shapes of its own part alone."""
    tx = optax.with_extra_args_support(tx)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        whole: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if whole is not None:
            absent = optax.MaskedNode()
            whole = {
                key: part if (key == stack) == of_stack else absent
                for key, part in whole.items()
            }
        return tx.update(updates, state, params, whole=whole, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)
