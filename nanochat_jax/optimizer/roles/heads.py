"""Which leaves are output layers, by names and by the sizes of vocabularies."""

import re
from typing import Any

from nanochat_jax.optimizer.roles import names
from nanochat_jax.optimizer.roles.biases import is_turned
from nanochat_jax.optimizer.roles.leaves import Leaf, Leaves
from nanochat_jax.optimizer.roles.names import Words

_AUTO = re.compile(r"(dense|linear)_(\d+)|dense|linear")


def find_heads(leaves: Leaves) -> set[Any]:
    """Returns the paths of all output layers.

    Some names mean an output layer at any depth. Others, such as `out`, do so only at
    the top of a model, or if the output is as large as a vocabulary; and not
    where a named output layer of another size stands beside. A layer without a name is
    one if it leads back to a vocabulary.
    """
    candidates = [x for x in leaves.all if x.rank > 1 and not leaves.is_vector(x)]
    sure = [x for x in candidates if _head_word(x)]
    sure = [x for x in sure if _is_last(x, sure, leaves)]
    tables = {
        x.shape[-2:]
        for x in candidates
        if x not in sure and x.words and names.is_table(x.words)
    }
    sizes = {_out(leaves, x) for x in sure}
    top = _top(leaves)
    more = [
        x
        for x in candidates
        if (_is_weak(leaves, x, top, tables, sizes)) or _is_tied(leaves, x, top, tables)
    ]
    return {x.path for x in [*sure, *more]}


def _head_word(leaf: Leaf) -> Words:
    """Returns the path up to the word that names an output layer, or nothing."""
    for depth, word in enumerate(leaf.words, 1):
        if names.is_inner(word):
            return ()
        if names.is_head(word):
            return leaf.words[:depth]
    return ()


def _is_last(leaf: Leaf, heads: list[Leaf], leaves: Leaves) -> bool:
    """Returns whether no other layer of the same head takes what a leaf makes."""
    same = [x for x in heads if _head_word(x) == _head_word(leaf)]
    last = [
        x
        for x in same
        if not any(_out(leaves, x) == _in(leaves, y) for y in same if y != x)
    ]
    return leaf in last or not last


def _top(leaves: Leaves) -> Words:
    """Returns the container that holds all leaves, as far as it holds modules."""
    paths = [leaf.module for leaf in leaves.all]
    top = paths[0] if paths else ()
    for path in paths:
        while path[: len(top)] != top:
            top = top[:-1]
    return top


def _is_weak(
    leaves: Leaves, leaf: Leaf, top: Words, tables: set[Any], sizes: set[int]
) -> bool:
    """Returns whether a leaf named like an output is one."""
    module = leaf.words if names.is_weak_head(leaf.name) else leaf.module
    if not module or not names.is_weak_head(module[-1]):
        return False
    above = module[:-1]
    if any(map(names.is_inner, above)) or _has_attention(leaves, above):
        return False
    out, vocabularies = _out(leaves, leaf), {rows for rows, _ in tables}
    if out in vocabularies and (out, _in(leaves, leaf)) in tables:
        return True
    at_top = top in (above, module) and not any(word.isdigit() for word in above)
    return at_top and (not sizes or out in sizes | vocabularies)


def _has_attention(leaves: Leaves, module: Words) -> bool:
    beside = {x.words[len(module)] for x in leaves.below[module] if x.words != module}
    return bool(beside & {"query", "key", "value", "qkv", "q_proj", "v_proj"})


def _is_tied(leaves: Leaves, leaf: Leaf, top: Words, tables: set[Any]) -> bool:
    """Returns whether the last layer without a name leads back to a vocabulary."""
    if not leaf.module or not _AUTO.fullmatch(leaf.module[-1]):
        return False
    if leaf.module[:-1] != top or leaf.shape[-1] == leaf.shape[-2]:
        return False
    shape = (_out(leaves, leaf), _in(leaves, leaf))
    return shape in tables


def _out(leaves: Leaves, leaf: Leaf) -> int:
    return leaf.shape[-2 if is_turned(leaves, leaf)[0] else -1]


def _in(leaves: Leaves, leaf: Leaf) -> int:
    return leaf.shape[-1 if is_turned(leaves, leaf)[0] else -2]
