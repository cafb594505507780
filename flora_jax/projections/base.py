"""The interface of all projections."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from flora_jax import _validation as check
from flora_jax._typing import KeyData, KeyLike
from flora_jax.projections import tpu_kernel
from flora_jax.projections.linalg import product, product_with_squares
from flora_jax.random.keys import raw_key

if TYPE_CHECKING:
    from jaxtyping import Array, Float

NORMALIZATIONS = ("unbiased", "isometric")


@dataclasses.dataclass(frozen=True)
class Projection(abc.ABC):
    """A matrix S (rank x width) that takes one side of a gradient to its sketch.

    Instances are static settings: frozen, hashable and deliberately not callable
    (``optax.inject_hyperparams`` takes every callable argument for a schedule). Where S
    comes from is a subclass's matter: :class:`ObliviousProjection` regenerates it from
    a key, :class:`~flora_jax.AdaptiveProjection` reads it from what it chose and
    stored. Either gives ``sampled``, a tree of arrays that determines S, and the
    methods here apply it: by products with the matrix S, unless a subclass knows a
    faster way.

    Attributes:
      normalization: ``"unbiased"``: E[SᵀS] = I, so that ``expand(compress(G))`` is an
        unbiased estimate of G. ``"isometric"``: S Sᵀ = I, so that it is the orthogonal
        projection of G, which shrinks it. None: that of the recipe which uses the
        projection; ``"unbiased"`` where it is used by itself.
    """

    normalization: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown normalization."""
        if self.normalization is not None:
            check.check_choice("normalization", self.normalization, NORMALIZATIONS)

    def normalized_as(self, other: Projection) -> Projection:
        """This projection, with the normalization of another if it has none."""
        if self.normalization is not None:
            return self
        return dataclasses.replace(self, normalization=other.normalization)

    def compress(
        self,
        sampled: Any,
        matrix: Float[Array, "*batch n m"],
        rank: int,
        axis: int,
        weights: Float[Array, "*batch m"] | None = None,
    ) -> Float[Array, "*batch _ _"]:
        """Sketches one side of a matrix: G Sᵀ for axis -1, S G for axis -2.

        Args:
          sampled: what determines S.
          matrix: shape (batch…, n, m), of any float dtype; arithmetic is in float32.
          rank: r.
          axis: the side to sketch, -1 or -2.
          weights: float32, of the size of that side (and batch axes, or ones): S times
            this diagonal matrix is applied in place of S.

        Returns:
          Float32, shape (batch…, n, r) or (batch…, r, m).
        """
        s = self.as_matrix(sampled, rank, matrix.shape[axis])
        return product(matrix, s.swapaxes(-1, -2), axis, weights)

    def compress_with_squares(
        self,
        sampled: Any,
        matrix: Float[Array, "*batch n m"],
        rank: int,
        axis: int,
        weights: Float[Array, "*batch m"] | None = None,
    ) -> tuple[Float[Array, "*batch _ _"], Float[Array, "*batch _ _"]]:
        """The sketch, and sums of squares along the sketched side of what is sketched.

        What optimizers scale or clip by; on a single TPU both come of one pass over G.

        Args:
          sampled: as for :meth:`compress`.
          matrix: likewise.
          rank: likewise.
          axis: likewise.
          weights: likewise; they multiply G before it is squared.

        Returns:
          The sketch, and a float32 array of shape (batch…, n, 1) or (batch…, 1, m).
        """
        return jax.lax.platform_dependent(
            self.as_matrix(sampled, rank, matrix.shape[axis]),
            matrix,
            weights,
            tpu=functools.partial(tpu_kernel.product_with_squares, axis=axis),
            default=functools.partial(product_with_squares, axis=axis, weigh_s=True),
        )

    def expand(
        self, sampled: Any, sketch: Float[Array, "*batch _ _"], width: int, axis: int
    ) -> Float[Array, "*batch n m"]:
        """The adjoint of :meth:`compress`: C S for axis -1, Sᵀ C for axis -2.

        Args:
          sampled: what determines S.
          sketch: shape (batch…, n, r) or (batch…, r, m), float32.
          width: size of the sketched side before sketching.
          axis: the sketched side, -1 or -2.

        Returns:
          Float32, shape (batch…, n, m).
        """
        return product(sketch, self.as_matrix(sampled, sketch.shape[axis], width), axis)

    def transfer(
        self, old: Any, new: Any, rank: int, width: int
    ) -> Float[Array, "*batch rank rank"]:
        """S S′ᵀ of two samples: it takes a sketch C = G Sᵀ to C S S′ᵀ."""
        s = self.expand(old, jnp.eye(rank, dtype=jnp.float32), width, -1)
        return self.compress(new, s, rank, -1)

    @abc.abstractmethod
    def as_matrix(self, sampled: Any, rank: int, width: int) -> Float[Array, "... r m"]:
        """S itself."""

    def gram_diagonal(self, rank: int, width: int) -> Float[Array, " rank"] | None:
        """The diagonal of S Sᵀ where that matrix is diagonal for every key, else None.

        Args:
          rank: r.
          width: m.

        Returns:
          Float32, shape (r,), or None if the rows of S are not orthogonal.
        """
        return None


class ObliviousProjection(Projection):
    """A random S, regenerated from a key and never stored.

    It is written as two steps. :meth:`sample` turns a key into the few arrays that
    determine S, for many leaves in one operation; :meth:`Projection.compress` and
    :meth:`Projection.expand` apply S to one matrix.
    """

    def sketch(
        self, key: KeyLike, matrix: Float[Array, "*batch n m"], rank: int, axis: int
    ) -> Float[Array, "*batch _ _"]:
        """Sketches one side of a matrix: G Sᵀ for axis -1, S G for axis -2.

        Args:
          key: typed key or key data; the same key gives the same S on either axis.
          matrix: shape (batch…, n, m), float32; the batch shares one S.
          rank: r, at least 1 and at most the size of the sketched side.
          axis: the side to sketch, -1 or -2.

        Returns:
          Float32, shape (batch…, n, r) or (batch…, r, m).
        """
        sampled = self.sample(jnp.asarray(raw_key(key)), rank, matrix.shape[axis])
        return self.compress(sampled, matrix, rank, axis)

    def unsketch(
        self, key: KeyLike, sketch: Float[Array, "*batch _ _"], width: int, axis: int
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
        sampled = self.sample(jnp.asarray(raw_key(key)), sketch.shape[axis], width)
        return self.expand(sampled, sketch, width, axis)

    def matrix(self, key: KeyLike, rank: int, width: int) -> Float[Array, "rank width"]:
        """S itself, for tests and teaching; optimizers never form it from here."""
        sampled = self.sample(jnp.asarray(raw_key(key)), rank, width)
        return self.as_matrix(sampled, rank, width)

    @abc.abstractmethod
    def sample(self, key: KeyData, rank: int, width: int) -> Any:
        """What a key decides, in a tree of small arrays; mapped over many keys.

        Args:
          key: key data, uint32 of shape (2,).
          rank: r.
          width: m.

        Returns:
          A tree of numeric arrays, O(m) elements, for :meth:`compress` and
          :meth:`expand`.
        """


class ScaledIsometry(ObliviousProjection):
    """S is √(m/r) times orthonormal rows: S Sᵀ = (m/r)·I, or I if isometric."""

    def row_norm(self, rank: int, width: int) -> float:
        """What the orthonormal rows are multiplied by: √(m/r), or 1 if isometric."""
        return 1.0 if self.normalization == "isometric" else (width / rank) ** 0.5

    def gram_diagonal(self, rank: int, width: int) -> Float[Array, " rank"] | None:
        """m/r, or ones if isometric."""
        return jnp.full(rank, self.row_norm(rank, width) ** 2, jnp.float32)


class DenseProjection(ObliviousProjection):
    """S is sampled as a matrix, each time that it is used."""

    def sample(self, key: KeyData, rank: int, width: int) -> Any:
        """Returns the key: S of many leaves at once would be as large as the state."""
        del rank, width
        return key

    def transfer(
        self, old: Any, new: Any, rank: int, width: int
    ) -> Float[Array, "*batch rank rank"]:
        """S S′ᵀ of two samples; see :meth:`Projection.transfer`."""
        return self.compress(new, self.as_matrix(old, rank, width), rank, -1)


@dataclasses.dataclass(frozen=True)
class IndependentEntries(DenseProjection):
    """S has independent entries, so that its rows are not orthogonal."""

    normalization: str | None = "unbiased"

    def __post_init__(self) -> None:
        """Raises ValueError for a normalization that it cannot have."""
        super().__post_init__()
        if self.normalization != "unbiased":
            raise ValueError(
                f"`normalization` of {type(self).__name__} must be 'unbiased', got"
                f" normalization={self.normalization!r}: its rows are not orthogonal;"
                " use Orthogonal(normalization='isometric')"
            )


@dataclasses.dataclass(frozen=True)
class AdaptiveProjection(Projection):
    """An orthonormal S that is chosen from a gradient, and kept in the state.

    Each matrix of a stacked leaf has its own. What is kept is an array with the folded
    gradient's axes: one of its sides, or both, have other sizes.

    Attributes:
      normalization: ``"isometric"``.
      dtype: of what is kept.
    """

    dtype: ClassVar[Any] = jnp.float32

    normalization: str | None = "isometric"

    def __post_init__(self) -> None:
        """Raises ValueError for another normalization."""
        check.check_choice("normalization", self.normalization, ("isometric",))

    @abc.abstractmethod
    def stored_sizes(self, rank: int) -> tuple[int | None, int]:
        """Sizes of the sketched and the other side of what is kept; None: as it is."""

    @abc.abstractmethod
    def directions(self, sketched: int, other: int) -> int:
        """How many rows S can have for a matrix with sides of these sizes."""

    @abc.abstractmethod
    def choose(
        self, key: KeyData, matrix: Float[Array, "*batch n m"], rank: int, axis: int
    ) -> Array:
        """What is kept of the basis that suits a matrix.

        Args:
          key: key data, uint32 of shape (2,), for choices that are random.
          matrix: shape (batch…, n, m), of a floating dtype.
          rank: r.
          axis: the sketched side, -1 or -2.

        Returns:
          Shape (batch…, n, m) with the sides that :meth:`stored_sizes` names changed.
        """

    @abc.abstractmethod
    def from_stored(self, stored: Array, axis: int) -> Any:
        """From what :meth:`choose` gave to what :meth:`compress` takes."""

    def gram_diagonal(self, rank: int, width: int) -> Float[Array, " rank"]:
        """Ones: the rows of S are orthonormal."""
        del width
        return jnp.ones(rank, jnp.float32)
