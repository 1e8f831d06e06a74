"""Register optimizer states, ours and Optax's, with `jax.export`."""

import contextlib
import dataclasses
import inspect
import json
from typing import Any

import jax.numpy as jnp
import optax
import optax.contrib
from jax import export

from nanochat_jax import codecs, transforms


def register_for_export() -> None:
    """Lets `jax.export` serialise functions of optimizer states.

    `jax.export.Exported.serialize` knows tuples, lists and dicts, and asks for every
    other node in the arguments or results to be registered under a name. This registers
    quantised arrays and the states here and in Optax; nodes that are registered already
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
    with contextlib.suppress(ValueError):
        export.register_pytree_node_serialization(
            codecs.Quantized,
            serialized_name="nanochat_jax.codecs.Quantized",
            serialize_auxdata=_as_bytes,
            deserialize_auxdata=_from_bytes,
        )


def _is_named_tuple(node: Any) -> bool:
    if not inspect.isclass(node) or not issubclass(node, tuple):
        return False
    return hasattr(node, "_fields") and not hasattr(node, "update")


def _register(node: Any, name: str) -> None:
    # It is refused if it was registered before, here or by the user.
    with contextlib.suppress(ValueError):
        export.register_namedtuple_serialization(node, serialized_name=name)


def _as_bytes(static: Any) -> bytes:
    """Returns the static part of a quantised array as JSON."""
    codec, width, dtype = static
    kind = type(codec).__name__
    if getattr(codecs, kind, None) is not type(codec):
        raise ValueError(
            f"`jax.export` can save the codecs of `nanochat_jax`, got {codec!r}. "
            "Decode the state with `dequantize` first."
        )
    return json.dumps([kind, dataclasses.asdict(codec), width, str(dtype)]).encode()


def _from_bytes(saved: bytes) -> Any:
    kind, fields, width, dtype = json.loads(saved)
    return getattr(codecs, kind)(**fields), width, jnp.dtype(dtype)
