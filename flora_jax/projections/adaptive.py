"""Orthonormal bases that are chosen from a gradient, and kept in the state."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax import _validation as check
from flora_jax._typing import KeyData
from flora_jax.leaves.mesh import sharded_along
from flora_jax.projections.base import Projection, product
from flora_jax.random.bits import normals

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

_OVERSAMPLING = 8
_MAX_WIDTH = 46340  # i·(2j+1) < 2·width² has to fit in 32 bits.


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
          matrix: shape (batch…, n, m), float32.
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


@dataclasses.dataclass(frozen=True)
class TopSVD(AdaptiveProjection):
    """The r leading singular vectors of a gradient on its sketched side (GaLore).

    ``method="exact"`` is a singular value decomposition in float32: about 6·n·m² +
    20·m³ operations for the smaller side m, mostly serial: the slowest step of this
    library. ``method="randomized"`` finds the range of G Ω, Ω of r + 8 random columns,
    after ``iterations`` power iterations, and decomposes G there: about
    4·(iterations + 1)·n·m·(r + 8) operations, most of them products. Singular vectors
    come with the signs that the decomposition gives them.

    Stores r·width float32 elements per matrix, also where moments are quantized.

    Attributes:
      normalization: ``"isometric"``: singular vectors are orthonormal.
      method: ``"exact"`` or ``"randomized"``.
      iterations: power iterations of the randomized method; more of them follow slowly
        falling spectra better.

    Raises:
      TypeError: if ``iterations`` is not an int.
      ValueError: for an unknown method or normalization, or no iteration.

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.galore(1e-2, fj.Sketch(8, fj.TopSVD(method="randomized")))

    References:
      Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
      Projection <https://arxiv.org/abs/2403.03507>`_, 2024

      Halko et al., `Finding structure with randomness
      <https://arxiv.org/abs/0909.4061>`_, 2011, Algorithms 4.4 and 5.1
    """

    method: str = "exact"
    iterations: int = 2

    def __post_init__(self) -> None:
        """Raises on a choice that it does not have."""
        super().__post_init__()
        check.check_choice("method", self.method, ("exact", "randomized"))
        check.check_positive_int("iterations", self.iterations, "2 suits gradients")

    def stored_sizes(self, rank: int) -> tuple[None, int]:
        """S or Sᵀ: the other side becomes r."""
        return None, rank

    def directions(self, sketched: int, other: int) -> int:
        """The number of singular vectors."""
        return min(sketched, other)

    def choose(
        self, key: KeyData, matrix: Float[Array, "*batch n m"], rank: int, axis: int
    ) -> Float[Array, "*batch _ _"]:
        """Singular vectors, (batch…, r, m) for axis -1 or (batch…, n, r) for -2."""
        if self.method == "exact":
            left, _, right = jnp.linalg.svd(matrix, full_matrices=False)
            return left[..., :rank] if axis == -2 else right[..., :rank, :]
        if axis == -1:
            matrix = matrix.swapaxes(-1, -2)
        left = self._leading(key, matrix, rank)
        return left if axis == -2 else left.swapaxes(-1, -2)

    def from_stored(
        self, stored: Float[Array, "*batch _ _"], axis: int
    ) -> Float[Array, "*batch rank width"]:
        """S."""
        return stored if axis == -1 else stored.swapaxes(-1, -2)

    def as_matrix(self, sampled: Any, rank: int, width: int) -> Float[Array, "... r m"]:
        """S, which is what :meth:`from_stored` gives."""
        del rank, width
        return sampled

    def _leading(
        self, key: KeyData, matrix: Float[Array, "*batch n m"], rank: int
    ) -> Float[Array, "*batch n rank"]:
        """About the leading left singular vectors, by a randomized range finder."""
        columns = min(rank + _OVERSAMPLING, *matrix.shape[-2:])
        across = matrix.swapaxes(-1, -2)

        times = functools.partial(jnp.matmul, precision="highest")

        def orthonormal(x: jax.Array) -> jax.Array:
            return jnp.linalg.qr(x).Q

        basis = orthonormal(times(matrix, normals(key, (matrix.shape[-1], columns), 0)))
        for _ in range(self.iterations):
            # Orthonormal between the products: powers of G lose the small directions.
            basis = orthonormal(times(matrix, orthonormal(times(across, basis))))
        small = jnp.linalg.qr(times(across, basis), mode="r")
        # Its right singular vectors are those of G's part in the basis on the left.
        _, _, rotation = jnp.linalg.svd(small, full_matrices=False)
        return times(basis, rotation[..., :rank, :].swapaxes(-1, -2))


@dataclasses.dataclass(frozen=True)
class TopDCT(AdaptiveProjection):
    """The r rows of the cosine transform in which a gradient is largest.

    Q_ij = √(2/N)·cos(π i (2j+1) / 2N) for the width N, row 0 times √½: orthonormal, the
    same for all leaves of a width and computed where it is needed. S is the r rows of Q
    for which the transformed gradient has the largest norm; their numbers are kept in
    ascending order.

    Choosing costs 2·n·m·N operations and 4·N² bytes of temporary memory: a product with
    Q. A fast Fourier transform took as long at N = 768 (47 and 30 ms along rows and
    columns against 25 and 31) and about half as long at 1600 (191 and 156 against 270
    and 304; two CPU cores), but a product leaves a sharded side sharded. Applying S
    costs as much as any matrix of r rows. Stores r int32 numbers per matrix.

    Attributes:
      normalization: ``"isometric"``: the cosines are orthonormal.
      norm: ``"l1"`` or ``"l2"``, of the transformed gradient along the other side.

    Raises:
      ValueError: for an unknown norm or normalization; from update, for widths above
        46340.

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.dct_adamw(1e-3, fj.Sketch(8, fj.TopDCT(norm="l2")))

    References:
      `SVD-Free Low-Rank Adaptive Gradient Optimization
      <https://arxiv.org/abs/2505.17967>`_, 2025
    """

    dtype: ClassVar[Any] = jnp.int32

    norm: str = "l1"

    def __post_init__(self) -> None:
        """Raises on a choice that it does not have."""
        super().__post_init__()
        check.check_choice("norm", self.norm, ("l1", "l2"))

    def stored_sizes(self, rank: int) -> tuple[int, int]:
        """Numbers of rows of Q: r along the sketched side."""
        return rank, 1

    def directions(self, sketched: int, other: int) -> int:
        """Rows of Q."""
        del other
        return sketched

    def choose(
        self, key: KeyData, matrix: Float[Array, "*batch n m"], rank: int, axis: int
    ) -> Int32[Array, "*batch _ _"]:
        """Numbers of rows of Q, (batch…, 1, r) for axis -1 or (batch…, r, 1) for -2."""
        del key
        width, other = matrix.shape[axis], -3 - axis
        matrix = sharded_along(matrix, other, unsharded=axis)
        everything = _cosines(jnp.arange(width, dtype=jnp.int32), width)
        transformed = product(matrix, everything.T, axis)
        power = jnp.abs if self.norm == "l1" else jnp.square
        norms = power(transformed).sum(other)
        rows = jnp.sort(jax.lax.top_k(norms, rank)[1].astype(jnp.int32))
        return jnp.expand_dims(rows, other)

    def from_stored(
        self, stored: Int32[Array, "*batch _ _"], axis: int
    ) -> Int32[Array, "*batch rank"]:
        """The numbers of S's rows in Q."""
        return stored.squeeze(-3 - axis)

    def as_matrix(self, sampled: Any, rank: int, width: int) -> Float[Array, "... r m"]:
        """S, float32."""
        del rank
        return _cosines(sampled, width)

    def transfer(
        self, old: Any, new: Any, rank: int, width: int
    ) -> Float[Array, "*batch rank rank"]:
        """1 where an old row is a new one, else 0: exactly what S S′ᵀ is."""
        del rank, width
        return (old[..., :, None] == new[..., None, :]).astype(jnp.float32)


def _cosines(
    rows: Int32[Array, "*batch rank"], width: int
) -> Float[Array, "*batch rank width"]:
    """Rows of the orthonormal DCT-II of a width."""
    if width > _MAX_WIDTH:
        raise ValueError(
            f"`projection` TopDCT takes sides up to {_MAX_WIDTH}, got a side of"
            f" {width}; leave the leaf out with `mask`, or sketch its other side"
        )
    odd = 2 * jnp.arange(width, dtype=jnp.uint32) + 1
    # Of a whole number of quarter turns: float32 would lose large angles.
    turns = (rows.astype(jnp.uint32)[..., None] * odd) % np.uint32(4 * width)
    values = jnp.cos(turns.astype(jnp.float32) * np.float32(math.pi / (2 * width)))
    lengths = jnp.where(rows == 0, width**-0.5, (2 / width) ** 0.5)
    return values * lengths[..., None].astype(jnp.float32)
