"""Abstract calls of Flax linen modules, watched module by module."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax.interop.axes.stacks import Path

Note = Callable[[Any, Sequence[Any], Mapping[str, Any]], None]
"""Is told context, arguments and keyword arguments of each call when it ends."""


class Init:
    """The abstract initialisation of a linen module.

    Args:
      model: The module.
      inputs: Positional arguments of a call.
      kwargs: Keyword arguments of the call.
    """

    def __init__(
        self, model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        self.model = model
        self.leaves, self.structure = jax.tree.flatten((tuple(inputs), dict(kwargs)))

    def run(self, note: Note) -> Any:
        """Runs the initialisation; returns the shapes of `params`, boxed as they are.

        Args:
          note: Is told of every call of a method.
        """
        from flax import linen as nn

        traced = [x for x in self.leaves if _is_array(x)]

        def watch(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            result = next_fun(*args, **kwargs)
            if context.module.scope is not None:
                note(context, args, kwargs)
            return result

        def init(key: jax.Array, arrays: list[Any]) -> Any:
            rest = iter(arrays)
            leaves = [next(rest) if _is_array(x) else x for x in self.leaves]
            inputs, kwargs = jax.tree.unflatten(self.structure, leaves)
            with nn.intercept_methods(watch):
                return self.model.init(key, *inputs, **kwargs).get("params", {})

        return jax.eval_shape(init, jax.random.key(0), traced)

    def params(self, note: Note) -> Any:
        """Runs the initialisation; returns the shapes of `params` without boxes."""
        from flax.core import meta

        return meta.unbox(self.run(note))


def layouts(
    init: Init, shapes: Mapping[Path, tuple[int, ...]]
) -> dict[Path, tuple[int, ...] | None]:
    """Returns where the axes of parameters are once transforms are done with them.

    A probe goes with each parameter from its module on: an array with as many axes, no
    two of one size. What `nn.scan`, `nn.vmap` or `nn.map_variables` do to the parameter
    they do to the probe, whose shape then tells where each axis is.

    Args:
      init: The initialisation.
      shapes: Final shapes of the parameters in question, by path.

    Returns:
      For each path, the place of each axis that the module itself sees; `None` if the
      probe is lost or has lost axes. Empty if the modules cannot be run with probes.
    """
    from flax.core import meta

    if not shapes:
        return {}
    Probed = _probed()

    def attach(context: Any, args: Any, kwargs: Any) -> None:
        scope = context.module.scope
        for name, value in dict(scope.variables().get("params", {})).items():
            path = (*scope.path, name)
            if path in shapes and not isinstance(value, Probed):
                sizes = _probe_sizes(meta.unbox(value).ndim, shapes[path])
                probe = jnp.zeros(sizes, jnp.int8)
                scope.put_variable("params", name, Probed(value, probe))

    try:
        params = init.run(attach)
    except Exception:  # such as of a module that reads its variables itself
        return {}
    is_probed = lambda x: isinstance(x, Probed)
    found: dict[Path, tuple[int, ...]] = {
        tuple(str(key.key) for key in path): x.probe.shape
        for path, x in jax.tree.leaves_with_path(params, is_leaf=is_probed)
        if is_probed(x)
    }
    return {path: _places(found.get(path), shape) for path, shape in shapes.items()}


def _probe_sizes(ndim: int, shape: tuple[int, ...]) -> list[int]:
    """Returns rising sizes for the axes of a probe, none of them a size of `shape`."""
    unlike = (size for size in itertools.count(2) if size not in shape)
    return list(itertools.islice(unlike, ndim))


def _places(
    probe: tuple[int, ...] | None, shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Returns where the axes of a probe are, in their first order."""
    if probe is None or len(probe) != len(shape):
        return None
    own = sorted(size for size in probe if size not in shape)
    return tuple(probe.index(size) for size in own)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


@functools.cache
def _probed() -> Any:
    """Returns a class of boxes that carry a probe with a parameter."""
    from flax import struct
    from flax.core import meta

    class Probed(struct.PyTreeNode, meta.AxisMetadata):
        """A parameter, or its box, and its probe."""

        value: Any
        probe: Any

        def unbox(self) -> Any:
            return self.value

        def replace_boxed(self, val: Any) -> "Probed":
            return self.replace(value=val)

        def add_axis(self, index: int, params: dict[Any, Any]) -> "Probed":
            return self.replace(value=meta.add_axis(self.value, index, params))

        def remove_axis(self, index: int, params: dict[Any, Any]) -> "Probed":
            return self.replace(value=meta.remove_axis(self.value, index, params))

    return Probed
