"""Axes of the parameters of Flax NNX modules."""

from collections.abc import Callable
from typing import Any

from nanochat_jax.interop.axes.declared import (
    Declared,
    Place,
    embedding,
    from_einsum,
    matrix,
    vector,
)
from nanochat_jax.interop.axes.requests import Requests
from nanochat_jax.interop.axes.settle import Answer, Found, settle
from nanochat_jax.interop.axes.stacks import Path


def matrix_axes(model: Any, requests: Requests) -> dict[Any, Any]:
    """Returns axes for each `nnx.Param` of a module.

    Args:
      model: A module, or an abstract one from `nnx.eval_shape`.
      requests: Parts that are to be a batch.

    Returns:
      A nested dict, with the paths of `nnx.as_pure(nnx.state(model, nnx.Param))`.

    Raises:
      ValueError: If leaves have two readings, or a request meets no leaf.
    """
    from flax import nnx

    modules = dict(nnx.iter_modules(model))
    found: dict[Path, Found] = {}
    fields: dict[int, list[Path]] = {}  # of each variable, which modules can share
    for path, module in modules.items():
        parent = modules.get(path[:-1]) if path else None
        above = str(path[-1]) if path else ""
        for name, value in vars(module).items():
            if not isinstance(value, nnx.Param):
                continue
            fields.setdefault(id(value), []).append((*path, name))
            declared = declare(Place(module, name, parent, above))
            if declared is not None:
                found[(*path, name)] = Found(declared, tuple(value.shape))
    answers = settle(found, requests)
    shared = {path: paths for paths in fields.values() for path in paths}
    tree: dict[Any, Any] = {}
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        paths = shared.get(path, [path])
        _put(tree, path, _common([answers.get(path) for path in paths]))
    return tree


def _common(answers: list[Answer]) -> Answer:
    """Returns the answer for a variable of several modules: a table for tied heads."""
    if "embedding" in answers:
        return "embedding"
    return answers[0] if all(answer == answers[0] for answer in answers) else None


def _put(tree: dict[Any, Any], path: Path, answer: Answer) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = answer


def declare(place: Place) -> Declared | None:
    """Returns the declaration of a variable by the class of an NNX module."""
    from flax import nnx

    for kind, rule in _RULES.items():
        if isinstance(place.module, getattr(nnx, kind, ())):
            return rule(place, f"flax.nnx.{kind}")
    return _of_others(place, type(place.module).__name__)


def is_vector(module: Any) -> bool:
    """Returns whether a module holds vectors only."""
    from flax import nnx

    return any(isinstance(module, getattr(nnx, kind, ())) for kind in _VECTORS)


def _linear(place: Place, source: str) -> Declared | None:
    from flax import nnx

    module = place.module
    if place.name == "bias":
        return vector(module.out_features)
    if place.name != "kernel":
        return None
    gates = 0
    if place.parent_name in ("dense_i", "dense_h"):
        gates = 4 if isinstance(place.parent, nnx.OptimizedLSTMCell) else 0
        gates = 3 if isinstance(place.parent, nnx.GRUCell) else gates
    shape = (module.in_features, module.out_features)
    return matrix(shape, [0], [1], source, gates={1: gates} if gates else {})


def _linear_general(place: Place, source: str) -> Declared | None:
    from flax import nnx

    module = place.module
    batch = tuple(module.batch_axis.values())
    fan_in, fan_out = tuple(module.in_features), tuple(module.out_features)
    if place.name == "bias":
        return vector(*batch, *fan_out)
    if place.name != "kernel":
        return None
    first, middle = len(batch), len(batch) + len(fan_in)
    heads = {}
    if isinstance(place.parent, nnx.MultiHeadAttention):
        is_out = place.parent_name == "out"
        axis = first if is_out else middle
        heads = {axis: fan_in[0] if is_out else fan_out[0]}
    return matrix(
        (*batch, *fan_in, *fan_out),
        range(first, middle),
        range(middle, middle + len(fan_out)),
        source,
        heads=heads,
    )


def _einsum(place: Place, source: str) -> Declared | None:
    module = place.module
    if place.name == "bias":
        return vector(*module.bias_shape)
    if place.name != "kernel" or not module.einsum_str:
        return None
    return from_einsum(module.einsum_str, module.kernel_shape, source)


def _conv(place: Place, source: str) -> Declared | None:
    module = place.module
    if place.name == "bias":
        return vector(module.out_features)
    if place.name != "kernel":
        return None
    shape = tuple(module.kernel_shape)
    if getattr(module, "transpose_kernel", False):  # [*window, out, in]
        return matrix(shape, [*range(len(shape) - 2), -1], [-2], source)
    return matrix(shape, range(len(shape) - 1), [-1], source)


def _embed(place: Place, source: str) -> Declared | None:
    del source
    module = place.module
    if place.name != "embedding":
        return None
    return embedding(module.num_embeddings, module.features)


def _lora(place: Place, source: str) -> Declared | None:
    module = place.module
    if place.name == "lora_a":
        return matrix((module.in_features, None), [0], [1], source)
    if place.name == "lora_b":
        return matrix((None, module.out_features), [0], [1], source)
    return None


def _of_others(place: Place, source: str) -> Declared | None:
    """Returns what layers of published models declare as Flax's own do.

    Modules of tunix hold an equation and the shape of `w`; those of MaxText, sizes in
    and out.
    """
    module, sizes = place.module, ("in_features_shape", "out_features_shape")
    equation, shape = (getattr(module, name, None) for name in ("einsum_str", "shape"))
    if place.name == "w" and isinstance(equation, str) and isinstance(shape, tuple):
        return from_einsum(equation, shape, source)
    fan_in, fan_out = (getattr(module, name, None) for name in sizes)
    if not isinstance(fan_in, tuple) or not isinstance(fan_out, tuple):
        return None
    if place.name == "bias":
        return vector(*fan_out)
    first, both = len(fan_in), (*fan_in, *fan_out)
    if place.name != "kernel":
        return None
    return matrix(both, range(first), range(first, len(both)), source)


def _vector(place: Place, source: str) -> Declared | None:
    del source
    features = getattr(place.module, "num_features", None)
    return vector(features) if isinstance(features, int) else vector()


_VECTORS = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "PReLU")
_RULES: dict[str, Callable[[Place, str], Declared | None]] = {
    "Linear": _linear,
    "LinearGeneral": _linear_general,
    "Einsum": _einsum,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Embed": _embed,
    "LoRA": _lora,
    **dict.fromkeys(_VECTORS, _vector),
}
