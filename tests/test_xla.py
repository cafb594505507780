"""The scan in place of ``jax.lax.scan``, which it equals bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax._xla import scan_without_early_buffers


def body(carry, slices):
    """Outputs of all kinds: floats of two types, ints, bools, keys."""
    x, count = carry
    (row,) = slices
    x = jnp.sin(x + row)
    key = jax.random.fold_in(jax.random.key(0), count)
    return [x, count + 1], [x, x.astype(jnp.bfloat16), count, x > 0, key]


def without_floats(carry, slices):
    (count,), (row,) = carry, slices
    return [count + 1], [row * count]


def compare(step, carry, slices, *settings):
    found, expected = (
        jax.jit(lambda c, s, scan=scan: scan(step, c, s, *settings))(carry, slices)
        for scan in (scan_without_early_buffers, jax.lax.scan)
    )
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert ours.dtype == theirs.dtype
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = map(jax.random.key_data, (ours, theirs))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("length", [0, 1, 5])
def test_equals_jaxs_scan(length, unroll, reverse):
    start = [jnp.zeros(3), jnp.asarray(3)]
    slices = [jnp.arange(3.0 * length).reshape(length, 3)]
    compare(body, start, slices, length, reverse, unroll)


def test_without_a_float_that_is_carried():
    compare(without_floats, [jnp.asarray(2)], [jnp.arange(4.0)], 4, False, 1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.complex64])
def test_types_that_are_not_promoted(dtype):
    def step(carry, slices):
        return carry, [slices[0], carry[0]]

    with jax.numpy_dtype_promotion("strict"):
        compare(step, [jnp.ones([], dtype)], [jnp.arange(4.0)], 4, False, 1)
