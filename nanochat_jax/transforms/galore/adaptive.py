"""When adaptive `galore` renews the basis of a leaf: by what its gradients do."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32


class AdaptiveState(NamedTuple):
    """What is remembered: trees like the parameters of scalars, or scalars of one leaf.

    Attributes:
      captured: Average share of the gradient's energy within the basis.
      fresh: That share when the basis was new; negative until it is known.
      interval: Steps between two changes.
      due: Step of the next change.
    """

    captured: Any
    fresh: Any
    interval: Any
    due: Any


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """How the refreshing of a basis follows what its gradients do.

    A basis is renewed early when it captures less of the gradient than it did when it
    was new, and less often when the space it spans hardly changes, as in Q-GaLore
    (Zhang et al. 2024, section 3.2).

    Attributes:
      drop: A basis is renewed when the share of the gradient's energy within it is less
        than this fraction of what it was.
      still: An overlap of two bases, `‖P_newᵀP_old‖² / r`, of at least this much
        doubles the interval; one of less sets it to `refresh_every` again.
      longest: Longest interval over `refresh_every`.
      shortest: Least age at which a basis is renewed early, over `refresh_every`.
      decay: Decay of the average of the captured share.

    Raises:
      ValueError: If a number is out of range.
    """

    drop: float = 0.75
    still: float = 0.6
    longest: int = 4
    shortest: float = 0.25
    decay: float = 0.9

    def __post_init__(self) -> None:
        allowed = {
            "drop": 0 <= self.drop <= 1,
            "still": 0 <= self.still <= 1,
            "longest": self.longest >= 1,
            "shortest": 0 < self.shortest <= 1,
            "decay": 0 <= self.decay < 1,
        }
        wrong = [f"{key}={getattr(self, key)}" for key, ok in allowed.items() if not ok]
        if wrong:
            raise ValueError(
                "`drop` and `still` must lie in [0, 1], `shortest` in (0, 1], `decay` "
                f"in [0, 1), and `longest` must be at least 1, got {', '.join(wrong)}."
            )

    def init(self, like: Any, refresh_every: int) -> AdaptiveState:
        """Returns what is remembered of the leaves of `like` before the first step."""
        # An array for each leaf, since one that serves two cannot be donated.
        fill = lambda value, dtype: jax.tree.map(
            lambda _: jnp.full([], value, dtype), like
        )
        return AdaptiveState(
            fill(-1.0, jnp.float32),
            fill(-1.0, jnp.float32),
            fill(refresh_every, jnp.int32),
            fill(0, jnp.int32),
        )

    def is_due(
        self, memory: AdaptiveState, count: Int32[Array, ""], refresh_every: int
    ) -> Bool[Array, ""]:
        """Returns whether the basis of a leaf is to be renewed at step `count`."""
        age = count - (memory.due - memory.interval)
        known = memory.fresh >= 0
        fallen = known & (memory.captured < self.drop * memory.fresh)
        early = fallen & (age >= math.ceil(self.shortest * refresh_every))
        return (count >= memory.due) | early

    def observe(
        self,
        memory: AdaptiveState,
        count: Int32[Array, ""],
        refresh_every: int,
        renewed: Bool[Array, ""],
        overlap: Float32[Array, ""],
        share: Float32[Array, ""],
    ) -> AdaptiveState:
        """Returns what to remember of a leaf after step `count`.

        Args:
          memory: What is remembered of it.
          count: Steps taken before this one.
          refresh_every: The interval to begin with.
          renewed: Whether its basis was renewed at this step.
          overlap: If so, share of the basis before that the new one spans.
          share: Share of its gradient's energy within the basis; what is no share, as
            of a gradient of zeros, is left out.
        """
        captured, fresh, interval, due = memory
        share = jnp.where(jnp.isfinite(share) & (share >= 0), share, captured)
        average = self.decay * captured + (1 - self.decay) * share
        known = fresh >= 0
        # A basis flatters the gradient it is made from: the next one is the first fair.
        captured = jnp.where(renewed, -1.0, jnp.where(known, average, share))
        fresh = jnp.where(renewed, -1.0, jnp.where(known, fresh, share))
        longer = jnp.minimum(2 * interval, self.longest * refresh_every)
        # That before the first basis says nothing.
        stands = (overlap >= self.still) & (count > 0)
        longer = jnp.where(stands, longer, refresh_every)
        interval = jnp.where(renewed, longer, interval)
        return AdaptiveState(
            captured, fresh, interval, jnp.where(renewed, count + interval, due)
        )
