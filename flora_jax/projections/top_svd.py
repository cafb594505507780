"""The leading singular vectors of a gradient."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from flora_jax import _validation as check
from flora_jax._typing import KeyData
from flora_jax.projections.base import AdaptiveProjection
from flora_jax.projections.linalg import eigenvectors, orthonormalized, product
from flora_jax.random.bits import normals, random_matrix

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_OVERSAMPLING = 8
_FILL = 1e-8  # Of the largest entry, added as random columns of norm 1.


@dataclasses.dataclass(frozen=True)
class TopSVD(AdaptiveProjection):
    """The r leading singular vectors of a gradient on its sketched side (GaLore).

    ``method="exact"`` is a singular value decomposition in float32: about 6·n·m² +
    20·m³ operations for the smaller side m, mostly serial: the slowest step of this
    library, which a TPU's compiler does not finish in minutes.
    ``method="randomized"`` is ``iterations`` steps of subspace iteration from r random
    columns, or a few more: X ← G GᵀX, turned to the singular vectors of what it has
    found (Rayleigh and Ritz), then made orthonormal; about 4·n·m·r operations a step,
    nearly all of them products. The key decides the vectors' signs; the exact method
    leaves them to the decomposition.

    Stores r·width float32 elements per matrix, also where moments are quantized.

    Attributes:
      normalization: ``"isometric"``: singular vectors are orthonormal.
      method: ``"exact"`` or ``"randomized"``.
      iterations: steps of the randomized method; more of them follow slowly falling
        spectra better.

    Raises:
      TypeError: if ``iterations`` is not an int.
      ValueError: for an unknown method or normalization, or no iteration.

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.galore(1e-2, fj.Sketch(8, fj.TopSVD(method="exact")))

    References:
      Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
      Projection <https://arxiv.org/abs/2403.03507>`_, 2024

      Halko et al., `Finding structure with randomness
      <https://arxiv.org/abs/0909.4061>`_, 2011, Algorithm 4.4
    """

    method: str = "randomized"
    iterations: int = 3

    def __post_init__(self) -> None:
        """Raises for an unknown option."""
        super().__post_init__()
        check.check_choice("method", self.method, ("exact", "randomized"))
        check.check_positive_int("iterations", self.iterations, "3 suits gradients")

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
            matrix = matrix.astype(jnp.float32)
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
        """About the leading left singular vectors, by subspace iteration."""
        # Halko et al.'s p, a few more than r, makes the subspace accurate: as many as
        # the last tile of an accelerator's 128 lanes has room for.
        columns = min(rank + min(_OVERSAMPLING, -rank % 128), *matrix.shape[-2:])
        rows = matrix.shape[-2]
        start = random_matrix(normals, key, (rows, columns)) / rows**0.5
        # For each matrix, varying over the same mesh axes inside of jax.shard_map.
        zeros = jax.lax.full_like(matrix, 0, jnp.float32, (*matrix.shape[:-1], columns))
        start = start + zeros

        def step(_: jax.Array, x: jax.Array) -> jax.Array:
            # Here and not before the loop, which would be given a second copy of G.
            full = matrix.astype(jnp.float32)
            across = product(full, x, -2).swapaxes(-1, -2)
            across = across / _largest(across, (-2, -1))
            # X ← G Gᵀ X, turned so that its columns tend to the singular vectors, of
            # falling singular value (Rayleigh and Ritz), then of norm 1.
            x = product(full, across, -1)
            x = product(x, eigenvectors(product(across, across, -2)), -1)
            # More than rounding where G has fewer directions than there are columns.
            x = x / _largest(x, (-2, -1)) + _FILL * start
            x = x / _largest(x, -2)
            return orthonormalized(x / jnp.linalg.norm(x, axis=-2, keepdims=True))

        x = jax.lax.fori_loop(0, self.iterations, step, start)[..., :rank]
        # Roundings, such as those of another mesh, would choose signs otherwise.
        along_start = jnp.sum(x * start[..., :1], axis=-2, keepdims=True)
        return jnp.where(along_start < 0, -x, x)


def _largest(x: jax.Array, axes: Any) -> jax.Array:
    """The largest magnitude, to divide by: squares of small numbers are zero."""
    return jnp.max(jnp.abs(x), axes, keepdims=True).clip(1e-37)
