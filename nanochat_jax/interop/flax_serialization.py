"""Register quantised arrays with `flax.serialization`."""

import contextlib
import dataclasses
from typing import Any

from nanochat_jax.codecs import Quantized


def register_for_flax() -> None:
    """Lets `flax.serialization` save optimizer states with quantised arrays.

    Flax knows dicts, lists and `NamedTuple`s; other nodes of a tree are registered with
    it. Codec, width and type are not saved: they are those of the state that is
    restored into. It may be called more than once.

    Example:
      >>> register_for_flax()
      >>> from flax import serialization
      >>> tx = muon(0.02, bits=8, min_size=1)
      >>> state = tx.init({"up": {"kernel": jnp.ones((8, 16))}})
      >>> restored = serialization.from_bytes(state, serialization.to_bytes(state))

    Raises:
      ModuleNotFoundError: If Flax is not installed.
    """
    from flax import serialization

    def to_state_dict(x: Quantized) -> dict[str, Any]:
        parts = {"codes": x.codes, "scales": x.scales}
        return {k: serialization.to_state_dict(v) for k, v in parts.items()}

    def from_state_dict(like: Quantized, stored: dict[str, Any]) -> Quantized:
        restore = serialization.from_state_dict
        parts = {name: restore(getattr(like, name), stored[name]) for name in stored}
        return dataclasses.replace(like, **parts)

    with contextlib.suppress(ValueError):  # registered before
        serialization.register_serialization_state(
            Quantized, to_state_dict, from_state_dict
        )
