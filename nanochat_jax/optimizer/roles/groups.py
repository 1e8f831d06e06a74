"""Reads leaves that belong together by their names: attention, MLPs, experts, LoRA."""

from collections.abc import Iterator

from nanochat_jax.optimizer.roles.leaves import Leaf, Leaves
from nanochat_jax.optimizer.roles.names import Words
from nanochat_jax.optimizer.roles.published import EITHER_WAY, FAMILIES, Family
from nanochat_jax.optimizer.roles.solve import Way, batches, unify, without
from nanochat_jax.optimizer.roles.stacks import Stack

Parts = list[tuple[str, Leaf]]


def ways_of_families(leaves: Leaves, leaf: Leaf, stack: Stack) -> list[Way]:
    """Returns all ways to read a leaf as one of a published family."""
    ways = []
    for family in FAMILIES:
        for ending in family.endings:
            module = leaf.module[:-1] if ending else leaf.module
            parts = _parts(leaves, module, family, ending)
            if leaf in [found for _, found in parts] and _enough(parts, family):
                ways += _ways(parts, family, stack)
    return [way for way in ways if leaf.path in way.views]


def ways_of_lora(leaves: Leaves, leaf: Leaf, stack: Stack) -> list[Way]:
    """Returns all ways to read one of the two factors of LoRA.

    They share their rank: the last axis of `a`, and the first of `b`.
    """
    found = leaves.lora_pair(leaf)
    ways = []
    for batch in batches(stack) if found else ():
        a, b = (without(x.shape, batch) for x in found)
        if a is None or b is None or a.stacked != b.stacked:
            continue
        if min(len(a.shape), len(b.shape)) < 2 or a.shape[-1] != b.shape[0]:
            continue
        last = len(a.shape) - 1
        views = (a.view(range(last), [last]), b.view([0], range(1, len(b.shape))))
        paths = (x.path for x in found)
        ways.append(Way(batch, dict(zip(paths, views, strict=True)), "LoRA pair"))
    return ways


def _parts(leaves: Leaves, module: Words, family: Family, ending: str) -> Parts:
    """Returns the leaves of a family in a module, by the parts they play."""
    parts: Parts = []
    for part, children in family.children.items():
        found = list(_found(leaves, module, children, ending))
        # A module can hold several maps up, gate and value, but one down.
        for child, leaf in found if part == "up" else found[:1]:
            parts.append((part, leaf))
            bias = leaves.get(*child, "bias") or leaves.get(*child, "b")
            if bias and bias != leaf:
                parts.append((f"{part} bias", bias))
    return parts


def _found(
    leaves: Leaves, module: Words, children: tuple[str, ...], ending: str
) -> Iterator[tuple[Words, Leaf]]:
    for child in children:
        words = (*module, child, ending) if ending else (*module, child)
        leaf = leaves.get(*words)
        if leaf:
            yield (*module, child), leaf


def _enough(parts: Parts, family: Family) -> bool:
    there = {part for part, _ in parts}
    return all(there & {*group} for group in family.needed)


def _ways(parts: Parts, family: Family, stack: Stack) -> Iterator[Way]:
    for what, layout in family.layouts.items():
        if not all(part in layout for part, _ in parts):
            continue
        members = [(leaf, layout[part]) for part, leaf in parts]
        for batch in batches(stack):
            views = unify(members, batch)
            if views is not None:
                yield Way(batch, views, what, what not in EITHER_WAY)
