"""Block-wise codes of 8 bits for arrays, and bfloat16 as an alternative.

Blocks run along the longest axis of an array (the first of several); each has a scale
s, the largest magnitude in it. Codes are found by arithmetic alone: tables are slow to
search on a CPU and on a TPU.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax._typing import Shape

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt32

CODES = ("int8", "float8_e4m3fn", "bfloat16")

# So many random bits that a value which is a code already, up to roundings of
# float32, lies outside all thresholds and stays that code.
_RANDOM_BITS = 13


class _Grid(NamedTuple):
    """Codes q and what they stand for: s·(|q|/top)**power, with q's sign if signed.

    Attributes:
      dtype: of the codes.
      top: the largest code.
      curve: the power for first moments, and for the roots of second moments.
      power: ``curve`` if signed, else twice that.
      finest: the smallest positive code, and the step between the codes next to it.
      bits: a code's step is at least 2**-bits of it; 0 if all steps are equal.
      floor: the smallest scale: under it the finest code would underflow.
    """

    dtype: Any
    top: float
    curve: int
    power: int
    finest: float
    bits: int
    floor: float


_GRIDS = {
    ("int8", True): _Grid(jnp.int8, 127, 2, 2, 1, 0, 2.0**-112),
    ("int8", False): _Grid(jnp.uint8, 255, 2, 4, 1, 0, 2.0**-94),
    ("float8_e4m3fn", True): _Grid(jnp.float8_e4m3fn, 448, 1, 1, 2.0**-9, 3, 2.0**-108),
    ("float8_e4m3fn", False): _Grid(jnp.float8_e4m3fn, 448, 1, 2, 2.0**-9, 3, 2.0**-90),
}


def code_dtype(code: str, signed: bool) -> Any:
    """The dtype of the codes.

    Args:
      code: one of :data:`CODES`.
      signed: whether the values have signs; second moments have none.

    Returns:
      The dtype.
    """
    return jnp.dtype(jnp.bfloat16 if code == "bfloat16" else _GRIDS[code, signed].dtype)


def scale_shape(shape: Shape, code: str, block: int) -> Shape:
    """Shape of the scales of an array: its longest axis L becomes ⌈L/block⌉.

    Args:
      shape: the array's shape.
      code: one of :data:`CODES`; bfloat16 has no scales, and ones here.
      block: elements per scale.

    Returns:
      A shape with as many axes.
    """
    if code == "bfloat16":
        return (1,) * len(shape)
    axis, split = _blocks(shape, block)
    return split[: axis + 1] + split[axis + 2 :]


def encode(
    x: Float[Array, "..."],
    code: str,
    block: int,
    signed: bool,
    bits: UInt32[Array, "..."] | None = None,
) -> tuple[Array, Float[Array, "..."]]:
    """Codes and scales of an array.

    With s the scale of an entry's block, x = s·f(q) for the code q:

    - int8, signed: f = sign(q)·(|q|/127)², an int8. The error |x′ − x| is at most
      √(s|x|)/127 + s/(4·127²).
    - int8, unsigned: f = (q/255)⁴, a uint8, for second moments: √v has then the
      precision of a first moment. The error |√v′ − √v| is at most
      √(√s·√v)/255 + √s/255², and a positive v, as 1/√v is taken, never becomes 0.
    - float8_e4m3fn, signed: f = q/448. |x′ − x| is at most the larger of |x|/16 and
      s/(448·2¹⁰).
    - float8_e4m3fn, unsigned: f = (q/448)². |√v′ − √v| is at most the larger of √v/16
      and √s/(448·2⁹), and a positive v never becomes 0.
    - bfloat16: x itself, |x′ − x| ≤ |x|/2⁸; no scale.

    Up to roundings of float32: zero stays zero, a block's largest entry is exact, and
    what was decoded is encoded to the codes it came from, so that a state that is
    not changed does not drift. A scale is at least 2⁻⁹⁰ to 2⁻¹¹², by the grid.

    A block with an infinite or undefined entry, or with a negative one if unsigned, has
    the scale NaN: all of it is decoded to NaN. bfloat16 keeps such entries.

    Given random bits, x becomes one of the two nearest values at random with the mean
    x: exactly for bfloat16, else to 2⁻¹⁴ of their distance. Errors are then up to twice
    the first term and four times the second (float8 and bfloat16: twice). Unsigned
    values below the smallest code become that code here, too.

    Args:
      x: real floating array of at least one axis, none of size zero.
      code: one of :data:`CODES`.
      block: elements per scale; the last block may be short. Blocks that divide the
        length of a shard need no communication.
      signed: whether the values have signs.
      bits: uniform random words of x's shape, or None to round to the nearest: in x, or
        in √x if unsigned.

    Returns:
      Codes of x's shape, and scales of :func:`scale_shape` and x's dtype: that holds s
      exactly, and tells :func:`decode` what to return.

    Example:
      >>> import jax.numpy as jnp
      >>> from flora_jax.quantization.blockwise import decode, encode
      >>> codes, scales = encode(jnp.array([-2.0, 0.5, 0.0]), "int8", 256, True)
      >>> codes.tolist(), scales.tolist()
      ([-127, 63, 0], [2.0])
      >>> decode(codes, scales, "int8", 256, True).round(3).tolist()
      [-2.0, 0.492000013589859, 0.0]

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2021, for blocks and their scales
    """
    full = x.astype(jnp.float32)
    if code == "bfloat16":
        return _to_bfloat16(full, bits), jnp.zeros((1,) * x.ndim, x.dtype)
    grid = _GRIDS[code, signed]
    sizes = jnp.abs(full) if signed else jnp.where(full < 0, jnp.nan, full)
    tops = _block_max(sizes, block)
    floor = max(grid.floor, float(jnp.finfo(x.dtype).tiny))
    scales = jnp.where(jnp.isfinite(tops), jnp.maximum(tops, floor), jnp.nan)
    parts = sizes / _spread(scales, x.shape, block)
    # Also where the part is not a number: a cast of it would differ by device.
    codes = _round(jnp.where(parts <= 1, parts, 1.0), grid, bits)
    if signed:
        codes = jnp.where(full < 0, -codes, codes)
    else:
        codes = jnp.where(sizes > 0, jnp.maximum(codes, grid.finest), codes)
    return codes.astype(grid.dtype), scales.astype(x.dtype)


def decode(
    codes: Array, scales: Float[Array, "..."], code: str, block: int, signed: bool
) -> Float[Array, "..."]:
    """The array that codes and scales stand for; see :func:`encode`.

    Args:
      codes: what :func:`encode` returned.
      scales: the same.
      code: as in :func:`encode`.
      block: as in :func:`encode`.
      signed: as in :func:`encode`.

    Returns:
      An array of the codes' shape and the scales' dtype.
    """
    if code == "bfloat16":
        return codes.astype(scales.dtype)
    grid = _GRIDS[code, signed]
    q = codes.astype(jnp.float32)
    size = jnp.abs(q)
    parts = size**grid.curve * np.float32(1 / grid.top**grid.curve)
    if not signed:
        parts = parts * parts
    # Exactly 1 for the largest entry; XLA may multiply in another order.
    parts = jnp.where(size == grid.top, 1.0, parts)
    full = jnp.where(q < 0, -parts, parts)
    full = full * _spread(scales.astype(jnp.float32), codes.shape, block)
    return full.astype(scales.dtype)


def _round(parts: jax.Array, grid: _Grid, bits: jax.Array | None) -> jax.Array:
    """Codes, in float32, of values in [0, 1]: one of the two next to each."""
    roots = parts
    for _ in range(grid.power.bit_length() - 1):
        roots = jnp.sqrt(roots)
    places = roots * np.float32(grid.top)
    steps = jnp.float32(1)
    if grid.bits:
        steps = jnp.maximum(_power_of_two(places) * 2.0**-grid.bits, grid.finest)
    low = jnp.floor(places / steps) * steps
    high = low + steps
    if bits is None:
        power, threshold = grid.curve, jnp.float32(0.5)
        values = parts if grid.power == grid.curve else jnp.sqrt(parts)
    else:
        power, values = grid.power, parts
        words = (bits >> (32 - _RANDOM_BITS)).astype(jnp.float32)
        threshold = (words + 0.5) * np.float32(2.0**-_RANDOM_BITS)
    values = values * np.float32(grid.top**power)
    below, above = low**power, high**power
    return jnp.where(values - below > threshold * (above - below), high, low)


def _power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two that is not above x: float32 without its mantissa."""
    return (x.view(jnp.uint32) & np.uint32(0x7F800000)).view(jnp.float32)


def _to_bfloat16(x: jax.Array, bits: jax.Array | None) -> jax.Array:
    """Nearest, or carried into the upper 16 bits as often as the lower ones say."""
    if bits is not None:
        words = (x.view(jnp.uint32) + (bits >> 16)) & np.uint32(0xFFFF0000)
        x = jnp.where(jnp.isfinite(x), words.view(jnp.float32), x)
    return x.astype(jnp.bfloat16)


def _block_max(sizes: jax.Array, block: int) -> jax.Array:
    """The largest element of each block; NaN if one of them is."""
    axis, split = _blocks(sizes.shape, block)
    pads = [(0, 0)] * sizes.ndim
    pads[axis] = (0, split[axis] * split[axis + 1] - sizes.shape[axis])
    return jnp.max(jnp.pad(sizes, pads).reshape(split), axis=axis + 1)


def _spread(scales: jax.Array, shape: Shape, block: int) -> jax.Array:
    """Each entry's scale."""
    axis, split = _blocks(shape, block)
    spread = jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), split)
    flat = spread.reshape(*shape[:axis], -1, *shape[axis + 1 :])
    return jax.lax.slice_in_dim(flat, 0, shape[axis], axis=axis)


def _blocks(shape: Shape, block: int) -> tuple[int, Shape]:
    """The longest axis, and the shape with that axis split: (…, blocks, length, …)."""
    axis = shape.index(max(shape))
    block = min(block, shape[axis])
    count = math.ceil(shape[axis] / block)
    return axis, (*shape[:axis], count, block, *shape[axis + 1 :])
