"""Our optimizer states in `flax.serialization`."""

from collections import OrderedDict
from typing import Any

from flax import serialization


def register_named_chain() -> None:
    """Lets `flax.serialization` save and restore what `build_optimizer` returns.

    The state of `optax.named_chain` is an `OrderedDict`, which Flax's `to_bytes` does
    not take for the `dict` that it is. Call this once; Orbax needs no such thing.

    Example:
      >>> register_named_chain()
      >>> params = {"kernel": jnp.ones((64, 128))}
      >>> tx = build_optimizer(OptimizerConfig(use_8bit_optim=True), params)
      >>> state = tx.init(params)
      >>> saved = serialization.to_bytes(state)
      >>> state = serialization.from_bytes(state, saved)
    """
    serialization.register_serialization_state(
        OrderedDict, _to_state_dict, _from_state_dict, override=True
    )


def _to_state_dict(tree: OrderedDict[str, Any]) -> dict[str, Any]:
    return {name: serialization.to_state_dict(node) for name, node in tree.items()}


def _from_state_dict(
    tree: OrderedDict[str, Any], saved: dict[str, Any]
) -> OrderedDict[str, Any]:
    return OrderedDict(
        (name, serialization.from_state_dict(node, saved[name], name))
        for name, node in tree.items()
    )
