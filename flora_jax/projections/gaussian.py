"""Projections that are applied by matrix products with an r x m matrix."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from flora_jax.random.bits import normals, signs
from flora_jax.projections.base import (
    MatrixProjection,
    ObliviousProjection,
    ScaledIsometry,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt32


class DenseProjection(MatrixProjection, ObliviousProjection):
    """S is drawn as a matrix, each time that it is used."""

    def draw(self, key: UInt32[Array, "2"], rank: int, width: int) -> Any:
        """The key itself: matrices of many leaves at once would be a state's size."""
        del rank, width
        return key


class IndependentEntries(DenseProjection):
    """S has independent entries, so that its rows are not orthogonal."""

    def __post_init__(self) -> None:
        """Raises ValueError for a scale that it cannot have."""
        super().__post_init__()
        if self.scale == "isometric":
            raise ValueError(
                f"`scale` of {type(self).__name__} cannot be 'isometric', got"
                " scale='isometric': its rows are not orthogonal; use"
                " Orthogonal(scale='isometric')"
            )

    def gram_diagonal(self, rank: int, width: int) -> None:
        """None: the rows of S are not orthogonal."""
        del rank, width


@dataclasses.dataclass(frozen=True)
class Gaussian(IndependentEntries):
    """S_ij ~ N(0, 1/r), independent: the projection of the FLORA paper.

    E[SᵀS] = I. E‖G SᵀS − G‖² = ((m+1)/r)·‖G‖², and the expected cosine between G and
    its estimate is about 1/√(1 + (m+1)/r). S Sᵀ is not a multiple of I.

    Costs r·m normals and 2·n·m·r floating-point operations for a sketch, as many for an
    estimate, and r·m float32 numbers of temporary memory; nothing is stored.

    Raises:
      ValueError: for ``scale="isometric"``, which no Gaussian matrix has.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flora_jax as fj
      >>> gradient = jnp.ones((4, 64))
      >>> fj.Gaussian().sketch(jax.random.key(0), gradient, rank=8, axis=-1).shape
      (4, 8)

    References:
      Hao et al., `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
      <https://arxiv.org/abs/2402.03293>`_, 2024
    """

    def entries(self, drawn: Any, rank: int, width: int) -> Float[Array, "rank width"]:
        """S, float32 of shape (rank, width)."""
        return normals(drawn, (rank, width), 0) * rank**-0.5


@dataclasses.dataclass(frozen=True)
class Rademacher(IndependentEntries):
    """S_ij = ±1/√r, independent: signs in place of the paper's normals.

    E[SᵀS] = I. E‖G SᵀS − G‖² = ((m−1)/r)·‖G‖²: a little less than Gaussian's, as the
    diagonal of SᵀS is 1 without noise. S Sᵀ is not a multiple of I.

    Costs r·m random signs, and products and memory as Gaussian.

    Raises:
      ValueError: for ``scale="isometric"``, which no matrix of signs has.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flora_jax as fj
      >>> gradient = jnp.ones((4, 64))
      >>> fj.Rademacher().sketch(jax.random.key(0), gradient, rank=8, axis=-1).shape
      (4, 8)

    References:
      Achlioptas, `Database-friendly random projections
      <https://doi.org/10.1016/S0022-0000(03)00025-4>`_, 2003
    """

    def entries(self, drawn: Any, rank: int, width: int) -> Float[Array, "rank width"]:
        """S, float32 of shape (rank, width)."""
        return signs(drawn, (rank, width), 0) * rank**-0.5


@dataclasses.dataclass(frozen=True)
class Orthogonal(ScaledIsometry, DenseProjection):
    """√(m/r) times r rows of a uniformly (Haar) random orthogonal m x m matrix.

    Drawn as Q·sign(diag R) of the QR decomposition of m x r normals. S Sᵀ = (m/r)·I and
    E[SᵀS] = I, so that E‖G SᵀS − G‖² = (m/r − 1)·‖G‖², the least that an unbiased
    projection to r rows can have, and √(r/m) is the cosine between G and its estimate.

    Costs r·m normals, their decomposition (about 4·m·r² operations, serial on most
    devices: the slowest projection here) and products as Gaussian.

    Raises:
      ValueError: for an unknown scale.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flora_jax as fj
      >>> gradient = jnp.ones((4, 64))
      >>> projection = fj.Orthogonal(scale="isometric")
      >>> projection.sketch(jax.random.key(0), gradient, rank=8, axis=-1).shape
      (4, 8)

    References:
      Mezzadri, `How to generate random matrices from the classical compact groups
      <https://arxiv.org/abs/math-ph/0609050>`_, 2007
    """

    def entries(self, drawn: Any, rank: int, width: int) -> Float[Array, "rank width"]:
        """S, float32 of shape (rank, width)."""
        q, r = jnp.linalg.qr(normals(drawn, (width, rank), 0))
        # Without the signs Q is the decomposition's convention, not Haar's measure.
        flips = jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)
        return (q * flips).T * self.row_norm(rank, width)
