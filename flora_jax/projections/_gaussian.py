"""The paper's projection: independent normals."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import chex
import jax
import jax.numpy as jnp

from flora_jax.projections._base import Projection

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Gaussian(Projection):
    """S_ij ~ N(0, 1/r), independent: the projection of the FLORA paper.

    E[SᵀS] = I. E‖G SᵀS − G‖² = ((m+1)/r)·‖G‖², and the expected cosine between G and
    its estimate is about 1/√(1 + (m+1)/r). S Sᵀ is not a multiple of I.

    Costs r·m normals and 2·n·m·r multiply-adds for a sketch, and r·m float32 numbers
    of temporary memory; nothing is stored.

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

    def __post_init__(self) -> None:
        """Raises ValueError for a scale that it cannot have."""
        super().__post_init__()
        if self.scale == "isometric":
            raise ValueError(
                "`scale` of Gaussian cannot be 'isometric', got scale='isometric': its"
                " rows are not orthogonal; use CountSketch(scale='isometric')"
            )

    def sketch(
        self,
        key: PRNGKeyArray,
        matrix: Float[Array, "*batch n m"],
        rank: int,
        axis: int,
    ) -> Float[Array, "*batch _ _"]:
        """G Sᵀ or S G; see :meth:`Projection.sketch`."""
        s = self.matrix(key, rank, matrix.shape[axis])
        return _product(matrix, s.T, axis)

    def unsketch(
        self,
        key: PRNGKeyArray,
        sketch: Float[Array, "*batch _ _"],
        width: int,
        axis: int,
    ) -> Float[Array, "*batch n m"]:
        """C S or Sᵀ C; see :meth:`Projection.unsketch`."""
        s = self.matrix(key, sketch.shape[axis], width)
        return _product(sketch, s, axis)

    def matrix(
        self, key: PRNGKeyArray, rank: int, width: int
    ) -> Float[Array, "rank width"]:
        """S, float32 of shape (rank, width)."""
        return jax.random.normal(key, (rank, width), jnp.float32) * rank**-0.5

    def gram_diagonal(self, rank: int, width: int) -> Float[Array, " rank"] | None:
        """None: the rows of S are not orthogonal."""
        return None


def _product(x: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """X R for axis -1, Rᵀ X for axis -2, in full float32 on every device."""
    chex.assert_axis_dimension(x, axis, right.shape[0])
    # Accelerators multiply float32 in bfloat16 or TF32 unless told otherwise.
    subscripts = "...nm,mr->...nr" if axis == -1 else "...nm,nr->...rm"
    return jnp.einsum(subscripts, x, right, precision=jax.lax.Precision.HIGHEST)
