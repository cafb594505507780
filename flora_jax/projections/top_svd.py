"""The leading singular vectors of a gradient."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from flora_jax import _validation as check
from flora_jax._typing import KeyData
from flora_jax.projections.base import AdaptiveProjection
from flora_jax.random.bits import normals

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_OVERSAMPLING = 8


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
        """Raises for an unknown option."""
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
        # Halko et al.'s p: a few more columns than r make the range accurate.
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
