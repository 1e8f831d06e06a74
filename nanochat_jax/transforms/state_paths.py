"""Which parameter a leaf of a state belongs to.

States hold copies of the tree of parameters: of a momentum in the field `momentum`, of
bases in the field `basis`. A leaf is named by the keys above its copy, the state's
own, and by the path of its parameter within. Codecs, keys and bases are looked up by
these, so a leaf is treated alike in a whole tree and in a part of it.

Parameters may have any names, those of fields too: `.mu.nu` is the first moment of a
parameter `.nu` or the second part of a parameter `.mu`. A single path does not tell;
that a whole copy of the parameters stands below `.mu` does.
"""

from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import GetAttrKey, KeyPath, keystr

from nanochat_jax.codecs import is_quantized


class Place(NamedTuple):
    """Position of a leaf in a state.

    Attributes:
      above: Keys from the state down to its copy of the parameters; the full path of a
        leaf that is in none.
      name: Path of its parameter within that copy; `None` for a leaf that is in none,
        such as a count.
    """

    above: KeyPath
    name: str | None

    @property
    def fields(self) -> list[str]:
        """Names of the NamedTuple fields above, outermost first."""
        return [key.name for key in self.above if isinstance(key, GetAttrKey)]

    def field(self, names: Collection[str]) -> str | None:
        """Returns the outermost of the fields above that is in `names`, if one is."""
        return next((name for name in self.fields if name in names), None)


def locate(state: Any, params: Any) -> dict[str, Place]:
    """Returns where the leaves of a state stand, by their paths, in order.

    A copy of the parameters has a leaf, or `None` or `optax.MaskedNode` in its place,
    for every parameter and nothing else. Of two, one in the other, the outer one
    counts.

    Example:
      >>> params = {"block": {"kernel": jnp.ones((8, 16))}}
      >>> state = optax.adam(0.1).init(params)
      >>> place = locate(state, params)["[0].mu['block']['kernel']"]
      >>> place.fields, place.name
      (['mu'], "['block']['kernel']")

    Args:
      state: A state, of arrays or shapes; a stored leaf is one leaf.
      params: The parameters, or a tree of their structure. A parameter that is itself
        the tree has the name `""`; leaves without axes are then counts, not its own.

    Returns:
      The places of all leaves, and of nodes in place of leaves, by path as
      `jax.tree_util.keystr` has it.
    """
    wanted = jax.tree.leaves_with_path(params, is_leaf=_is_absent)
    below = Counter[str]()  # parameters under each prefix of their paths
    for path, x in wanted:
        for end in range(len(path) + 1):
            below[keystr(path[:end])] += not _is_absent(x)
    names = {keystr(path) for path, _ in wanted}
    count = below[""]
    nodes = jax.tree.leaves_with_path(state, is_leaf=_is_node)
    found = Counter[str]()  # parameters found under each prefix of paths in the state
    for path, x in nodes:
        known = below if _is_absent(x) else names
        for prefix, end in _cuts(path):
            found[prefix] += below[end] if end in known else count + 1
    copies = {prefix for prefix in found if count and found[prefix] == count}
    return {keystr(path): _place(path, x, copies) for path, x in nodes}


def _place(path: KeyPath, x: Any, copies: set[str]) -> Place:
    cuts = enumerate(_cuts(path))
    start, name = next(
        ((i, end) for i, (prefix, end) in cuts if prefix in copies), (None, None)
    )
    if name is None or (name == "" and not _has_axes(x)):
        return Place(path, None)
    return Place(path[:start], name)


def _cuts(path: KeyPath) -> list[tuple[str, str]]:
    """Returns all ways to cut a path in two, the first part growing."""
    starts, ends = [""], [""]
    for key in path:
        starts.append(starts[-1] + str(key))
    for key in reversed(path):
        ends.append(str(key) + ends[-1])
    return list(zip(starts, reversed(ends), strict=True))


def _has_axes(x: Any) -> bool:
    return is_quantized(x) or len(getattr(x, "shape", ())) > 0


def _is_absent(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _is_node(node: Any) -> bool:
    return _is_absent(node) or is_quantized(node)
