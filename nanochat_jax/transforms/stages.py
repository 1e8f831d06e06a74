"""A chain whose stages have names."""

from typing import Any

import optax


def stages(
    **transforms: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Applies transforms one after another, the state of each under its name.

    It is `optax.named_chain` with a plain `dict` for a state, which, unlike an
    `OrderedDict`, `flax.serialization` and `jax.export` save as it is.

    Example:
      >>> tx = stages(average=momentum(), rate=optax.scale(-0.1))
      >>> sorted(tx.init({"w": jnp.ones(3)}))
      ['average', 'rate']

    Args:
      **transforms: Transforms by name, in the order in which they apply.

    Returns:
      A transformation whose state is a dict.
    """
    parts = {name: optax.with_extra_args_support(tx) for name, tx in transforms.items()}

    def init_fn(params: optax.Params) -> optax.OptState:
        return {name: tx.init(params) for name, tx in parts.items()}

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        new_state = {}
        for name, tx in parts.items():
            updates, new_state[name] = tx.update(
                updates, state[name], params, **extra_args
            )
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
