"""A sketch and the sums of squares of what it is taken of, in one pass on a TPU.

XLA reads a matrix once for a product and once more for sums of its squares. Here each
block is read once, split in two bfloat16 parts, and multiplied by those of S: three
products, as "high" precision takes, or two where S is exact in bfloat16.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from flora_jax._xla import is_sharded
from flora_jax.projections import linalg
from flora_jax.projections.linalg import along, product

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32

# Sides of blocks, the larger first: tiles of a TPU are 8 x 128, of bfloat16 16 x 128.
_BLOCKS = (512, 256, 128)
# Bytes of S, which stays on the chip, of a block of G and of one of the sketch, each
# held twice, of the 16 MiB that the compiler grants by default.
_MOST = 12 * 2**20


def product_with_squares(
    s: Float[Array, "*batch r width"],
    matrix: Float[Array, "*batch n m"],
    weights: Float[Array, "*batch width"] | None,
    axis: int,
) -> tuple[Float[Array, "*batch _ _"], Float[Array, "*batch _ _"]]:
    """As ``linalg.product_with_squares``, on a TPU; by the kernel where that fits.

    The compiler cannot partition the kernel: only a process that has one device takes
    it, not one that compiles for several without ``jax.set_mesh``.
    """
    alone = jax.device_count() == 1 and not is_sharded()
    if not (alone and fits(s, matrix, axis)):
        # A matrix in bfloat16 is multiplied as it is, another by its weights first.
        weigh_s = matrix.dtype == jnp.bfloat16
        return linalg.product_with_squares(s, matrix, weights, axis, weigh_s)
    batch = matrix.shape[:-2]
    if weights is not None:
        weights = jnp.broadcast_to(weights, (*batch, weights.shape[-1]))

    def each(s: jax.Array, matrix: jax.Array, weights: jax.Array | None) -> Any:
        return sketch_with_squares(s, matrix, weights, axis)

    axes = None if s.ndim == 2 else 0, 0, None if weights is None else 0
    for _ in batch:
        each = jax.vmap(each, in_axes=axes)
    return each(s, matrix, weights)


def fits(s: jax.Array, matrix: jax.Array, axis: int) -> bool:
    """Whether the kernel takes these matrices; the last two axes count.

    Of a G in bfloat16 XLA's product and sums move less.
    """
    rank, width = s.shape[-2:]
    step, part = _block(width), _block(matrix.shape[-3 - axis])
    held = s.dtype.itemsize * rank * width + 4 * step * part + 4 * rank * part
    divides = bool(step and part) and rank % 128 == 0
    return divides and 2 * held <= _MOST and matrix.dtype == jnp.float32


def _block(size: int) -> int:
    return next((block for block in _BLOCKS if size % block == 0), 0)


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two bfloat16 arrays whose sum is the array, to 2⁻¹⁶ of its entries."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def sketch_with_squares(
    s: Float[Array, "r width"],
    matrix: Float32[Array, "n m"],
    weights: Float32[Array, " width"] | None,
    axis: int,
    interpret: bool = False,
) -> tuple[Float[Array, "_ _"], Float[Array, "_ _"]]:
    """G Sᵀ and the sums of squares of G's rows, or S G and those of its columns.

    Args:
      s: S, float32, or bfloat16 if it is exact in that.
      matrix: G, to be multiplied by the weights first.
      weights: one for each column of S, or None.
      axis: the sketched axis of G, -1 or -2.
      interpret: run on any device, slowly.

    Returns:
      The sketch, to 2⁻¹⁶ of G's entries, and the sums, with an axis of size 1.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rank, width = s.shape
    other = matrix.shape[-3 - axis]
    step, part = _block(width), _block(other)
    columns = axis == -1

    def spec(sketched: int, kept: int, of_step: Any, of_part: Any) -> pl.BlockSpec:
        """Of an array whose axes are G's: where its block lies at a point of the grid.

        The grid's first index goes over the axis that is kept, its second over the
        sketched one.
        """
        if columns:
            return pl.BlockSpec((kept, sketched), lambda j, i: (of_part(j), of_step(i)))
        return pl.BlockSpec((sketched, kept), lambda j, i: (of_step(i), of_part(j)))

    def all_of(index: Any) -> Any:
        return index

    def first(index: Any) -> int:
        return 0

    def kernel(s_ref: Any, g_ref: Any, *refs: Any) -> None:
        i = pl.program_id(1)
        block = g_ref[...]
        if weights is not None:
            block = block * refs[0][...]
        contracted = ((1,), (1,)) if columns else ((1,), (0,))

        def multiply(x: jax.Array, s: jax.Array) -> jax.Array:
            pair = (x, s) if columns else (s, x)
            return jax.lax.dot_general(
                *pair,
                (contracted, ((), ())),
                # Mosaic refuses others, which jax.default_matmul_precision may name.
                precision=jax.lax.Precision.DEFAULT,
                preferred_element_type=jnp.float32,
            )

        high, low = _parts(block)
        s_high, s_low = s_ref[:, pl.ds(i * step, step)], None
        if s.dtype == jnp.float32:
            s_high, s_low = _parts(s_high)
        sketch = multiply(high, s_high) + multiply(low, s_high)
        if s_low is not None:
            sketch += multiply(high, s_low)
        squares = jnp.sum(block * block, axis, keepdims=True)
        sketch_ref, squares_ref = refs[-2:]

        @pl.when(i == 0)
        def _() -> None:
            sketch_ref[...], squares_ref[...] = sketch, squares

        @pl.when(i > 0)
        def _() -> None:
            sketch_ref[...] += sketch
            squares_ref[...] += squares

    operands = [s, matrix]
    specs = [
        pl.BlockSpec((rank, width), lambda j, i: (0, 0)),
        spec(step, part, all_of, all_of),
    ]
    if weights is not None:
        operands.append(jnp.expand_dims(weights, -3 - axis))
        specs.append(spec(step, 1, all_of, first))
    shapes = [(other, n) if columns else (n, other) for n in (rank, 1)]
    return pl.pallas_call(
        kernel,
        grid=(other // part, width // step),
        in_specs=specs,
        out_specs=[spec(n, part, first, all_of) for n in (rank, 1)],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=(6 if s.dtype == jnp.float32 else 4) * rank * width * other,
            bytes_accessed=matrix.nbytes + s.nbytes + 4 * (rank + 1) * other,
            transcendentals=0,
        ),
        interpret=interpret,
    )(*operands)


@sketch_with_squares.defjvp
def _differentiated(
    axis: int, interpret: bool, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """As of a product and sums, whose own derivatives are products and sums."""

    def weighed(matrix: jax.Array, weights: jax.Array | None) -> jax.Array:
        return matrix if weights is None else matrix * along(weights, axis)

    s, *others = primals
    change_of_s, *changes = tangents
    full, change = jax.jvp(weighed, tuple(others), tuple(changes))
    sketch = product(change, s.astype(jnp.float32).T, axis)
    sketch += product(full, change_of_s.astype(jnp.float32).T, axis)
    squares = 2 * jnp.sum(full * change, axis, keepdims=True)
    return sketch_with_squares(*primals, axis, interpret), (sketch, squares)
