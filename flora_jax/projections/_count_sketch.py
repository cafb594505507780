"""A sketch without matrix products: signed sums over buckets."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import chex
import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.projections._base import Projection, along

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

_UNROLL = 8  # Chunks per loop body: full unrolling of many chunks compiles for long.


@dataclasses.dataclass(frozen=True)
class CountSketch(Projection):
    """Deals the m columns to r buckets at random, and sums each with random signs.

    A random permutation deals the columns round-robin (bucket = position mod r), so
    that bucket sizes differ by at most one. E[SᵀS] = I, and with t = m mod r

      E‖G SᵀS − G‖² = (m/r − 1 + t(r−t)/(r m))·‖G‖².

    S Sᵀ is the diagonal matrix of the bucket sizes, (m/r)·I if r divides m: then it is
    a scaled isometry with the variance of a Haar-orthogonal projection, √(r/m) being
    the cosine between G and its estimate.

    Costs one signed grouped sum over G for a sketch and one gather for its inverse, no
    r x m matrix and no matrix product; 2·m integers are drawn, nothing is stored.

    Raises:
      ValueError: for an unknown scale.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flora_jax as fj
      >>> gradient = jnp.ones((4, 64))
      >>> fj.CountSketch().sketch(jax.random.key(0), gradient, rank=8, axis=-1).shape
      (4, 8)

    References:
      Charikar et al., `Finding Frequent Items in Data Streams
      <https://doi.org/10.1016/S0304-3975(03)00400-6>`_, 2004
    """

    def sketch(
        self,
        key: PRNGKeyArray,
        matrix: Float[Array, "*batch n m"],
        rank: int,
        axis: int,
    ) -> Float[Array, "*batch _ _"]:
        """G Sᵀ or S G; see :meth:`Projection.sketch`."""
        width = matrix.shape[axis]
        full, tail = divmod(width, rank)
        order, signs = _draw(key, width)

        def chunk(positions: jax.Array) -> jax.Array:
            # One column of each bucket: gathered, signed, and added by the caller.
            taken = jnp.take(matrix, positions, axis=axis)
            return taken * along(signs[positions], axis)

        chunks = order[: full * rank].reshape(full, rank)
        total = jax.lax.fori_loop(
            1,
            full,
            lambda i, total: total + chunk(chunks[i]),
            chunk(chunks[0]),
            unroll=_UNROLL,
        )
        if tail:
            rest = chunk(order[full * rank :])
            pad = [(0, 0)] * rest.ndim
            pad[axis] = (0, rank - tail)
            total = total + jnp.pad(rest, pad)
        return total * along(self._row_scale(rank, width), axis)

    def unsketch(
        self,
        key: PRNGKeyArray,
        sketch: Float[Array, "*batch _ _"],
        width: int,
        axis: int,
    ) -> Float[Array, "*batch n m"]:
        """C S or Sᵀ C; see :meth:`Projection.unsketch`."""
        rank = sketch.shape[axis]
        order, signs = _draw(key, width)
        scaled = sketch * along(self._row_scale(rank, width), axis)
        return jnp.take(scaled, _buckets(order, rank), axis=axis) * along(signs, axis)

    def matrix(
        self, key: PRNGKeyArray, rank: int, width: int
    ) -> Float[Array, "rank width"]:
        """S, float32 of shape (rank, width)."""
        order, signs = _draw(key, width)
        one_hot = jax.nn.one_hot(_buckets(order, rank), rank, axis=0)
        return one_hot * signs * self._row_scale(rank, width)[:, None]

    def gram_diagonal(self, rank: int, width: int) -> Float[Array, " rank"] | None:
        """The bucket sizes, or ones for the isometric scale."""
        return _bucket_sizes(rank, width) * self._row_scale(rank, width) ** 2

    def _row_scale(self, rank: int, width: int) -> jax.Array:
        if self.scale == "isometric":
            return _bucket_sizes(rank, width) ** -0.5
        return jnp.ones(rank, jnp.float32)


def _draw(key: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """A random order of the columns (int32) and a random sign for each (float32)."""
    chex.assert_rank(key, 0)
    order_key, sign_key = jax.random.split(key)
    # Sorting random words pins the permutation to the key's bits: jax.random's own may
    # change with its version, and a checkpoint must decode for ever.
    order = jnp.argsort(jax.random.bits(order_key, (width,), jnp.uint32), stable=True)
    bits = jax.random.bits(sign_key, (width,), jnp.uint32) >> 31
    return order, 1.0 - 2.0 * bits.astype(jnp.float32)


def _buckets(order: jax.Array, rank: int) -> jax.Array:
    """The bucket of each column, int32 of shape (width,)."""
    width = order.shape[0]
    positions = (
        jnp.zeros(width, jnp.int32).at[order].set(jnp.arange(width, dtype=jnp.int32))
    )
    return positions % rank


def _bucket_sizes(rank: int, width: int) -> jax.Array:
    sizes = np.full(rank, width // rank)
    sizes[: width % rank] += 1
    return jnp.asarray(sizes, jnp.float32)
