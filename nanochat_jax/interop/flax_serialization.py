"""Register quantised arrays with `flax.serialization`."""

import contextlib
import dataclasses
from typing import Any

import jax.numpy as jnp

from nanochat_jax.codecs import Quantized


def register_for_flax() -> None:
    """Lets `flax.serialization` save optimizer states with quantised arrays.

    Flax knows dicts, lists and `NamedTuple`s; other nodes of a tree are registered with
    it. A state is restored into one of the same codecs. It may be called more than
    once.

    Example:
      >>> register_for_flax()
      >>> from flax import serialization
      >>> tx = muon(0.02, bits=8, min_size=1)
      >>> state = tx.init({"up": {"kernel": jnp.ones((8, 16))}})
      >>> restored = serialization.from_bytes(state, serialization.to_bytes(state))

    Raises:
      ModuleNotFoundError: If Flax is not installed.
      ValueError: When a state is restored into one of another codec or shape.
    """
    from flax import serialization

    def to_state_dict(x: Quantized) -> dict[str, Any]:
        parts = {"codes": x.codes, "scales": x.scales}
        saved = {k: serialization.to_state_dict(v) for k, v in parts.items()}
        return saved | {"codec": str(x.codec)}

    def from_state_dict(like: Quantized, stored: dict[str, Any]) -> Quantized:
        parts = {name: stored[name] for name in ("codes", "scales")}
        layout = lambda x: (x.shape, jnp.dtype(x.dtype))
        alike = all(layout(parts[k]) == layout(getattr(like, k)) for k in parts)
        # Before codecs were saved, shapes and types told most of them apart.
        codec = stored.get("codec", str(like.codec))
        if not alike or codec != str(like.codec):
            raise ValueError(
                f"an array {like.shape} was saved by {codec}, with codes "
                f"{parts['codes'].shape}, and cannot be restored into one of "
                f"{like.codec}. Restore it into a state of the optimizer that it was "
                "saved from, and convert that with `quantize(like, dequantize(state))`."
            )
        restore = serialization.from_state_dict
        parts = {name: restore(getattr(like, name), x) for name, x in parts.items()}
        return dataclasses.replace(like, **parts)

    with contextlib.suppress(ValueError):  # registered before
        serialization.register_serialization_state(
            Quantized, to_state_dict, from_state_dict
        )
