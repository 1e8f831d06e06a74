"""Eigenbases that follow a slowly changing matrix: a power step and a QR at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from nanochat_jax.transforms.galore import projection


@dataclasses.dataclass(frozen=True)
class PowerStep:
    """A basis carried on from the one before by one power step, at a fixed interval.

    SOAP (Vyas et al. 2024, arXiv:2409.11321), algorithm 4. The first basis is computed
    by an eigendecomposition; each later one is the orthonormal factor of the product of
    matrix and basis. It is a rule for `precondition`, and for `galore` too, which has a
    `GGᵀ` of the present gradient in place of a moving average.

    Example:
      >>> tx = galore(momentum(), rank=8, basis=PowerStep(refresh_every=20))

    Attributes:
      refresh_every: Steps between two computations of a basis.

    Raises:
      ValueError: If `refresh_every` is less than 1.
    """

    refresh_every: int = 10

    def __post_init__(self) -> None:
        if self.refresh_every < 1:
            raise ValueError(
                f"`refresh_every` must be at least 1, got {self.refresh_every}."
            )

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
    ) -> Float32[Array, "*batch short r"]:
        """Returns the basis after one power step with `GGᵀ`."""
        del momentum, key
        x, rank = _unit(gradient), basis.shape[-1]

        def step() -> Array:
            product = projection.matmul(x, projection.matmul(x.mT, basis))
            return _in_order(product, jnp.sum(basis * product, axis=-2))[0]

        first = lambda: _eigenvectors(projection.matmul(x, x.mT))[..., :rank]
        return _begun(basis, first, step)

    def follow(
        self,
        gram: Float[Array, "*batch s s"],
        basis: Float[Array, "*batch s s"],
    ) -> "Followed":
        """Returns the eigenbasis of a matrix after one power step.

        Directions are put into the order of their present eigenvalues, largest first,
        before they are made orthonormal one after the other.

        Args:
          gram: The symmetric matrix, in the coordinates of the basis. Only what is
            below its diagonal is read.
          basis: Its eigenbasis so far, the identity at the start.
        """
        # Stored in few bits, the rows of small eigenvalues are the more exact ones.
        gram = jnp.tril(gram) + jnp.tril(gram, -1).mT
        x = _unit(gram)

        def first() -> tuple[Array, Array]:
            order = jnp.arange(basis.shape[-1], dtype=jnp.int32)
            return _eigenvectors(x), jnp.broadcast_to(order, basis.shape[:-1])

        def step() -> tuple[Array, Array]:
            return _in_order(x, jnp.diagonal(x, axis1=-2, axis2=-1))

        turn, order = _begun(basis, first, step)
        new = _polished(projection.matmul(basis, turn))
        turned = projection.matmul(turn.mT, projection.matmul(gram, turn))
        return Followed(new, turned, order)


class Followed(NamedTuple):
    """An eigenbasis that has followed its matrix.

    Attributes:
      basis: The new basis.
      gram: The matrix in its coordinates.
      order: For each column, the place of the column of the old basis that it follows.
    """

    basis: Float32[Array, "*batch s s"]
    gram: Float32[Array, "*batch s s"]
    order: Int32[Array, "*batch s"]


def start(short: int, rank: int) -> Float32[Array, "short rank"]:
    """Returns what stands for a basis before the first one is computed."""
    return jnp.eye(short, rank, dtype=jnp.float32)


def _begun(basis: Array, first: Callable[[], Any], step: Callable[[], Any]) -> Any:
    """Returns `first()` if no basis has been computed yet, else `step()`."""
    eye = start(*basis.shape[-2:])
    # Stored in few bits, the identity comes back nearly so.
    distance = jnp.abs(basis - jnp.broadcast_to(eye, basis.shape))
    return jax.lax.cond(jnp.max(distance) < 1e-2, first, step)


def _in_order(product: Array, eigenvalues: Array) -> tuple[Array, Array]:
    """Returns the orthonormal factor of a product with a basis, and its order."""
    order = jnp.argsort(-eigenvalues, axis=-1, stable=True).astype(jnp.int32)
    columns = jnp.take_along_axis(product, order[..., None, :], axis=-1)
    return jnp.linalg.qr(columns)[0], order


def _polished(basis: Array) -> Array:
    """Returns a nearly orthonormal basis made more so, by a Newton-Schulz step.

    Without it the rounding of a stored basis would add up from one to the next.
    """
    gram = projection.matmul(basis.mT, basis)
    return 1.5 * basis - 0.5 * projection.matmul(basis, gram)


def _eigenvectors(x: Array) -> Array:
    """Returns eigenvectors of symmetric matrices, of the largest eigenvalue first."""
    return jnp.linalg.eigh(x)[1][..., ::-1]


def _unit(x: Array) -> Float32[Array, "*batch m n"]:
    """Returns matrices with a largest entry of one; zero stays zero."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0)
    return x / jnp.where(largest > 0, largest, 1)
