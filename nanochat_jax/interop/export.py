"""Register optimizer states, ours and Optax's, with `jax.export`."""

import contextlib
import inspect
from typing import Any

import optax
import optax.contrib
from jax import export

from nanochat_jax import codecs, transforms


def register_for_export() -> None:
    """Lets `jax.export` serialise functions of optimizer states.

    `jax.export.Exported.serialize` knows tuples, lists and dicts, and asks for every
    `NamedTuple` in the arguments or results to be registered under a name. This
    registers those of the states here and in Optax; those that are registered already
    are left as they are. It may be called more than once.

    Example:
      >>> register_for_export()
      >>> tx = muon(0.02)
      >>> params = {"up": {"kernel": jnp.ones((8, 16))}}
      >>> step = jax.export.export(jax.jit(tx.update))
      >>> saved = step(params, tx.init(params), params).serialize()
      >>> loaded = jax.export.deserialize(saved)
    """
    for module in (codecs, transforms, optax, optax.contrib):
        for name, node in vars(module).items():
            if _is_named_tuple(node):
                _register(node, f"{module.__name__}.{name}")


def _is_named_tuple(node: Any) -> bool:
    if not inspect.isclass(node) or not issubclass(node, tuple):
        return False
    return hasattr(node, "_fields") and not hasattr(node, "update")


def _register(node: Any, name: str) -> None:
    # It is refused if it was registered before, here or by the user.
    with contextlib.suppress(ValueError):
        export.register_namedtuple_serialization(node, serialized_name=name)
