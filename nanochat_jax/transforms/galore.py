"""GaLore: run a transform in a low-rank space of the gradient.

A leaf `[*batch, m, n]` is seen as `short x long`, its shorter axis first. Its projector
`P` is `[*batch, short, r]` with orthonormal columns, and the wrapped transform sees
`PᵀG`, `[*batch, r, long]`: rows are directions, so blocks of the last axis, which share
a quantisation scale, do not mix strong directions with weak ones.
"""

import dataclasses
import zlib
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Int32

from nanochat_jax import linalg
from nanochat_jax.codecs import Quantized
from nanochat_jax.transforms import projection, trees


class GaloreState(NamedTuple):
    """State of `galore`.

    Attributes:
      count: Steps taken.
      projector: `[*batch, short, r]` for each projected leaf, `None` for the others.
      inner: State of the wrapped transform, shaped by the projected gradients.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    projector: Any
    inner: optax.OptState


def galore(
    inner: optax.GradientTransformation,
    rank: int,
    *,
    refresh_every: int = 200,
    refresh_stagger: bool = False,
    residual: ArrayLike = 0.0,
    scale: ArrayLike = 1.0,
    oversample: int = 8,
    power_steps: int = 2,
    reproject: Collection[str] = ("momentum", "trace", "mu"),
    projector_dtype: str = "float32",
    projector_cost: float | None = None,
    min_saving: float = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on gradients projected to `rank` dimensions.

    For each matrix `G` the result is `scale·P·inner(PᵀG) + residual·(I - PPᵀ)G`. The
    basis `P` spans the leading directions of the gradient on the shorter axis (Zhao et
    al. 2024, GaLore, algorithm 2), found by a randomised singular value decomposition
    (GaLore 2, Su et al. 2025). On a change of basis first moments move along,
    `m ← (P_newᵀ P_old) m`, so that at full rank nothing changes but the coordinates.
    A zero or non-finite gradient keeps the old basis.

    `inner` sees no parameters and works in float32. Weight decay, and scales that
    depend on a parameter's shape, belong outside.

    Example:
      >>> plain = galore(optax.chain(momentum(), orthogonalize()), rank=64)
      >>> joint = optax.chain(galore(momentum(), 64, residual=1.0), orthogonalize())
      >>> state = joint.init({"kernel": jnp.zeros((256, 1024))})
      >>> state[0].projector["kernel"].shape, state[0].inner.momentum["kernel"].shape
      ((256, 64), (64, 1024))

    Args:
      inner: Transform to run in the low-rank space.
      rank: Dimensions kept.
      refresh_every: Steps between two computations of the basis.
      refresh_stagger: Whether leaves take turns, by a hash of their path, so that not
        all are computed on one step. On the first step all are.
      residual: Weight of what the projector cuts off. 0 is the published method; 1
        passes the rest of the gradient on as it is, without state.
      scale: Factor on the projected updates, `α` in the paper.
      oversample: Columns of the random sketch beyond `rank`.
      power_steps: Subspace iterations of the sketch.
      reproject: Fields of `inner`'s state that hold first moments. Others stay as they
        are on a change of basis; none, `()`, is the published method.
      projector_dtype: Type of the stored projector.
      projector_cost: Bytes of a stored entry of the projector over those of an entry of
        `inner`'s state, for the choice below; by its type over float32 if not given.
        To be set where a wrapper outside stores them in fewer bits.
      min_saving: Leaves are projected if this saves more than this fraction of a stored
        full-rank buffer, `1 - r(long + cost·short) / (long·short)`; the rest, and
        vectors, pass to `inner` whole. `-inf` projects every matrix.
      seed: Seed of the sketch, which is keyed by seed, step and leaf.

    Returns:
      A transformation whose state is a `GaloreState`.

    Raises:
      TypeError: If `rank` is not a Python int.
      ValueError: If a number is out of range; at `init`, if `inner` stores a field of
        `reproject` quantised.
    """
    _check_arguments(rank, refresh_every, oversample, power_steps)
    inner = optax.with_extra_args_support(inner)
    refresh = _Refresh(refresh_every, refresh_stagger, oversample, power_steps, seed)
    if projector_cost is None:
        projector_cost = jnp.dtype(projector_dtype).itemsize / 4

    def first_basis(x: Array) -> Array | None:
        r = projection.projected_rank(x.shape, rank, projector_cost, min_saving)
        if r is None:
            return None
        short = min(x.shape[-2:])
        # Orthonormal from the start: the first gradient may be zero.
        basis = jnp.eye(short, r, dtype=projector_dtype)
        return jnp.broadcast_to(basis, (*x.shape[:-2], short, r))

    def init_fn(params: optax.Params) -> GaloreState:
        projector = jax.tree.map(first_basis, params)
        zeros = lambda x, p: jnp.zeros(projection.low_rank_shape(x, p), jnp.float32)
        inner_state = inner.init(jax.tree.map(zeros, params, projector))
        _require_plain(inner_state, reproject)
        return GaloreState(jnp.zeros([], jnp.int32), projector, inner_state)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaloreState]:
        del params
        projector, inner_state = _change_bases(refresh, reproject, updates, state)
        low_rank = jax.tree.map(projection.project, updates, projector)
        inner_updates, inner_state = inner.update(
            low_rank, inner_state, None, **extra_args
        )
        back = lambda g, low, u, p: (
            u if p is None else projection.project_back(g, low, u, p, scale, residual)
        )
        new_updates = jax.tree.map(back, updates, low_rank, inner_updates, projector)
        count = jnp.asarray(optax.safe_increment(state.count))
        new_updates = optax.tree.cast_like(new_updates, updates)
        return new_updates, GaloreState(count, projector, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@dataclasses.dataclass(frozen=True)
class _Refresh:
    """When and how bases are computed anew; the fields are arguments of `galore`."""

    every: int
    stagger: bool
    oversample: int
    power_steps: int
    seed: int

    def due(self, count: Array, name: str) -> Array:
        """Returns whether the basis of a leaf is stale."""
        # A scalar: under a batched predicate every step would pay for both branches.
        turn = zlib.crc32(name.encode()) % self.every if self.stagger else 0
        return (count == 0) | ((count + turn) % self.every == 0)

    def compute(
        self, g: Array, basis: Array, moments: list[Array], count: Array, name: str
    ) -> tuple[Array, list[Array]]:
        """Returns the basis for `g`, and the moments in its coordinates."""
        usable = jnp.isfinite(g).all((-2, -1), keepdims=True)
        usable &= (g != 0).any((-2, -1), keepdims=True)
        new = linalg.range_basis(
            projection.short_first(jnp.where(usable, g, 0).astype(jnp.float32)),
            basis.shape[-1],
            trees.leaf_key(self.seed, count, f"galore{name}"),
            oversample=self.oversample,
            power_steps=self.power_steps,
        ).astype(basis.dtype)
        new = jnp.where(usable, new, basis)
        rotation = projection.matmul(new.mT, basis)
        return new, [projection.matmul(rotation, m).astype(m.dtype) for m in moments]


def _change_bases(
    refresh: _Refresh, reproject: Collection[str], updates: Any, state: GaloreState
) -> tuple[Any, optax.OptState]:
    """Returns projectors and inner state, renewed for the leaves that are due."""
    leaves, treedef = jax.tree.flatten(state.inner)
    owned = _moments_by_parameter(state.inner, reproject)

    def change(path: KeyPath, g: Array, basis: Array | None) -> Array | None:
        if basis is None:
            return None
        name = keystr(path)
        ids = owned.get(name, [])
        moments = [leaves[i] for i in ids]
        new, moments = jax.lax.cond(
            refresh.due(state.count, name),
            lambda: refresh.compute(g, basis, moments, state.count, name),
            lambda: (basis, moments),
        )
        for i, m in zip(ids, moments, strict=True):
            leaves[i] = m
        return new

    projector = jax.tree.map_with_path(change, updates, state.projector)
    return projector, treedef.unflatten(leaves)


def _moments_by_parameter(
    state: optax.OptState, fields: Collection[str]
) -> dict[str, list[int]]:
    """Returns, by parameter path, which leaves of `state` are its first moments."""
    owned: dict[str, list[int]] = {}
    for i, (path, _) in enumerate(jax.tree.leaves_with_path(state)):
        found = trees.split_path(path, fields)
        if found:
            owned.setdefault(found[1], []).append(i)
    return owned


def _check_arguments(
    rank: int, refresh_every: int, oversample: int, power_steps: int
) -> None:
    if not isinstance(rank, int):
        raise TypeError(
            "`rank` fixes array shapes, so it must be a Python int, got "
            f"{type(rank).__name__}. Under `optax.inject_hyperparams`, list it in "
            "`static_args`."
        )
    if rank < 1 or refresh_every < 1:
        raise ValueError(
            "`rank` and `refresh_every` must be at least 1, got "
            f"{rank=} and {refresh_every=}."
        )
    if oversample < 0 or power_steps < 0:
        raise ValueError(
            "`oversample` and `power_steps` must not be negative, got "
            f"{oversample=} and {power_steps=}."
        )


def _require_plain(state: optax.OptState, reproject: Collection[str]) -> None:
    nodes = jax.tree.leaves_with_path(
        state, is_leaf=lambda node: isinstance(node, Quantized)
    )
    found = [
        f"  {keystr(path)}"
        for path, node in nodes
        if isinstance(node, Quantized) and trees.split_path(path, reproject)
    ]
    if found:
        raise ValueError(
            "`galore` moves first moments to its new basis, but `inner` stores\n"
            + "\n".join(found)
            + "\nquantised. Put `quantize_state` around `galore`, or pass "
            "`reproject=()` to leave moments in the old basis."
        )
