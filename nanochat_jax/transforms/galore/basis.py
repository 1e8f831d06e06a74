"""When `galore` computes bases anew, and how.

Leaves of one shape are renewed in one loop over them, inside one `lax.cond` on a
scalar. A batched predicate would pay for both branches on every step; a branch for each
leaf would have to be compiled for each.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from nanochat_jax.numerics import hashing, range_basis
from nanochat_jax.transforms.galore import projection
from nanochat_jax.transforms.galore.adaptive import Adaptive, AdaptiveState
from nanochat_jax.transforms.sharding import placement, vary_over, varying_axes


class Leaf(NamedTuple):
    """What a change of basis needs of one leaf.

    Attributes:
      gradient: The gradient, as it came.
      due: Whether the basis is to be renewed.
      seed: What the sketch hangs on.
      basis: The basis that is there.
      moments: First moments in its coordinates.
      rests: First moments of the rest that belong to them, one to each, or none.
    """

    gradient: Float[Array, "*batch m n"]
    due: Bool[Array, ""]
    seed: UInt32[Array, ""]
    basis: Float[Array, "*batch short r"]
    moments: tuple[Float[Array, "*batch r long"], ...]
    rests: tuple[Float[Array, "*batch m n"], ...]


class Renewed(NamedTuple):
    """What a change of basis leaves.

    Attributes:
      basis: The basis.
      moments: First moments in its coordinates.
      rests: First moments of the rest.
      overlap: Share of the basis before that it spans; 1 if it is the same.
    """

    basis: Float[Array, "*batch short r"]
    moments: tuple[Float[Array, "*batch r long"], ...]
    rests: tuple[Float[Array, "*batch m n"], ...]
    overlap: Float32[Array, ""]


@dataclasses.dataclass(frozen=True)
class Refresh:
    """When and how bases are computed anew; the fields are arguments of `galore`."""

    every: int
    stagger: bool
    adaptive: Adaptive | None
    warm_start: bool
    momentum_share: ArrayLike
    power_steps: int
    aligned: bool
    seed: int

    def is_due(
        self, count: Int32[Array, ""], name: str, memory: AdaptiveState | None
    ) -> Bool[Array, ""]:
        """Returns whether the basis of a leaf is stale.

        Args:
          count: Steps taken.
          name: Path of the leaf, by which it takes its turn.
          memory: What is remembered of it, if refreshing is adaptive.
        """
        if self.adaptive is not None and memory is not None:
            due = self.adaptive.is_due(memory, count, self.every)
        else:
            turn = zlib.crc32(name.encode()) % self.every if self.stagger else 0
            due = (count + turn) % self.every == 0
        return (count == 0) | due

    def sketch_seed(self, count: Int32[Array, ""], name: str) -> UInt32[Array, ""]:
        """Returns what the sketch of a leaf hangs on: seed, path and step."""
        base = jnp.uint32(zlib.crc32(f"{self.seed} galore{name}".encode()))
        return hashing.mix_bits(base ^ hashing.mix_bits(count.astype(jnp.uint32)))

    def renew(
        self, leaves: Sequence[Leaf], sharding: NamedSharding | None = None
    ) -> list[Renewed]:
        """Returns the bases of leaves of one shape, renewed where they are due.

        Args:
          leaves: The leaves.
          sharding: How the gradient of each is sharded, if that is known.
        """
        # All as one of them, since branches must agree in that too.
        leaves = vary_over(list(leaves), varying_axes(leaves))
        renew_if_due = functools.partial(self._renew_if_due, sharding=sharding)
        if len(leaves) == 1:
            return [renew_if_due(leaves[0])]

        def renew_due() -> list[Renewed]:
            # Picked one by one, as a stack of them would be a copy of all.
            pick = lambda i: jax.lax.switch(i, [lambda x=x: x for x in leaves])
            turns = jnp.arange(len(leaves), dtype=jnp.int32)
            renewed = jax.lax.map(lambda i: renew_if_due(pick(i)), turns)
            return [
                jax.tree.map(lambda x, i=i: x[i], renewed) for i in range(len(leaves))
            ]

        any_due = jnp.stack([leaf.due for leaf in leaves]).any()
        return jax.lax.cond(any_due, renew_due, lambda: [_same(x) for x in leaves])

    def _renew_if_due(self, leaf: Leaf, sharding: NamedSharding | None) -> Renewed:
        return jax.lax.cond(
            leaf.due, lambda: self._renew(leaf, sharding), lambda: _same(leaf)
        )

    def _renew(self, leaf: Leaf, sharding: NamedSharding | None) -> Renewed:
        g, old = leaf.gradient, leaf.basis
        usable = jnp.isfinite(g).all((-2, -1), keepdims=True)
        usable &= (g != 0).any((-2, -1), keepdims=True)
        x = jnp.where(usable, g, 0).astype(jnp.float32)
        wholes = _whole_moments(leaf)
        share = self.momentum_share
        published = isinstance(share, int | float) and share == 0
        if wholes and not published:
            x = jnp.asarray((1 - share) * x + share * wholes[0])
        new = range_basis(
            projection.short_first(placement.split_long(x, sharding)),
            old.shape[-1],
            leaf.seed,
            start=old if self.warm_start else None,
            power_steps=self.power_steps,
            aligned=self.aligned,
            # Of what devices send each other nothing is to be larger than a basis.
            form_gram=False if placement.is_split(sharding) else None,
        ).astype(old.dtype)
        new = jnp.where(usable, new, old)
        rotation = projection.matmul(new.mT, old)
        if leaf.rests:
            moved = [projection.project(m, new) for m in wholes]
        else:
            moved = [projection.matmul(rotation, m) for m in leaf.moments]
        rests = [
            projection.cut_off(m, low, new).astype(rest.dtype)
            for m, low, rest in zip(wholes, moved, leaf.rests, strict=False)
        ]
        moved = [x.astype(m.dtype) for x, m in zip(moved, leaf.moments, strict=True)]
        overlap = jnp.mean(jnp.sum(rotation**2, axis=(-2, -1))) / old.shape[-1]
        return Renewed(new, tuple(moved), tuple(rests), overlap)


def _whole_moments(leaf: Leaf) -> list[Array]:
    """Returns first moments in the coordinates of the gradient, `P·m` and the rest."""
    rests = leaf.rests or [0.0] * len(leaf.moments)
    lift = lambda m: projection.lift(m, leaf.basis, leaf.gradient.shape)
    return [lift(m) + rest for m, rest in zip(leaf.moments, rests, strict=True)]


def _same(leaf: Leaf) -> Renewed:
    overlap = vary_over(jnp.float32(1.0), varying_axes(leaf))
    return Renewed(leaf.basis, leaf.moments, leaf.rests, overlap)
