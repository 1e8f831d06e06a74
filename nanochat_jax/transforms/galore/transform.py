"""GaLore: run a transform in a low-rank space of the gradient.

A leaf `[*batch, m, n]` is seen as `short x long`, its shorter axis first. Its basis `P`
is `[*batch, short, r]` with orthonormal columns, and the wrapped transform sees `PᵀG`,
`[*batch, r, long]`: rows are directions, so blocks of the last axis, which share a
quantisation scale, do not mix strong directions with weak ones.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Int32

from nanochat_jax.codecs import is_quantized
from nanochat_jax.transforms import checks, precision
from nanochat_jax.transforms.galore import projection
from nanochat_jax.transforms.galore.basis import Basis, RandomizedSVD
from nanochat_jax.transforms.galore.complement import Complement
from nanochat_jax.transforms.galore.projection import Rank, saves_bytes
from nanochat_jax.transforms.galore.refresh import Where, change_bases
from nanochat_jax.transforms.sharding import (
    NOWHERE,
    Entries,
    Placement,
    in_auto_mode,
    placement as placing,
)
from nanochat_jax.transforms.state_paths import locate


class GaloreState(NamedTuple):
    """State of `galore`.

    Attributes:
      count: Steps taken.
      basis: `[*batch, short, r]` for each projected leaf, `None` for the others.
      inner: State of the wrapped transform, shaped by the projected gradients.
      complement: State of the transform of the complement, shaped by the parameters
        that are projected; `None` without one.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    basis: Any
    inner: optax.OptState
    complement: Any = None


def galore(
    inner: optax.GradientTransformation,
    rank: Rank,
    *,
    complement: ArrayLike | optax.GradientTransformation = 0.0,
    basis: Basis = RandomizedSVD(),  # noqa: B008 (it is frozen)
    scale: ArrayLike = 1.0,
    reproject: Collection[str] = ("momentum", "trace", "mu"),
    project: Callable[[tuple[int, ...], int], bool] = saves_bytes,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on gradients projected to `rank` dimensions.

    For each matrix `G` the result is `scale·P·inner(PᵀG)`, and the complement
    `(I - PPᵀ)G` added to it if that is asked for. The basis `P` spans the leading
    directions of the gradient on the shorter axis (Zhao et al. 2024, GaLore, algorithm
    2), found by a randomised singular value decomposition (GaLore 2, Su et al. 2025).
    When the basis changes, first moments move along, `m ← (P_newᵀ P_old) m`, so that at
    full rank nothing changes but the coordinates.

    `inner` sees no parameters and works in float32. Weight decay, and scales that
    depend on a parameter's shape, belong outside.

    Example:
      >>> plain = galore(optax.chain(momentum(), orthogonalize()), rank=64)
      >>> joint = optax.chain(galore(momentum(), 64, complement=1.0), orthogonalize())
      >>> two_speed = quantize_state(
      ...     galore(momentum(0.95), 64, complement=momentum(0.8)),
      ...     {"momentum": Int8(), "complement": Normal2()},
      ... )
      >>> state = joint.init({"kernel": jnp.zeros((256, 1024))})
      >>> state[0].basis["kernel"].shape, state[0].inner.momentum["kernel"].shape
      ((256, 64), (64, 1024))

    Args:
      inner: Transform to run in the low-rank space.
      rank: Dimensions kept: a number of them, or a fraction of the shorter axis.
      complement: Weight of the complement, or a transform of it. 0 drops it, which is
        the published method, and the default since it suits any `inner`: beside a
        normalised direction, such as Adam's, the raw gradient has another scale. 1
        passes it on, without state, as `muon` and `OptimizerConfig` do by default, who
        orthogonalise the sum. Of a transform, such as
        `momentum(0.8)`, the result is projected onto the complement again; when the
        basis changes, first moments are split anew between `inner` and this transform,
        and their sum is unchanged. Its state is as large as the parameters: wrap the
        whole in `quantize_state` with few bits for the field `complement`.
      basis: Rule for when and how bases are computed.
      scale: Factor on the projected updates, `α` in the paper.
      reproject: Fields of `inner`'s state that hold first moments. Others stay as they
        are on a change of basis; none, `()`, is the published method.
      project: Function of shape and rank that decides whether to project a matrix. By
        default where that saves bytes. Other leaves pass to `inner` whole.

    Returns:
      A transformation whose state is a `GaloreState`.

    Raises:
      TypeError: If the rank is not a Python number, or another argument of the wrong
        kind; at `init`, if a leaf is complex.
      ValueError: If the rank is out of range; at `init`, if `inner` stores a field of
        `reproject` quantised; at `update`, if `inner` asks for parameters.
    """
    projection.check_rank(rank)
    checks.require_rule(basis, complement, project)
    inner = optax.with_extra_args_support(inner)
    outside = Complement.of(complement, scale)

    def init_fn(params: optax.Params) -> GaloreState:
        checks.require_real(params, "galore")
        bases = jax.tree.map(lambda x: _first_basis(x, rank, project), params)
        zeros = lambda x, p: jnp.zeros(projection.low_rank_shape(x, p), jnp.float32)
        inner_state = inner.init(jax.tree.map(zeros, params, bases))
        _require_plain(inner_state, params, reproject)
        count = jnp.zeros([], jnp.int32)
        return GaloreState(count, bases, inner_state, outside.init(params, bases))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        placement: Placement = NOWHERE,
        layer: ArrayLike = 0,
        entries: Mapping[str, Entries] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaloreState]:
        checks.require_state(state, GaloreState, "galore")
        where = Where(placement, layer, entries or {})
        state = change_bases(basis, reproject, updates, state, where)
        extra_args |= {"layer": layer, "entries": entries}
        bases = jax.tree.map_with_path(
            lambda path, g, p: placing.beside(p, g, placement.sharding(path, g)),
            updates,
            state.basis,
        )
        low_rank = jax.tree.map(projection.project, updates, bases)
        new, inner_state = checks.update_without_params(
            inner, low_rank, state.inner, "inner", extra_args
        )
        new, complement_state = outside.combine(
            updates, low_rank, new, bases, state.complement, extra_args
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        state = GaloreState(count, state.basis, inner_state, complement_state)
        return precision.cast_like(new, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, in_auto_mode(update_fn))


def _first_basis(
    x: Array, rank: Rank, project: Callable[[tuple[int, ...], int], bool]
) -> Array | None:
    r = projection.projected_rank(x.shape, rank, project)
    if r is None:
        return None
    short = min(x.shape[-2:])
    # Orthonormal from the start: the first gradient may be zero.
    return jnp.broadcast_to(
        jnp.eye(short, r, dtype=jnp.float32), (*x.shape[:-2], short, r)
    )


def _require_plain(
    state: optax.OptState, params: optax.Params, reproject: Collection[str]
) -> None:
    places = locate(state, params)
    found = [
        f"  {keystr(path)}"
        for path, node in jax.tree.leaves_with_path(state, is_leaf=is_quantized)
        if is_quantized(node) and places[keystr(path)].field(reproject)
    ]
    if found:
        raise ValueError(
            "`galore` moves first moments to its new basis, but `inner` stores\n"
            + "\n".join(found)
            + "\nquantised. Put `quantize_state` around `galore`, or pass "
            "`reproject=()` to leave moments in the old basis."
        )
