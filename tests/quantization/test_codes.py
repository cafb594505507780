"""Codes of 8 or 16 bits: error bounds, exactness, fixed points, unbiased rounding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.collectives import collectives
from flora_jax.quantization.codes import (
    _GRIDS,
    CODES,
    code_dtype,
    decode,
    encode,
    scale_shape,
)

SCALED = [(code, signed) for code in CODES[:2] for signed in (True, False)]
EVERY = [(code, signed) for code in CODES for signed in (True, False)]
every_code = pytest.mark.parametrize(("code", "signed"), EVERY)
scaled_codes = pytest.mark.parametrize(("code", "signed"), SCALED)
SHAPE = (5, 3, 40)


@functools.cache
def compiled(code, signed):
    """Jitted encode with and without a threshold, and decode."""
    first = jax.jit(lambda x: encode(x, code, signed))
    above = jax.jit(lambda x, w: encode(x, code, signed, w))
    return first, above, jax.jit(lambda q, s: decode(q, s, code, signed))


def there_and_back(x, code, signed, threshold=None):
    first, above, back = compiled(code, signed)
    codes, scales = first(x) if threshold is None else above(x, jnp.uint32(threshold))
    return back(codes, scales)


def numbers(signed, shape=SHAPE, decades=6, seed=0):
    """Magnitudes over many decades; second moments over twice as many."""
    rng = np.random.default_rng(seed)
    x = 10 ** rng.uniform(-decades if signed else -2 * decades, 0, shape)
    x = x * rng.choice([-1, 1], shape) if signed else x
    return jnp.asarray(x * rng.uniform(1e-3, 1e3), jnp.float32)


def tops(x):
    """The largest magnitude in each row along the last axis, float64."""
    return np.abs(np.asarray(x, np.float64)).max(-1, keepdims=True)


def values(code, signed):
    """All magnitudes that a code can stand for at scale 1, from its definition."""
    if code == "int8":
        return (np.arange(128) / 127) ** 3 if signed else (np.arange(256) / 255) ** 4
    every = np.arange(127, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float64)
    return every / 448 if signed else (every / 448) ** 2


@pytest.mark.sample(4)
@scaled_codes
@pytest.mark.parametrize("shape", [SHAPE, (27, 4), (3, 16, 2), (70, 40)])
def test_equals_the_nearest_value_of_a_table(code, signed, shape):
    # Rows along the last axis for the table; in the library, along the longest of
    # those whose last is short.
    axis = len(shape) - 1 if shape[-1] >= 32 else shape.index(max(shape))
    x = numbers(signed, shape)
    moved = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    s, table = tops(moved), values(code, signed)
    root = (lambda y: y) if signed else np.sqrt
    distances = np.abs(root(np.abs(moved) / s)[..., None] - root(table))
    if not signed:
        distances[..., 0] = np.inf  # A positive second moment is not made 0.
    expected = np.sign(moved) * s * table[distances.argmin(-1)]
    actual = np.moveaxis(np.asarray(there_and_back(x, code, signed)), axis, -1)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def bound(x, code, signed, threshold):
    """The docstring's bounds, of |x' - x|, or of the roots if unsigned."""
    s, size = tops(x), np.abs(np.asarray(x, np.float64))
    if not signed:
        s, size = np.sqrt(s), np.sqrt(size)
    once = 1 if threshold is None else 2
    if code == "bfloat16":
        size = np.abs(np.asarray(x, np.float64))
        return once * size * 2.0**-8
    if code == "int8":
        if signed:
            part = np.cbrt(size / s)
            return once * s * (1.5 * part**2 / 127 + 1.5 * part / 127**2 + 0.5 / 127**3)
        return once * (np.sqrt(s * size) / 255 + s / 255**2)
    finest = s / (448 * 2**10) if signed else s / (448 * 2**9)
    return once * np.maximum(size / 16, finest)


@pytest.mark.sample(1)
@pytest.mark.parametrize("threshold", [None, 2**30, 2**32 - 1])
@every_code
def test_errors_are_below_the_bounds(code, signed, threshold):
    x = numbers(signed, (20, 3, 27))
    actual = np.asarray(there_and_back(x, code, signed, threshold), np.float64)
    expected, limit = np.asarray(x, np.float64), bound(x, code, signed, threshold)
    if not signed and code != "bfloat16":
        actual, expected = np.sqrt(actual), np.sqrt(expected)
    slack = 1e-6 * np.abs(expected) + 1e-30
    assert np.all(np.abs(actual - expected) <= limit + slack)
    # The bound is near: it is not so loose that an error of twice the size passes.
    ratio = (np.abs(actual - expected) / limit).max()
    assert ratio > 0.6


@pytest.mark.sample(1)
@every_code
def test_zeros_stay_zero_and_positive_second_moments_positive(code, signed):
    x = numbers(signed).at[:, 0].set(0.0).at[:, 1, ::2].set(0.0)
    back = np.asarray(there_and_back(x, code, signed))
    assert np.all(back[np.asarray(x) == 0] == 0)
    if not signed:
        small = x.at[0, 2, :3].set(jnp.array([1e-37, 1e-30, 1e30]))
        back = np.asarray(there_and_back(small, code, signed))
        assert np.all(back[np.asarray(small) > 0] > 0)
        tiny = jnp.full(SHAPE, 1e-37)  # Less than any scale.
        assert np.all(np.asarray(there_and_back(tiny, code, signed)) > 0)
        last = np.asarray(there_and_back(small, code, signed, 2**32 - 1))
        if code != "bfloat16":  # Rounded down, its smallest ones are zero.
            assert np.all(last[np.asarray(small) > 0] > 0)


@scaled_codes
def test_the_largest_entry_of_a_row_is_exact(code, signed):
    x = np.asarray(numbers(signed))
    back = np.asarray(there_and_back(jnp.asarray(x), code, signed))
    largest = np.abs(x) == tops(x)
    assert largest.sum() == 5 * 3
    assert np.array_equal(back[largest], x[largest])


@pytest.mark.sample(4)
@pytest.mark.parametrize("threshold", [None, 0, 2**32 - 1])
@every_code
def test_what_was_decoded_is_a_fixed_point(code, signed, threshold):
    """For every code, at scales of all sizes, and under any threshold."""
    first, above, back = compiled(code, signed)
    dtype = code_dtype(code, signed)
    if code == "int8":
        q = np.arange(-127 if signed else 0, 128 if signed else 256)
    elif code == "bfloat16":
        q = np.asarray(numbers(signed, (256,)))
    else:
        q = np.arange(127, dtype=np.uint8).view(dtype).astype(np.float32)
    codes = jnp.asarray(np.broadcast_to(q, (200, q.size)), dtype)
    codes = jnp.pad(codes, [(0, 0), (0, 256 - q.size)])
    if code == "bfloat16":
        scales = jnp.zeros((1, 1))
    else:
        least = 1.01 * _GRIDS[code, signed].floor
        scales = jnp.geomspace(least, 1e37, 200, dtype=jnp.float32)[:, None]
    x = back(codes, scales)
    again = first(x) if threshold is None else above(x, jnp.uint32(threshold))
    assert np.array_equal(again[0], codes)
    assert np.array_equal(again[1], scales)


@pytest.mark.sample(1)
@every_code
def test_evenly_spread_thresholds_are_unbiased(code, signed):
    """Within a step over their number, for each of a row's entries; zero stays."""
    count = 2**12
    x = numbers(signed, (8,), decades=3).at[0].set(0.0)
    thresholds = jnp.arange(count, dtype=jnp.uint32) << 20

    def once(threshold):
        return decode(*encode(x, code, signed, threshold), code, signed)

    back = np.asarray(jax.jit(jax.vmap(once))(thresholds), np.float64)
    step = back.max(0) - back.min(0)
    expected = np.asarray(x, np.float64)
    error = np.abs(back.mean(0) - expected)
    assert np.all(error <= 2 * step / count + 1e-6 * np.abs(expected))
    assert (step > 0).sum() >= 6  # All but zero and the largest.


@scaled_codes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_row_nan(code, signed, bad):
    x = np.asarray(numbers(signed)).copy()
    x[0, 0, 9] = bad
    back = np.asarray(there_and_back(jnp.asarray(x), code, signed))
    expected = np.zeros(SHAPE, bool)
    expected[0, 0] = True
    assert np.array_equal(np.isnan(back), expected)
    assert np.isfinite(back[~expected]).all()


@pytest.mark.parametrize("code", CODES[:2])
def test_a_negative_second_moment_makes_its_row_nan(code):
    x = numbers(False).at[1, 2, 26].set(-1.0)
    back = np.asarray(there_and_back(x, code, False))
    assert np.isnan(back[1, 2]).all()
    assert np.isnan(back).sum() == SHAPE[-1]


@pytest.mark.parametrize("threshold", [None, 2**32 - 1])
def test_bfloat16_keeps_what_is_not_finite(threshold):
    x = numbers(True).at[0, 0, :3].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
    back = np.asarray(there_and_back(x, "bfloat16", True, threshold))
    assert np.isnan(back[0, 0, 0])
    assert back[0, 0, 1] == np.inf
    assert back[0, 0, 2] == -np.inf
    assert np.isfinite(back).sum() == back.size - 3


@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@every_code
def test_narrow_numbers_keep_their_dtype(code, signed, dtype):
    x = numbers(signed, decades=1).astype(dtype)
    first, above, back = compiled(code, signed)
    codes, scales = first(x)
    assert scales.dtype == dtype
    again = back(codes, scales)
    assert again.dtype == dtype
    for coded in (first(again), above(again, jnp.uint32(0))):
        assert np.array_equal(coded[0], codes)
        assert np.array_equal(coded[1], scales)


def test_shapes_of_scales():
    assert scale_shape((12, 4, 3072), "int8") == (12, 4, 1)
    assert scale_shape((768, 1, 64), "float8_e4m3fn") == (768, 1, 1)
    assert scale_shape((64, 32), "int8") == (64, 1)
    assert scale_shape((64, 31), "int8") == (1, 31)
    assert scale_shape((100, 64), "bfloat16") == (1, 1)
    codes, scales = encode(jnp.ones((100, 64)), "int8", True)
    assert (codes.shape, codes.dtype) == ((100, 64), jnp.int8)
    assert (scales.shape, scales.dtype) == ((100, 1), jnp.float32)


@pytest.mark.parametrize("layout", [("x", None), (None, "x"), ("x", "y")])
def test_shards_share_the_largest_magnitudes_alone(layout):
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=axes)
    sharding = jax.NamedSharding(mesh, jax.P(*layout))
    x = jax.device_put(numbers(True, (6, 70)), sharding)

    def run(x):
        codes, scales = encode(x, "int8", True)
        return codes, scales, decode(codes, scales, "int8", True)

    program = jax.jit(run).lower(x).compile()
    sent = collectives(program.as_text())
    assert all(each.kind == "all-reduce" for each in sent)
    assert sum(math.prod(shape) for each in sent for shape in each.shapes) <= 6
    codes, scales, _ = program(x)
    assert codes.sharding.is_equivalent_to(sharding, 2)
    whole = encode(jnp.asarray(np.asarray(x)), "int8", True)
    assert np.array_equal(codes, whole[0])
    assert np.array_equal(scales, whole[1])


def test_small_columns_survive():
    # Squares would keep a tenth of the smallest entries within 30 %.
    x = numbers(True, (64, 512), decades=0) * jnp.geomspace(1e-3, 1.0, 512)
    coded = there_and_back(x, "int8", True)
    errors = np.abs(np.asarray(coded - x) / np.asarray(x))
    assert np.median(errors[:, :64]) < 0.1
