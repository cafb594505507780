"""A sketch of signed sums over buckets."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax._typing import KeyData
from flora_jax._xla import is_sharded
from flora_jax.projections import tpu_kernel
from flora_jax.projections.base import ObliviousProjection
from flora_jax.projections.linalg import (
    along,
    product,
    product_with_squares,
    sums_of_squares,
)
from flora_jax.random.bits import bits, signs

if TYPE_CHECKING:
    from jaxtyping import Array, Float


_UNROLL, _UNROLL_GPU = 8, 64  # More chunks than these are added in a loop.


@dataclasses.dataclass(frozen=True)
class CountSketch(ObliviousProjection):
    """Deals the m columns to r buckets at random, and sums each with random signs.

    The columns are dealt in chunks of r, each to all r buckets in cyclic order from a
    random first one. If r does not divide m the last chunk has t = m mod r columns, for
    the buckets 0…t−1, and the columns are first rotated at random, so that all meet it
    alike. Two columns share a bucket with probability 1/r, or never if they share a
    chunk; bucket sizes differ by at most one. E[SᵀS] = I, and

      E‖G SᵀS − G‖² = (m/r − 1 + t(r−t)/(r m))·‖G‖².

    S Sᵀ is the diagonal matrix of the bucket sizes, (m/r)·I if r divides m: then it is
    a scaled isometry with the variance of a Haar-orthogonal projection, √(r/m) being
    the cosine between G and its estimate.

    Costs one pass over G for a sketch and one for an estimate, whatever the rank; no
    r x m matrix and no matrix product; m + m/r random words.

    On a TPU both are products with S instead, 2·n·m·r operations and r·m bfloat16
    elements of temporary memory: S is exact in bfloat16, what it is multiplied with is
    split into bfloat16 parts, to 2⁻¹⁶ of its entries. Under ``jax.set_mesh`` with
    several devices a sketch is a product, too: a sum over a sharded side, where a
    permutation would gather it.

    Weaker than dense projections where few columns of G matter: two of them collide
    with probability 1/r, and then cancel or add up, where a dense projection would mix
    them. The variance of ‖C‖² is no larger, but its tails are heavier.

    Raises:
      ValueError: for an unknown normalization.

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

    def sample(self, key: KeyData, rank: int, width: int) -> Any:
        """Signs and buckets of the columns (m,), offsets of the chunks, and a shift."""
        full, tail = divmod(width, rank)
        # The remainder prefers small numbers by less than rank / 2**32.
        offsets = bits(key, (full,), 1) % np.uint32(rank)
        # Without a last, shorter chunk all columns are alike and none is shifted.
        shift = bits(key, (), 2) % np.uint32(width) if tail else jnp.uint32(0)
        offsets, shift = offsets.astype(jnp.int32), shift.astype(jnp.int32)
        # Column j has place j − shift (mod m); chunk c starts at bucket offsets[c], the
        # last, shorter one at bucket 0.
        place = (jnp.arange(width, dtype=jnp.int32) - shift) % width
        buckets = (place + jnp.append(offsets, 0)[place // rank]) % rank
        return signs(key, (width,), 0), buckets, offsets, shift

    def compress(
        self,
        sampled: Any,
        matrix: Float[Array, "*batch n m"],
        rank: int,
        axis: int,
        weights: Float[Array, "*batch m"] | None = None,
    ) -> Float[Array, "*batch _ _"]:
        """G Sᵀ or S G; see :meth:`Projection.compress`."""
        return self.compress_with_squares(sampled, matrix, rank, axis, weights)[0]

    def compress_with_squares(
        self,
        sampled: Any,
        matrix: Float[Array, "*batch n m"],
        rank: int,
        axis: int,
        weights: Float[Array, "*batch m"] | None = None,
    ) -> tuple[Float[Array, "*batch _ _"], Float[Array, "*batch _ _"]]:
        """In one pass on a GPU; see :meth:`Projection.compress_with_squares`."""
        # A gather would be written to memory for a TPU, where a product reads G once.
        multiply = functools.partial(tpu_kernel.product_with_squares, axis=axis)
        forms: dict[str, Any] = {"tpu": functools.partial(_multiplied, rank, multiply)}
        if is_sharded():
            # Slices and gathers along a sharded side would move G between the devices.
            multiply = functools.partial(product_with_squares, axis=axis, weigh_s=True)
            forms["default"] = functools.partial(_multiplied, rank, multiply)
        else:
            full = matrix.shape[axis] // rank
            add_up = functools.partial(_add_up, rank, axis)
            gathers = functools.partial(_sum_gathers, axis=axis)
            unrolled = functools.partial(
                gathers, unroll=min(full, _UNROLL_GPU), square=True
            )
            by_rows = functools.partial(gathers, unroll=full <= _UNROLL, square=False)
            chunks = by_rows if axis == -2 else _sum_columns
            forms["cuda"] = forms["rocm"] = functools.partial(add_up, unrolled)
            forms["default"] = functools.partial(add_up, chunks)
        sketch, squares = jax.lax.platform_dependent(sampled, matrix, weights, **forms)
        return self._scaled(sketch, matrix.shape[axis], axis), squares

    def expand(
        self, sampled: Any, sketch: Float[Array, "*batch _ _"], width: int, axis: int
    ) -> Float[Array, "*batch n m"]:
        """C S or Sᵀ C; see :meth:`Projection.expand`."""
        # XLA fuses either into what reads the estimate, such as the addition to the
        # parameter; on CPU a gather along columns is one of single elements, about half
        # as fast. For a TPU a gather would be written to memory.
        return jax.lax.platform_dependent(
            sampled,
            self._scaled(sketch.astype(jnp.float32), width, axis),
            tpu=lambda s, c: product(c, _signed_buckets(s, c.shape[axis]), axis),
            default=lambda s, c: (
                jnp.take(c, s[1], axis=axis, mode="clip") * along(s[0], axis)
            ),
        )

    def transfer(
        self, old: Any, new: Any, rank: int, width: int
    ) -> Float[Array, "rank rank"]:
        """S S′ᵀ of two samples; see :meth:`Projection.transfer`."""
        # Sums of ±1, exact in any form: entry (b, b') over the columns in both buckets.
        matrix = jax.lax.platform_dependent(
            old,
            new,
            tpu=lambda s, t: jnp.einsum(
                "im,jm->ij",
                *(_signed_buckets(x, rank) for x in (s, t)),
                preferred_element_type=jnp.float32,
            ),
            default=lambda s, t: (
                jnp.zeros((rank, rank), jnp.float32).at[s[1], t[1]].add(s[0] * t[0])
            ),
        )
        return self._scaled(self._scaled(matrix, width, -2), width, -1)

    def as_matrix(self, sampled: Any, rank: int, width: int) -> Float[Array, "r m"]:
        """S, float32 of shape (rank, width)."""
        entries = _signed_buckets(sampled, rank).astype(jnp.float32)
        return self._scaled(entries, width, -2)

    def gram_diagonal(self, rank: int, width: int) -> Float[Array, " rank"] | None:
        """The bucket sizes, or ones if isometric."""
        if self.normalization == "isometric":
            return jnp.ones(rank, jnp.float32)
        return _bucket_sizes(rank, width)

    def _scaled(self, sketch: jax.Array, width: int, axis: int) -> jax.Array:
        """A sketch, or S itself, with rows of S of norm 1 if isometric."""
        if self.normalization != "isometric":
            return sketch
        return sketch * along(_bucket_sizes(sketch.shape[axis], width) ** -0.5, axis)


def _signed_buckets(sampled: Any, rank: int) -> jax.Array:
    """S with entries 0 and ±1, which are exact in bfloat16."""
    flips, buckets, *_ = sampled
    one_hot = jax.nn.one_hot(buckets, rank, axis=0, dtype=jnp.bfloat16)
    return one_hot * flips.astype(jnp.bfloat16)


def _multiplied(
    rank: int, multiply: Callable[..., Any], sampled: Any, *arguments: Any
) -> Any:
    """The product with S, which is exact in bfloat16: a TPU splits G, or weighted S."""
    # Written out, r·m bfloat16 elements: in the product it would be made anew for each
    # tile, and take longer to compile.
    s = jax.lax.optimization_barrier(_signed_buckets(sampled, rank))
    return multiply(s, *arguments)


def _add_up(
    rank: int,
    axis: int,
    sum_chunks: Callable[..., tuple[jax.Array, ...]],
    sampled: Any,
    matrix: jax.Array,
    weights: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The sketch as a sum of chunks, each of a column for every bucket, and squares.

    ``sum_chunks`` gives the sum, and that of the chunks' squares if it can.
    """
    flips, _, offsets, shift = sampled
    flips = flips if weights is None else flips * weights
    full, tail = divmod(matrix.shape[axis], rank)
    sums = sum_chunks(matrix, flips, offsets, shift if tail else None, rank)
    # Its t columns go to buckets 0…t−1: zeros for the others.
    if tail:
        rest = _wrapped(matrix, flips, shift + full * rank, tail, axis)
        pad = [(0, 0)] * rest.ndim
        pad[axis] = (0, rank - tail)
        rest = jnp.pad(rest, pad)
        sums = [x + y for x, y in zip(sums, (rest, rest * rest), strict=False)]
    if len(sums) == 2:
        return sums[0], jnp.sum(sums[1], axis, keepdims=True)
    weighed = matrix.astype(jnp.float32)
    weighed = weighed if weights is None else weighed * along(weights, axis)
    return sums[0], sums_of_squares(weighed, axis)


def _wrapped(
    matrix: jax.Array, flips: jax.Array, start: Any, size: int, axis: int
) -> jax.Array:
    """Columns start…start+size with their signs, float32; the first follow the last."""
    source = (start + jnp.arange(size, dtype=jnp.int32)) % matrix.shape[axis]
    columns = jnp.take(matrix, source, axis=axis, mode="clip")
    return columns.astype(jnp.float32) * along(flips[..., source], axis)


def _sum_columns(
    matrix: jax.Array, flips: jax.Array, offsets: jax.Array, shift: Any, rank: int
) -> tuple[jax.Array]:
    """The sum of all full chunks, each rotated by its offset.

    With a shift the chunks begin there. One of them may then wrap around the matrix: it
    is gathered, where the others are slices.
    """
    full, width = offsets.shape[0], matrix.shape[-1]
    seam = 0 if shift is None else jnp.minimum((width - shift) // rank, full - 1)

    def add(i: Any, total: jax.Array, chunk: jax.Array) -> jax.Array:
        here = jax.lax.dynamic_slice_in_dim(total, offsets[i], rank, -1)
        return jax.lax.dynamic_update_slice_in_dim(total, here + chunk, offsets[i], -1)

    def add_slice(i: Any, total: jax.Array) -> jax.Array:
        i = i if shift is None else i + (i >= seam)
        start = i * rank if shift is None else (i * rank + shift) % width
        columns = jax.lax.dynamic_slice_in_dim(matrix, start, rank, -1)
        own_flips = jax.lax.dynamic_slice_in_dim(flips, start, rank, -1)
        return add(i, total, columns.astype(jnp.float32) * along(own_flips, -1))

    # Two rounds of buckets, so that no chunk wraps around. XLA on CPU compiles the body
    # to one kernel that adds a chunk to the buckets in place, and no copy of either.
    # Zeros that vary over the same mesh axes as the matrix, inside jax.shard_map.
    buckets = jax.lax.full_like(matrix, 0, jnp.float32, (*matrix.shape[:-1], 2 * rank))
    slices = full if shift is None else full - 1
    buckets = jax.lax.fori_loop(0, slices, add_slice, buckets)
    if shift is not None:
        chunk = _wrapped(matrix, flips, seam * rank + shift, rank, -1)
        buckets = add(seam, buckets, chunk)
    # Bucket b was filled both at b and at b + r.
    first, second = jnp.split(buckets, 2, -1)
    return (first + second,)


def _sum_gathers(
    matrix: jax.Array,
    flips: jax.Array,
    offsets: jax.Array,
    shift: Any,
    rank: int,
    axis: int,
    unroll: int | bool,
    square: bool,
) -> tuple[jax.Array, ...]:
    """:func:`_sum_columns` by gathers, of full rows for axis -2.

    XLA on CPU compiles a chunk of rows to one kernel that gathers, signs and adds, with
    the row index computed outside of its inner loop; few chunks become one kernel
    together. On a GPU all that are unrolled do, of columns as well.

    Args:
      matrix: G.
      flips: signs of its columns, times their weights.
      offsets: of the chunks.
      shift: of the columns, or None.
      rank: r.
      axis: the sketched side.
      unroll: as in ``jax.lax.fori_loop``.
      square: whether to sum up the squares of the chunks as well.
    """
    full = offsets.shape[0]
    place = jnp.arange(rank, dtype=jnp.int32)
    # Which column of each chunk goes to each bucket: a gather in place of a scatter.
    starts = rank * jnp.arange(full, dtype=jnp.int32)[:, None]
    sources = starts + (place - offsets[:, None]) % rank
    sources = sources if shift is None else (sources + shift) % matrix.shape[axis]
    flips = flips[..., sources]

    def add(i: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        columns = jnp.take(matrix, sources[i], axis=axis, mode="clip")
        columns = columns.astype(jnp.float32) * along(flips[..., i, :], axis)
        powers = (columns, columns * columns)
        return tuple(x + y for x, y in zip(sums, powers, strict=False))

    shape = list(matrix.shape)
    shape[axis] = rank
    zeros = jax.lax.full_like(matrix, 0, jnp.float32, shape)
    return jax.lax.fori_loop(0, full, add, (1 + square) * (zeros,), unroll=unroll)


def _bucket_sizes(rank: int, width: int) -> jax.Array:
    """Columns of each bucket; the first ones have one of the last chunk as well."""
    return jnp.asarray(width // rank + (np.arange(rank) < width % rank), jnp.float32)
