"""Projections that are formed as a matrix, of independent entries or orthogonal."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from flora_jax._typing import KeyData
from flora_jax.projections.base import ObliviousProjection, ScaledIsometry
from flora_jax.random.bits import normals, signs

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class DenseProjection(ObliviousProjection):
    """S is sampled as a matrix, each time that it is used."""

    def sample(self, key: KeyData, rank: int, width: int) -> Any:
        """Returns the key: S of many leaves at once would be as large as the state."""
        del rank, width
        return key


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
class Gaussian(IndependentEntries):
    """S_ij ~ N(0, 1/r), independent: the projection of the FLORA paper.

    E[SᵀS] = I. E‖G SᵀS − G‖² = ((m+1)/r)·‖G‖², and the expected cosine between G and
    its estimate is about 1/√(1 + (m+1)/r). S Sᵀ is not a multiple of I.

    Costs r·m normals and 2·n·m·r floating-point operations for a sketch, as many for an
    estimate, and r·m float32 numbers of temporary memory; nothing is stored.

    Raises:
      ValueError: for ``normalization="isometric"``, which no Gaussian matrix has.

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

    def as_matrix(self, sampled: Any, rank: int, width: int) -> Float[Array, "r m"]:
        """S, float32 of shape (rank, width)."""
        return normals(sampled, (rank, width), 0) * rank**-0.5


@dataclasses.dataclass(frozen=True)
class Rademacher(IndependentEntries):
    """S_ij = ±1/√r, independent: signs in place of the paper's normals.

    E[SᵀS] = I. E‖G SᵀS − G‖² = ((m−1)/r)·‖G‖²: a little less than Gaussian's, as the
    diagonal of SᵀS is 1 without noise. S Sᵀ is not a multiple of I.

    Costs r·m random signs, and products and memory as Gaussian.

    Raises:
      ValueError: for ``normalization="isometric"``, which no matrix of signs has.

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

    def as_matrix(self, sampled: Any, rank: int, width: int) -> Float[Array, "r m"]:
        """S, float32 of shape (rank, width)."""
        return signs(sampled, (rank, width), 0) * rank**-0.5


@dataclasses.dataclass(frozen=True)
class Orthogonal(ScaledIsometry, DenseProjection):
    """√(m/r) times r rows of a uniformly (Haar) random orthogonal m x m matrix.

    Sampled as Q·sign(diag R) of the QR decomposition of m x r normals. S Sᵀ = (m/r)·I
    and E[SᵀS] = I, so that E‖G SᵀS − G‖² = (m/r − 1)·‖G‖², the least that an unbiased
    projection to r rows can have, and √(r/m) is the cosine between G and its estimate.

    Costs r·m normals, their decomposition (about 4·m·r² operations, serial on most
    devices: the slowest projection here) and products as Gaussian.

    Raises:
      ValueError: for an unknown normalization.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flora_jax as fj
      >>> gradient = jnp.ones((4, 64))
      >>> projection = fj.Orthogonal(normalization="isometric")
      >>> projection.sketch(jax.random.key(0), gradient, rank=8, axis=-1).shape
      (4, 8)

    References:
      Mezzadri, `How to generate random matrices from the classical compact groups
      <https://arxiv.org/abs/math-ph/0609050>`_, 2007
    """

    def as_matrix(self, sampled: Any, rank: int, width: int) -> Float[Array, "r m"]:
        """S, float32 of shape (rank, width)."""
        q, r = jnp.linalg.qr(normals(sampled, (width, rank), 0))
        # Without the signs Q is the decomposition's convention, not Haar's measure.
        flips = jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)
        return (q * flips).T * self.row_norm(rank, width)
