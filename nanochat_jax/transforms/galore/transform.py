"""GaLore: run a transform in a low-rank space of the gradient.

A leaf `[*batch, m, n]` is seen as `short x long`, its shorter axis first. Its projector
`P` is `[*batch, short, r]` with orthonormal columns, and the wrapped transform sees
`PᵀG`, `[*batch, r, long]`: rows are directions, so blocks of the last axis, which share
a quantisation scale, do not mix strong directions with weak ones.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Int32

from nanochat_jax.numerics import POWER_STEPS
from nanochat_jax.transforms import checks, precision
from nanochat_jax.transforms.galore import bases, projection
from nanochat_jax.transforms.galore.adaptive import Adaptive
from nanochat_jax.transforms.galore.basis import Refresh
from nanochat_jax.transforms.galore.complement import Residual
from nanochat_jax.transforms.galore.projection import Rank
from nanochat_jax.transforms.sharding import placement
from nanochat_jax.transforms.state_paths import locate
from nanochat_jax.transforms.stored import is_quantized


class GaloreState(NamedTuple):
    """State of `galore`.

    Attributes:
      count: Steps taken.
      projector: `[*batch, short, r]` for each projected leaf, `None` for the others.
      inner: State of the wrapped transform, shaped by the projected gradients.
      adaptive: What adaptive refreshing remembers of each projected leaf; `None` if
        refreshing is not adaptive.
      rest: State of the transform of what the projector cuts off, shaped by the
        parameters that are projected; `None` without one.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    projector: Any
    inner: optax.OptState
    adaptive: Any = None
    rest: Any = None


def galore(
    inner: optax.GradientTransformation,
    rank: Rank,
    *,
    refresh_every: int = 200,
    refresh_stagger: bool = False,
    adaptive: Adaptive | None = None,
    warm_start: bool = False,
    momentum_share: ArrayLike = 0.0,
    residual: ArrayLike = 0.0,
    rest: optax.GradientTransformation | None = None,
    match_norm: bool = False,
    scale: ArrayLike = 1.0,
    power_steps: int = POWER_STEPS,
    aligned: bool = True,
    reproject: Collection[str] = ("momentum", "trace", "mu"),
    projector_dtype: str = "float32",
    projector_cost: float | None = None,
    min_saving: float = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on gradients projected to `rank` dimensions.

    For each matrix `G` the result is `scale·P·inner(PᵀG) + residual·(I - PPᵀ)G`, the
    second part by way of `rest` if there is one. The
    basis `P` spans the leading directions of the gradient on the shorter axis (Zhao et
    al. 2024, GaLore, algorithm 2), found by a randomised singular value decomposition
    (GaLore 2, Su et al. 2025). On a change of basis first moments move along,
    `m ← (P_newᵀ P_old) m`, so that at full rank nothing changes but the coordinates.
    A zero or non-finite gradient keeps the old basis.

    `inner` sees no parameters and works in float32. Weight decay, and scales that
    depend on a parameter's shape, belong outside.

    Without residual the update hangs on `PᵀG` only, except where a basis is renewed. So
    between two changes `update` takes gradients that `project_gradients` has projected,
    with `projected=True` and the parameters, which give the shapes.

    Example:
      >>> plain = galore(optax.chain(momentum(), orthogonalize()), rank=64)
      >>> joint = optax.chain(galore(momentum(), 64, residual=1.0), orthogonalize())
      >>> two_speed = quantize_state(
      ...     galore(momentum(0.95), 64, residual=1.0, rest=momentum(0.8)),
      ...     {"momentum": Int8(), "rest": Normal2()},
      ... )
      >>> state = joint.init({"kernel": jnp.zeros((256, 1024))})
      >>> state[0].projector["kernel"].shape, state[0].inner.momentum["kernel"].shape
      ((256, 64), (64, 1024))

    Args:
      inner: Transform to run in the low-rank space.
      rank: Dimensions kept: a number of them, a fraction of the shorter axis in (0, 1),
        or either by role, as a mapping from parts of paths, such as `"attention"`, of
        which the first that matches counts; `"*"` matches the rest.
      refresh_every: Steps between two computations of the basis.
      refresh_stagger: Whether leaves take turns, by a hash of their path, so that not
        all are computed on one step. On the first step all are.
      adaptive: Rule to renew a basis early or late, by what its gradients do.
      warm_start: Whether to look for a basis from the one before, in place of a fresh
        random sketch. One of `power_steps` will then do.
      momentum_share: Share of the first moment, beside that of the gradient, in the
        matrix whose leading directions the basis is of. 0 is the published method;
        more of it depends less on the noise of one batch.
      residual: Weight of what the projector cuts off. 0 is the published method; 1
        passes the rest of the gradient on as it is, without state.
      rest: Transform of what the projector cuts off, such as `momentum(0.8)`. What it
        returns within the basis is cut off again; on a change of basis its first
        moments take up what `inner`'s lose, and give what these gain. Its state is as
        large as the parameters: wrap the whole in `quantize_state` with few bits for
        the field `rest`.
      match_norm: Whether the rest is also scaled by `‖inner(PᵀG)‖ / ‖PᵀG‖` of its
        matrix, as in Fira (Chen et al. 2024, section 4.2): for an `inner` like Adam,
        whose updates are not of the size of gradients.
      scale: Factor on the projected updates, `α` in the paper.
      power_steps: Products with `GGᵀ` from sketch to basis, as in `range_basis`.
      aligned: Whether the basis consists of singular directions, as in the paper, and
        not of any that span the same space, which takes less time to find. To an
        `inner` that acts on entries, like Adam, or whose state is stored quantised, it
        makes a difference; to plain momentum and orthogonalisation none.
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
      TypeError: If a rank is not a Python number; at `init`, if a leaf is complex.
      ValueError: If a number is out of range; at `init`, if no pattern of `rank`
        matches a matrix, or `inner` stores a field of `reproject` quantised; at
        `update`, if `projected` gradients will not do, or `inner` asks for parameters.
    """
    projection.check_rank(rank)
    _check_arguments(refresh_every, refresh_stagger, adaptive, power_steps)
    if isinstance(momentum_share, int | float) and not 0 <= momentum_share < 1:
        raise ValueError(f"`momentum_share` must lie in [0, 1), got {momentum_share}.")
    inner = optax.with_extra_args_support(inner)
    rest = optax.with_extra_args_support(rest) if rest else None
    combined = Residual(residual, rest, match_norm, scale)
    refresh = Refresh(
        refresh_every,
        refresh_stagger,
        adaptive,
        warm_start,
        momentum_share,
        power_steps,
        aligned,
        seed,
    )
    if projector_cost is None:
        projector_cost = jnp.dtype(projector_dtype).itemsize / 4

    def first_basis(x: Array, wanted: int) -> Array | None:
        r = projection.projected_rank(x.shape, wanted, projector_cost, min_saving)
        if r is None:
            return None
        short = min(x.shape[-2:])
        # Orthonormal from the start: the first gradient may be zero.
        basis = jnp.eye(short, r, dtype=projector_dtype)
        return jnp.broadcast_to(basis, (*x.shape[:-2], short, r))

    def init_fn(params: optax.Params) -> GaloreState:
        checks.require_real(params, "galore")
        ranks = projection.ranks(params, rank)
        projector = jax.tree.map(first_basis, params, ranks)
        zeros = lambda x, p: jnp.zeros(projection.low_rank_shape(x, p), jnp.float32)
        inner_state = inner.init(jax.tree.map(zeros, params, projector))
        _require_plain(inner_state, params, reproject)
        memory = adaptive.init(projector, refresh_every) if adaptive else None
        count, rest_state = jnp.zeros([], jnp.int32), combined.init(params, projector)
        return GaloreState(count, projector, inner_state, memory, rest_state)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        projected: bool = False,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaloreState]:
        checks.require_state(state, GaloreState, "galore")
        whole: Any = updates
        renewal = {}
        if projected:
            _require_published(combined, adaptive, params)
            whole = params
        else:
            state, renewal = bases.change_bases(refresh, reproject, updates, state)
        beside = lambda path, g, p: placement.beside(p, path, g)
        projector = jax.tree.map_with_path(beside, whole, state.projector)
        if projected:
            low_rank = optax.tree.cast(updates, jnp.float32)
        else:
            low_rank = jax.tree.map(projection.project, updates, projector)
        inner_updates, inner_state = checks.update_without_params(
            inner, low_rank, state.inner, "inner", extra_args
        )
        new_updates, rest_state = combined.combine(
            whole, low_rank, inner_updates, projector, state.rest, extra_args
        )
        new_state = state._replace(
            count=jnp.asarray(optax.safe_increment(state.count)),
            inner=inner_state,
            adaptive=bases.observe(refresh, state, updates, low_rank, renewal),
            rest=rest_state,
        )
        return precision.cast_like(new_updates, updates), new_state

    return optax.GradientTransformationExtraArgs(
        init_fn, placement.in_auto_mode(update_fn)
    )


def _check_arguments(
    refresh_every: int,
    refresh_stagger: bool,
    adaptive: Adaptive | None,
    power_steps: int,
) -> None:
    if refresh_every < 1:
        raise ValueError(f"`refresh_every` must be at least 1, got {refresh_every=}.")
    if refresh_stagger and adaptive:
        raise ValueError(
            "`refresh_stagger` and `adaptive` both decide when a leaf is refreshed. "
            "Give one of them."
        )
    if power_steps < 1:
        raise ValueError(f"`power_steps` must be at least 1, got {power_steps=}.")


def _require_published(
    residual: Residual, adaptive: Adaptive | None, params: optax.Params | None
) -> None:
    if not residual.is_zero or adaptive or params is None:
        raise ValueError(
            "`galore` takes `projected` gradients with `residual=0`, without "
            f"`adaptive` and with `params`, got residual={residual.weight}, "
            f"adaptive={adaptive}, params {'absent' if params is None else 'given'}. "
            "Give it the whole gradients."
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
