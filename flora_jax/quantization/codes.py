"""Codes of 8 bits for arrays, and bfloat16 as an alternative.

Each row, along the last axis, has one scale s, its largest magnitude. Rows are not cut
into blocks: a TPU would write the array to memory to reshape it, and on a mesh blocks
may cross shards. Codes are found by arithmetic alone: tables are slow to search on a
CPU and on a TPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax._typing import Shape

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt32

CODES = ("int8", "float8_e4m3fn", "bfloat16")

# Shorter rows would spend more than an eighth of a byte per element on scales; the
# longest axis is used instead.
_SHORTEST = 32
# So many bits of a threshold that a value which is a code already, up to roundings of
# float32, lies outside all thresholds and stays that code.
_THRESHOLD_BITS = 13


class _Grid(NamedTuple):
    """Codes q and what they stand for: s·(|q|/top)**power, with q's sign if signed.

    Attributes:
      dtype: of the codes.
      top: the largest code.
      curve: the power for first moments, and for the roots of second moments. A larger
        one keeps small entries of a row better, and large ones worse: with second
        moments, which change slowly, that costs more than it gives.
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
    ("int8", True): _Grid(jnp.int8, 127, 3, 3, 1, 0, 2.0**-105),
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


def scale_shape(shape: Shape, code: str) -> Shape:
    """Shape of the scales of an array: one per row.

    Args:
      shape: the array's shape.
      code: one of :data:`CODES`; bfloat16 has no scales, and ones here.

    Returns:
      The shape with 1 in place of the last axis; of the longest if the last is short.
    """
    if code == "bfloat16":
        return (1,) * len(shape)
    axis = _axis(shape)
    return (*shape[:axis], 1, *shape[axis + 1 :])


def encode(
    x: Float[Array, "..."],
    code: str,
    signed: bool,
    threshold: UInt32[Array, ""] | None = None,
) -> tuple[Array, Float[Array, "..."]]:
    """Codes and scales of an array.

    With s the scale of an entry's row, x = s·f(q) for the code q:

    - int8, signed: f = (q/127)³, an int8. The error |x′ − x| is at most
      1.5·∛(s·x²)/127 + 1.5·∛(s²·|x|)/127² + s/(2·127³).
    - int8, unsigned: f = (q/255)⁴, a uint8, for second moments. |√v′ − √v| is at most
      √(√s·√v)/255 + √s/255², and a positive v, as 1/√v is taken, never becomes 0.
    - float8_e4m3fn, signed: f = q/448. |x′ − x| is at most the larger of |x|/16 and
      s/(448·2¹⁰).
    - float8_e4m3fn, unsigned: f = (q/448)². |√v′ − √v| is at most the larger of √v/16
      and √s/(448·2⁹), and a positive v never becomes 0.
    - bfloat16: x itself, |x′ − x| ≤ |x|/2⁸; no scale.

    Up to roundings of float32: zero stays zero, a row's largest entry is exact, and
    what was decoded is encoded to the codes it came from, so that a state that is
    not changed does not drift. A scale is at least 2⁻⁹⁰ to 2⁻¹⁰⁸, by the grid, and of
    float16 moments 2⁻¹⁴. All this is for float32 moments: narrower ones are rounded to
    their dtype besides.

    A row with an infinite or undefined entry, or with a negative one if unsigned, has
    the scale NaN: all of it is decoded to NaN. bfloat16 keeps such entries.

    Given a threshold w, x becomes the upper one of the two nearest values if it is
    above the lower one by more than w/2³² of their distance. If the thresholds of many
    calls are evenly spread, rounding is unbiased: exactly for bfloat16, else to 2⁻¹⁴ of
    the distance. Errors are then up to twice those above. Unsigned values below the
    smallest code become that code here, too. Moments narrower than float32 are always
    rounded to the nearest: decoded ones are codes only up to roundings of their dtype.

    Args:
      x: real floating array of at least one axis, none of size zero.
      code: one of :data:`CODES`.
      signed: whether the values have signs.
      threshold: w, or None to round to the nearest: in x, or in √x if unsigned.

    Returns:
      Codes of x's shape, and scales of :func:`scale_shape` and x's dtype: that holds s
      exactly, and tells :func:`decode` what to return.

    Example:
      >>> import jax.numpy as jnp
      >>> from flora_jax.quantization.codes import decode, encode
      >>> codes, scales = encode(jnp.array([-2.0, 0.5, 0.0]), "int8", True)
      >>> codes.tolist(), scales.tolist()
      ([-127, 80, 0], [2.0])
      >>> decode(codes, scales, "int8", True).round(3).tolist()
      [-2.0, 0.5, 0.0]

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2021, for codes with scales
    """
    full = x.astype(jnp.float32)
    threshold = threshold if x.dtype == jnp.float32 else None
    if code == "bfloat16":
        return _to_bfloat16(full, threshold), jnp.zeros((1,) * x.ndim, x.dtype)
    grid = _GRIDS[code, signed]
    sizes = jnp.abs(full) if signed else jnp.where(full < 0, jnp.nan, full)
    # In the dtype of x, exactly: TPUs then do not read x once more for it.
    tops = jnp.max(sizes.astype(x.dtype), axis=_axis(x.shape), keepdims=True)
    tops = tops.astype(jnp.float32)
    floor = max(grid.floor, float(jnp.finfo(x.dtype).tiny))
    scales = jnp.where(jnp.isfinite(tops), jnp.maximum(tops, floor), jnp.nan)
    parts = sizes / scales
    # Also where the part is not a number: a cast of it would differ by device.
    codes = _round(jnp.where(parts <= 1, parts, 1.0), grid, threshold)
    if signed:
        codes = jnp.where(full < 0, -codes, codes)
    else:
        codes = jnp.where(sizes > 0, jnp.maximum(codes, grid.finest), codes)
    return codes.astype(grid.dtype), scales.astype(x.dtype)


def decode(
    codes: Array, scales: Float[Array, "..."], code: str, signed: bool
) -> Float[Array, "..."]:
    """The array that codes and scales stand for; see :func:`encode`.

    Args:
      codes: what :func:`encode` returned.
      scales: the same.
      code: as in :func:`encode`.
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
    return (full * scales.astype(jnp.float32)).astype(scales.dtype)


def _round(parts: jax.Array, grid: _Grid, threshold: jax.Array | None) -> jax.Array:
    """Codes, in float32, of values in [0, 1]: one of the two next to each."""
    # An estimate of the root is enough: the nearer of two codes is chosen below.
    roots = parts if grid.power == 1 else jnp.exp2(jnp.log2(parts) / grid.power)
    places = roots * np.float32(grid.top)
    steps = jnp.float32(1)
    if grid.bits:
        steps = jnp.maximum(_power_of_two(places) * 2.0**-grid.bits, grid.finest)
    low = jnp.floor(places / steps) * steps
    high = low + steps
    if threshold is None:
        power, share = grid.curve, jnp.float32(0.5)
        values = parts if grid.power == grid.curve else jnp.sqrt(parts)
    else:
        power, values = grid.power, parts
        start = (threshold >> (32 - _THRESHOLD_BITS)).astype(jnp.float32)
        share = (start + 0.5) * np.float32(2.0**-_THRESHOLD_BITS)
    values = values * np.float32(grid.top**power)
    below, above = low**power, high**power
    return jnp.where(values - below > share * (above - below), high, low)


def _power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two that is not above x: float32 without its mantissa."""
    return (x.view(jnp.uint32) & np.uint32(0x7F800000)).view(jnp.float32)


def _to_bfloat16(x: jax.Array, threshold: jax.Array | None) -> jax.Array:
    """Nearest, or carried into the upper 16 bits if the lower ones exceed w."""
    if threshold is not None:
        words = (x.view(jnp.uint32) + (~threshold >> 16)) & np.uint32(0xFFFF0000)
        x = jnp.where(jnp.isfinite(x), words.view(jnp.float32), x)
    return x.astype(jnp.bfloat16)


def _axis(shape: Shape) -> int:
    """The axis that rows run along."""
    last = len(shape) - 1
    return last if shape[last] >= _SHORTEST else shape.index(max(shape))
