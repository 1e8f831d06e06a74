"""Axes of the parameters of Equinox modules: weights are `(out, in)`."""

from collections.abc import Callable
from typing import Any

from nanochat_jax.interop.axes.declared import (
    Declared,
    Place,
    embedding,
    matrix,
    vector,
)


def declare(place: Place) -> Declared | None:
    """Returns the declaration of a field by the class of an Equinox module."""
    import equinox as eqx

    for kind, rule in _RULES.items():
        if isinstance(place.module, getattr(eqx.nn, kind, ())):
            return rule(place, f"equinox.nn.{kind}")
    return None


def is_vector(module: Any) -> bool:
    """Returns whether a module holds vectors only."""
    import equinox as eqx

    return any(isinstance(module, getattr(eqx.nn, kind, ())) for kind in _VECTORS)


def _linear(place: Place, source: str) -> Declared | None:
    fan_in, fan_out = (
        1 if features == "scalar" else features
        for features in (place.module.in_features, place.module.out_features)
    )
    if place.name == "bias":
        return vector(fan_out)
    if place.name != "weight":
        return None
    heads = _heads(place)
    return matrix((fan_out, fan_in), [1], [0], source, heads=heads)


def _heads(place: Place) -> dict[int, int]:
    import equinox as eqx

    if not isinstance(place.parent, eqx.nn.MultiheadAttention):
        return {}
    axis = 1 if place.parent_name == "output_proj" else 0
    return {axis: place.parent.num_heads}


def _conv(place: Place, source: str) -> Declared | None:
    module = place.module
    if place.name == "bias":
        return vector(module.out_channels, *(1,) * module.num_spatial_dims)
    if place.name != "weight":
        return None
    fan_in = module.in_channels // module.groups
    shape = (module.out_channels, fan_in, *module.kernel_size)
    return matrix(shape, range(1, len(shape)), [0], source)


def _cell(place: Place, source: str) -> Declared | None:
    module, gates = place.module, 4 if source.endswith("LSTMCell") else 3
    if place.name.startswith("bias"):
        return vector()
    widths = {"weight_ih": module.input_size, "weight_hh": module.hidden_size}
    if place.name not in widths:
        return None
    shape = (gates * module.hidden_size, widths[place.name])
    return matrix(shape, [1], [0], source, gates={0: gates})


def _embedding(place: Place, source: str) -> Declared | None:
    del source
    module = place.module
    if place.name != "weight":
        return None
    return embedding(module.num_embeddings, module.embedding_size)


def _weight_norm(place: Place, source: str) -> Declared | None:
    del source
    return vector() if place.name == "g" else None


def _vector(place: Place, source: str) -> Declared | None:
    del source
    shape = getattr(place.module, "shape", None)
    direct = place.name in ("weight", "bias") and isinstance(shape, tuple)
    return vector(*shape) if direct and shape is not None else vector()


_VECTORS = (
    "BatchNorm", "GroupNorm", "LayerNorm", "PReLU", "RMSNorm", "StateIndex",
)  # fmt: skip
_RULES: dict[str, Callable[[Place, str], Declared | None]] = {
    "Linear": _linear,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "LSTMCell": _cell,
    "GRUCell": _cell,
    "Embedding": _embedding,
    "WeightNorm": _weight_norm,
    **dict.fromkeys(_VECTORS, _vector),
}
