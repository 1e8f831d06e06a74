"""Rules for when the bases of `galore` are computed, and how."""

import dataclasses
from typing import Protocol

import jax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from nanochat_jax.numerics import POWER_ITERATIONS, range_basis


class Basis(Protocol):
    """Rule by which `galore` computes a basis of the shorter axis of each matrix.

    Both methods are traced. `galore` computes every basis at the first step, keeps a
    basis while its gradient is zero or not finite, and moves first moments to the new
    one. `RandomizedSVD` is the rule of the paper; a rule of one's own often derives
    from it.

    Example:
      >>> class WarmStart(RandomizedSVD):  # one power iteration from the basis before
      ...     def find(self, gradient, basis, momentum, key):
      ...         sketch = gradient @ (gradient.mT @ basis)
      ...         return jnp.linalg.qr(sketch).Q
      >>> tx = galore(momentum(), rank=8, basis=WarmStart(refresh_every=10))
      >>> params = {"kernel": jnp.ones((32, 64))}
      >>> updates, state = tx.update(params, tx.init(params))

    A rule may have an attribute `seed`, from which the keys of `find` follow; it is 0
    otherwise.
    """

    def is_due(
        self,
        count: Int32[Array, ""],
        path: str,
        gradient: Float[Array, "*batch short long"],
        basis: Float[Array, "*batch short r"],
    ) -> Bool[Array, ""]:
        """Returns whether to compute the basis of a leaf at this step.

        Args:
          count: Steps taken.
          path: Path of the leaf, as `jax.tree_util.keystr` has it.
          gradient: Its gradient, shorter axis first.
          basis: Its basis so far.
        """
        ...

    def find(
        self,
        gradient: Float[Array, "*batch short long"],
        basis: Float[Array, "*batch short r"],
        momentum: Float[Array, "*batch short long"] | None,
        key: PRNGKeyArray,
    ) -> Float[Array, "*batch short r"]:
        """Returns a new basis, with orthonormal columns.

        Args:
          gradient: Gradient in float32, its shorter axis first; zero where it is not
            usable.
          basis: Basis so far.
          momentum: First moment in the coordinates of the gradient, if there is one.
          key: Random key, by seed of the rule, step, leaf and place of the matrices
            within it.
        """
        ...


@dataclasses.dataclass(frozen=True)
class RandomizedSVD:
    """Leading directions of the gradient by a randomised SVD, at a fixed interval.

    GaLore 2 (Su et al. 2025), section 4.1; the range finder is that of Halko,
    Martinsson and Tropp 2011, algorithm 4.4.

    Example:
      >>> import zlib
      >>> class Staggered(RandomizedSVD):  # leaves take turns, by a hash of their path
      ...     def is_due(self, count, path, gradient, basis):
      ...         turn = zlib.crc32(path.encode()) % self.refresh_every
      ...         return (count + turn) % self.refresh_every == 0
      >>> tx = galore(momentum(), rank=8, basis=Staggered())

    Attributes:
      refresh_every: Steps between two computations of a basis.
      power_iterations: Products with `GGᵀ` from sketch to basis.
      aligned: Whether the columns are singular directions, as in the paper, and not any
        that span the same space, which takes less time. It matters to an `inner` that
        acts on entries, like Adam, and to moments that are stored quantised.
      seed: Seed of the sketch, which is keyed by seed, step and leaf.
      form_gram: Whether to form `GGᵀ`; by shape if not given. `galore` does not where a
        matrix is on several devices.

    Raises:
      ValueError: If `refresh_every` or `power_iterations` is less than 1.
    """

    refresh_every: int = 200
    power_iterations: int = POWER_ITERATIONS
    aligned: bool = True
    seed: int = 0
    form_gram: bool | None = None

    def __post_init__(self) -> None:
        for name in ("refresh_every", "power_iterations"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")

    def is_due(
        self, count: Int32[Array, ""], path: str, gradient: Array, basis: Array
    ) -> Bool[Array, ""]:
        """Returns whether `count` is a multiple of `refresh_every`."""
        del path, gradient, basis
        return count % self.refresh_every == 0

    def find(
        self,
        gradient: Float[Array, "*batch short long"],
        basis: Float[Array, "*batch short r"],
        momentum: Float[Array, "*batch short long"] | None,
        key: PRNGKeyArray,
    ) -> Float[Array, "*batch short r"]:
        """Returns the leading left singular directions of the gradient."""
        del momentum
        start, seed = jax.random.key_data(key)
        return range_basis(
            gradient,
            basis.shape[-1],
            seed,
            start=start,
            power_iterations=self.power_iterations,
            aligned=self.aligned,
            form_gram=self.form_gram,
        )
