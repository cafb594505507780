"""A sketch and the sums of squares of what it is taken of, in one pass on a TPU.

XLA reads a matrix once for a product and once more for sums of its squares. Here each
block is read once, split in two bfloat16 parts, and multiplied by a matrix that is
exact in bfloat16: two products, where "high" precision takes three.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from flora_jax.projections.base import along
from flora_jax.projections.linalg import product

if TYPE_CHECKING:
    from jaxtyping import Array, BFloat16, Float, Float32

# Sides of blocks, the larger first: tiles of a TPU are 8 x 128, of bfloat16 16 x 128.
_BLOCKS = (512, 256, 128)
# Bytes of S, which stays on the chip, of a block of G and of one of the sketch, each
# held twice, of the 16 MiB that the compiler grants by default.
_MOST = 12 * 2**20


def fits(shape: tuple[int, ...], rank: int, axis: int) -> bool:
    """Whether the kernel takes a matrix of this shape; the last two axes count.

    The compiler cannot partition it: only a process that has one device takes it, not
    one that compiles for several without ``jax.set_mesh``.
    """
    width, other = shape[axis], shape[-3 - axis]
    step, part = _block(width), _block(other)
    held = 2 * (2 * rank * width + 4 * step * part + 4 * rank * part)
    whole = step and part and rank % 128 == 0
    return bool(whole) and held <= _MOST and jax.device_count() == 1


def _block(size: int) -> int:
    return next((block for block in _BLOCKS if size % block == 0), 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def sketch_with_squares(
    s: BFloat16[Array, "r width"],
    matrix: Float32[Array, "n m"],
    weights: Float32[Array, " width"] | None,
    axis: int,
    interpret: bool = False,
) -> tuple[Float[Array, "_ _"], Float[Array, "_ _"]]:
    """G Sᵀ and the sums of squares of G's rows, or S G and those of its columns.

    Args:
      s: S, bfloat16.
      matrix: G, to be multiplied by the weights first. In bfloat16 a product of XLA's
        and sums moved less.
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
        s_block = s_ref[:, pl.ds(i * step, step)]
        contracted = ((1,), (1,)) if columns else ((1,), (0,))
        pair = (lambda x: (x, s_block)) if columns else (lambda x: (s_block, x))

        def product(x: jax.Array) -> jax.Array:
            return jax.lax.dot_general(
                *pair(x), (contracted, ((), ())), preferred_element_type=jnp.float32
            )

        high = block.astype(jnp.bfloat16)
        low = (block - high.astype(jnp.float32)).astype(jnp.bfloat16)
        sketch = product(high) + product(low)
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
            flops=4 * rank * width * other,
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
    full, change = jax.jvp(weighed, tuple(others), tuple(tangents[1:]))
    sketch = product(change, s.astype(jnp.float32).T, axis)
    squares = 2 * jnp.sum(full * change, axis, keepdims=True)
    return sketch_with_squares(*primals, axis, interpret), (sketch, squares)
