"""The interface of all projections."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING

import jax

from flora_jax import _checks

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

SCALES = ("unbiased", "isometric")


@dataclasses.dataclass(frozen=True)
class Projection(abc.ABC):
    """A random matrix S (rank x width), regenerated from a key and never stored.

    Instances are static settings: frozen, hashable and deliberately not callable
    (``optax.inject_hyperparams`` takes every callable argument for a schedule).

    Attributes:
      scale: ``"unbiased"``: E[SᵀS] = I, so that ``unsketch(sketch(G))`` is an unbiased
        estimate of G. ``"isometric"``: S Sᵀ = I, so that it is the orthogonal
        projection of G, which shrinks it.
    """

    scale: str = "unbiased"

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown scale."""
        _checks.check_choice("scale", self.scale, SCALES)

    @abc.abstractmethod
    def sketch(
        self,
        key: PRNGKeyArray,
        matrix: Float[Array, "*batch n m"],
        rank: int,
        axis: int,
    ) -> Float[Array, "*batch _ _"]:
        """Sketches one side of a matrix: G Sᵀ for axis -1, S G for axis -2.

        Args:
          key: typed key; the same key gives the same S on either axis.
          matrix: shape (batch…, n, m), float32; the batch shares one S.
          rank: r, at least 1 and at most the size of the sketched side.
          axis: the side to sketch, -1 or -2.

        Returns:
          Float32, shape (batch…, n, r) or (batch…, r, m).
        """

    @abc.abstractmethod
    def unsketch(
        self,
        key: PRNGKeyArray,
        sketch: Float[Array, "*batch _ _"],
        width: int,
        axis: int,
    ) -> Float[Array, "*batch n m"]:
        """The adjoint of :meth:`sketch`: C S for axis -1, Sᵀ C for axis -2.

        Args:
          key: the key that the sketch was made with.
          sketch: shape (batch…, n, r) or (batch…, r, m), float32.
          width: size of the sketched side before sketching.
          axis: the sketched side, -1 or -2.

        Returns:
          Float32, shape (batch…, n, m).
        """

    @abc.abstractmethod
    def matrix(
        self, key: PRNGKeyArray, rank: int, width: int
    ) -> Float[Array, "rank width"]:
        """S itself, for tests and teaching; optimizers never form it from here."""

    @abc.abstractmethod
    def gram_diagonal(self, rank: int, width: int) -> Float[Array, " rank"] | None:
        """The diagonal of S Sᵀ where that matrix is diagonal for every key, else None.

        Args:
          rank: r.
          width: m.

        Returns:
          Float32, shape (r,), or None if the rows of S are not orthogonal.
        """


def along(vector: jax.Array, axis: int) -> jax.Array:
    """Reshapes a vector so that it broadcasts along an axis of a matrix."""
    return vector if axis == -1 else vector[:, None]
