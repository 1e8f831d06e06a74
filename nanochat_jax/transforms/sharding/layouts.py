"""The layout of states that are made, which `init` is told by the context.

It takes no extra arguments, as `update` does.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Array

from nanochat_jax.transforms.sharding.placement import NOWHERE, Placement
from nanochat_jax.transforms.sharding.stacks import Stack


class Layout(NamedTuple):
    """How states are laid out that are made meanwhile.

    Attributes:
      placement: Shardings of the parameters, if they are known.
      per_leaf: Whether the state of each leaf is kept by itself nevertheless.
      stacks: Stacks of the tree that `init` is given, by path of the first member.
    """

    placement: Placement = NOWHERE
    per_leaf: bool = False
    stacks: Mapping[str, Stack] = MappingProxyType({})

    def size_of(self, name: str | None, x: Array) -> int:
        """Returns the number of entries of an array, or of each member of a stack.

        Args:
          name: Path of the parameter that the array belongs to.
          x: The array.
        """
        stack = self.stacks.get(name or "")
        return x.size if stack is None else x.size * stack.each // stack.size


_LAYOUT: ContextVar[Layout | None] = ContextVar("_LAYOUT", default=None)


def layout() -> Layout:
    """Returns the layout of states that are made now."""
    return _LAYOUT.get() or Layout()


@contextlib.contextmanager
def laid_out(**changes: Any) -> Iterator[None]:
    """Changes the layout of states that are made meanwhile.

    Args:
      **changes: Fields of `Layout`.
    """
    token = _LAYOUT.set(layout()._replace(**changes))
    try:
        yield
    finally:
        _LAYOUT.reset(token)
