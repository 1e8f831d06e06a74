"""Gradients taken in by the averages of `GGᵀ`, and eigenbases renewed.

Averages are kept in the coordinates of their bases, where they are nearly diagonal: so
few bits hold small eigenvalues as exactly as large ones.

Bases of leaves of one shape are computed together, inside one `lax.cond` on a scalar.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath, keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from nanochat_jax.transforms.galore import projection
from nanochat_jax.transforms.precondition.power_step import Followed, PowerStep
from nanochat_jax.transforms.scheduling import group_by_shape, group_bytes
from nanochat_jax.transforms.sharding import vary_over, varying_axes


class Leaf(NamedTuple):
    """What `precondition` keeps of one leaf; see `PreconditionState`."""

    gram_short: Array
    gram_long: Any
    basis_short: Array
    basis_long: Any
    second_moment: Float32[Array, "*batch m n"]

    @property
    def is_ready(self) -> Bool[Array, "*batch"]:
        """Whether a gradient has been taken in, and bases computed."""
        return jnp.trace(self.gram_short, axis1=-2, axis2=-1) > 0

    @property
    def bases(self) -> tuple[Any, Any]:
        """Bases of the rows and of the columns, `None` for none."""
        short, long = self.basis_short, self.basis_long
        return (short, long) if self.axis("short") == -2 else (long, short)

    def axis(self, side: str) -> int:
        """Returns the axis of a matrix that is its short or its long side."""
        m, n = self.second_moment.shape[-2:]
        return -2 if (m <= n) == (side == "short") else -1


def take_in(leaf: Leaf, g: Float[Array, "*batch m n"], beta: ArrayLike) -> Leaf:
    """Returns a leaf with a gradient in its averages, if it is not zero and finite.

    Args:
      leaf: The leaf.
      g: Its gradient.
      beta: Decay of the averages.
    """
    x = projection.short_first(g).astype(jnp.float32)
    size = jnp.sum(x * x, axis=(-2, -1), keepdims=True)
    usable = jnp.isfinite(size) & (size > 0)

    def average(gram: Array | None, basis: Any, x: Array) -> Array | None:
        if gram is None:
            return None
        rotated = projection.matmul(basis.mT, x)
        new = beta * gram + (1 - beta) * projection.matmul(rotated, rotated.mT)
        return jnp.where(usable, new, gram).astype(jnp.float32)

    return leaf._replace(
        gram_short=average(leaf.gram_short, leaf.basis_short, x),
        gram_long=average(leaf.gram_long, leaf.basis_long, x.mT),
    )


def renew(
    paths: Sequence[KeyPath],
    gradients: Sequence[Array],
    leaves: Sequence[Leaf],
    were_ready: Sequence[Array],
    rule: PowerStep,
    count: Int32[Array, ""],
) -> list[Leaf]:
    """Returns leaves with new bases where they are due, and moments in their order.

    Args:
      paths: Paths of the leaves.
      gradients: Their gradients.
      leaves: The leaves, with these gradients taken in.
      were_ready: Which matrices of each had bases before.
      rule: When and how bases are computed; a first one is due at once.
      count: Steps taken.
    """
    leaves = list(leaves)
    due = []
    for path, g, leaf, was in zip(paths, gradients, leaves, were_ready, strict=True):
        x = projection.short_first(g)
        now = rule.is_due(count, keystr(path), x, leaf.basis_short)
        due.append(leaf.is_ready & (now | ~was))
    for group in group_by_shape(gradients, group_bytes()):
        if not gradients[group[0]].size:
            continue
        new = _renew_alike([leaves[i] for i in group], [due[i] for i in group], rule)
        for i, leaf in zip(group, new, strict=True):
            leaves[i] = leaf
    return leaves


def _renew_alike(
    leaves: Sequence[Leaf], due: Sequence[Array], rule: PowerStep
) -> list[Leaf]:
    """Renews leaves of one shape."""
    # All as one of them, since branches must agree in that too.
    leaves = vary_over(list(leaves), varying_axes((leaves, due)))
    masks = jnp.stack(due)

    def renewed() -> list[Leaf]:
        new = list(leaves)
        for side in ("short", "long"):
            if getattr(leaves[0], f"gram_{side}") is None:
                continue
            grams = jnp.stack([getattr(leaf, f"gram_{side}") for leaf in leaves])
            bases = jnp.stack([getattr(leaf, f"basis_{side}") for leaf in leaves])
            found = rule.follow(grams, bases)
            sound = masks & jnp.isfinite(found.basis).all((-2, -1))
            for i, leaf in enumerate(new):
                mine = jax.tree.map(lambda x, i=i: x[i], found)
                new[i] = _moved(leaf, side, mine, sound[i])
        return new

    return jax.lax.cond(masks.any(), renewed, lambda: list(leaves))


def _moved(leaf: Leaf, side: str, found: Followed, due: Array) -> Leaf:
    """Returns a leaf with a new basis on a side, where it is due."""
    axis = leaf.axis(side)
    index = jnp.expand_dims(found.order, -3 - axis)
    new = {
        f"basis_{side}": found.basis,
        f"gram_{side}": found.gram,
        "second_moment": jnp.take_along_axis(leaf.second_moment, index, axis),
    }
    pick = lambda name, x: jnp.where(due[..., None, None], x, getattr(leaf, name))
    return leaf._replace(**{name: pick(name, x) for name, x in new.items()})
