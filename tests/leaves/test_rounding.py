"""Stochastic rounding to bfloat16: its mean, its neighbours, and its pinned bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.leaves.rounding import leaf_roundings, stochastically_rounded
from flora_jax.random.bits import bits
from flora_jax.random.keys import leaf_keys

BFLOAT16 = jnp.bfloat16
LARGEST = float(jnp.finfo(BFLOAT16).max)
SAMPLES = 1 << 14


def rounded(x, words):
    x = jnp.asarray(x, jnp.float32)
    found = stochastically_rounded(x, jnp.broadcast_to(jnp.uint32(words), x.shape))
    assert found.dtype == BFLOAT16
    return np.asarray(found, np.float32)


def neighbours(x):
    """Nearest to zero and farthest from it, by the bits of a float32."""
    pattern = np.asarray(x, np.float32).view(np.uint32)
    inner = pattern & np.uint32(0xFFFF0000)
    return inner.view(np.float32), (inner + np.uint32(1 << 16)).view(np.float32)


@pytest.mark.parametrize(
    "x", [1.001, -1.001, 0.3, -3.0e-5, 1.99, 255.7, -7.0e30, 2.0e-38]
)
def test_is_unbiased(x):
    x = np.float32(x)
    low, high = neighbours(x)
    words = bits(np.array([3, 4], np.uint32), (SAMPLES,), 0)
    found = rounded(np.full(SAMPLES, x), words)
    assert set(found) == {low, high}
    share = (float(x) - float(low)) / (float(high) - float(low))
    error = np.sqrt(share * (1 - share) / SAMPLES)
    assert abs((found == high).mean() - share) < 5 * error


def test_all_words_together_are_exact():
    """Of 2¹⁶ upper halves just as many round away from zero as they must."""
    words = jnp.arange(1 << 16, dtype=jnp.uint32) << 16
    for x in np.float32([1 + 2**-10, -(1 + 3 * 2**-22), 0.1]):
        low, high = neighbours(x)
        found = rounded(np.full(1 << 16, x), words)
        beyond = int(np.float32(x).view(np.uint32) & 0xFFFF)
        assert (found == high).sum() == beyond
        assert (found == low).sum() == (1 << 16) - beyond


@pytest.mark.parametrize("words", [0, 0xFFFFFFFF])
def test_what_bfloat16_represents_stays(words):
    every = np.arange(1 << 16, dtype=np.uint32) << 16
    every = every.view(np.float32)
    kept = every[~np.isnan(every)]
    np.testing.assert_array_equal(
        rounded(kept, words).view(np.uint32), kept.view(np.uint32)
    )


@pytest.mark.parametrize("words", [0, 0xFFFFFFFF])
def test_infinities_and_nan_stay(words):
    patterns = np.uint32([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
    assert np.isnan(rounded(patterns.view(np.float32), words)).all()
    np.testing.assert_array_equal(
        rounded([np.inf, -np.inf, 0.0, -0.0], words), [np.inf, -np.inf, 0.0, -0.0]
    )
    assert np.signbit(rounded([-0.0], words)).all()


@pytest.mark.parametrize("words", [0, 0xFFFFFFFF])
def test_beyond_the_largest_number_it_is_to_nearest(words):
    most = float(np.finfo(np.float32).max)
    x = np.float32([LARGEST, LARGEST * (1 + 2**-10), most, -most])
    expected = [LARGEST, LARGEST, np.inf, -np.inf]
    np.testing.assert_array_equal(rounded(x, words), expected)
    below = np.nextafter(np.float32(LARGEST), np.float32(0))
    assert np.isfinite(rounded([below, -below], words)).all()


def test_subnormal_numbers_have_two_neighbours():
    x = np.uint32([0x00012345, 0x80012345]).view(np.float32)
    low, high = neighbours(x)
    for words, expected in ((0, low), (0xFFFFFFFF, high)):
        found = stochastically_rounded(jnp.asarray(x), jnp.full(2, words, jnp.uint32))
        found = np.asarray(jax.lax.bitcast_convert_type(found, jnp.uint16))
        np.testing.assert_array_equal(found, expected.view(np.uint32) >> 16)


def test_words_are_those_of_the_first_release():
    params = {"h": {"0": jnp.ones((2, 3), BFLOAT16)}, "b": jnp.ones(2)}
    plain, stacked = leaf_roundings(np.array([1, 2], np.uint32), params)
    assert plain is None
    words = [
        [1099887755, 693994607, 4088651314],
        [671723635, 2860007270, 2598576149],
    ]
    np.testing.assert_array_equal(stacked.words(), words)
    (key,) = leaf_keys(jnp.uint32([1, 2]), "apply_updates", ["h/0"], 0)
    np.testing.assert_array_equal(bits(key, (2, 3), 0), words)


def test_words_of_a_part_are_those_of_the_leaf():
    """The index of an element is all that its word depends on, besides the key."""
    (whole,) = leaf_roundings(
        np.array([1, 2], np.uint32), {"w": jnp.ones((4, 3, 5), BFLOAT16)}
    )
    words = np.asarray(whole.words())
    for axis in range(3):
        offsets = list(whole.offsets)
        offsets[axis] = jnp.take(offsets[axis], jnp.array([2, 0]), axis)
        part = whole._replace(offsets=tuple(offsets)).words()
        np.testing.assert_array_equal(part, np.take(words, [2, 0], axis))
    assert len(set(words.ravel())) == words.size
