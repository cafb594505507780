"""The rows of the cosine transform in which a gradient is largest."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax import _validation as check
from flora_jax._typing import KeyData
from flora_jax.leaves.mesh import sharded_along
from flora_jax.projections.base import AdaptiveProjection
from flora_jax.projections.linalg import product

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

_MAX_WIDTH = 46340  # i·(2j+1) < 2·width² has to fit in 32 bits.


@dataclasses.dataclass(frozen=True)
class TopDCT(AdaptiveProjection):
    """The r rows of the cosine transform in which a gradient is largest.

    Q_ij = √(2/N)·cos(π i (2j+1) / 2N) for the width N, row 0 times √½: orthonormal, the
    same for all leaves of a width and computed where it is needed. S is the r rows of Q
    for which the transformed gradient has the largest norm; their indices are kept in
    ascending order.

    Choosing costs 2·n·m·N operations and 4·N² bytes of temporary memory: a product with
    Q. A fast Fourier transform took as long at N = 768 (47 and 30 ms along rows and
    columns against 25 and 31) and about half as long at 1600 (191 and 156 against 270
    and 304; two CPU cores), but a product leaves a sharded side sharded. Applying S
    costs as much as any matrix of r rows. Stores r int32 indices per matrix.
    By their compilers a step that chooses anew, as :func:`flora_jax.dct_adamw` does by
    default, takes at least 4 times as long as AdamW's on a v5e, 7 times on an H100.

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
        """Raises for an unknown option."""
        super().__post_init__()
        check.check_choice("norm", self.norm, ("l1", "l2"))

    def stored_sizes(self, rank: int) -> tuple[int, int]:
        """Indices of rows of Q: r along the sketched side."""
        return rank, 1

    def directions(self, sketched: int, other: int) -> int:
        """Rows of Q."""
        del other
        return sketched

    def choose(
        self, key: KeyData, matrix: Float[Array, "*batch n m"], rank: int, axis: int
    ) -> Int32[Array, "*batch _ _"]:
        """Indices of rows of Q, (batch…, 1, r) for axis -1 or (batch…, r, 1) for -2."""
        del key
        width, other = matrix.shape[axis], -3 - axis
        matrix = sharded_along(matrix, other, unsharded=axis)
        everything = _cosines(jnp.arange(width, dtype=jnp.int32), width)
        transformed = product(matrix.astype(jnp.float32), everything.T, axis)
        power = jnp.abs if self.norm == "l1" else jnp.square
        norms = power(transformed).sum(other)
        rows = jnp.sort(jax.lax.top_k(norms, rank)[1].astype(jnp.int32))
        return jnp.expand_dims(rows, other)

    def from_stored(
        self, stored: Int32[Array, "*batch _ _"], axis: int
    ) -> Int32[Array, "*batch rank"]:
        """The indices of S's rows in Q."""
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
    # Reduced as an integer, modulo a full turn: float32 would lose large angles.
    turns = (rows.astype(jnp.uint32)[..., None] * odd) % np.uint32(4 * width)
    values = jnp.cos(turns.astype(jnp.float32) * np.float32(math.pi / (2 * width)))
    lengths = jnp.where(rows == 0, width**-0.5, (2 / width) ** 0.5)
    return values * lengths[..., None].astype(jnp.float32)
