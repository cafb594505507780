"""Random bits that must never change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.random.bits import bits as _bits
from flora_jax.random.bits import (
    by_rows,
    normals,
    random_matrix,
    signs,
    threefry_2x32,
)
from flora_jax.random.keys import leaf_keys
from tests.common import assert_close

KEY = np.array([1, 2], np.uint32)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_is_that_of_its_authors(key, counter, expected):
    """The known answers published with Random123."""
    words = [jnp.uint32(word) for word in (*key, *counter)]
    found = threefry_2x32(tuple(words[:2]), *words[2:])
    assert tuple(int(word) for word in found) == expected


def test_samples_are_those_of_the_first_release():
    np.testing.assert_array_equal(
        _bits(KEY, (2, 2), 3), [[172616543, 142308645], [2675124092, 1724348574]]
    )
    np.testing.assert_array_equal(signs(KEY, (8,), 0), [-1, -1, 1, -1, -1, 1, 1, -1])
    assert_close(
        normals(KEY, (3,), 0),
        np.array([0.28019002, -0.71377409, 0.45433894]),
        "float32",
    )
    keys = leaf_keys(jnp.asarray(KEY), "name", ["a", "h/0/kernel"], 5)
    np.testing.assert_array_equal(
        keys, [[1835323788, 1480856227], [3222607290, 3545010972]]
    )


@pytest.mark.full
def test_no_flag_of_jax_changes_them():
    expected = normals(KEY, (64,), 0)
    with jax.threefry_partitionable(False):
        np.testing.assert_array_equal(normals(KEY, (64,), 0), expected)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(normals(KEY, (64,), 0), expected)


@pytest.mark.sample(1)
@pytest.mark.parametrize("sample", [_bits, signs, normals])
def test_sharded_samples_are_the_same(sample):
    """Each device samples its own part of what one device samples."""
    mesh = jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    sharded = jax.jit(
        lambda key: sample(key, (8, 6), 0),
        out_shardings=jax.NamedSharding(mesh, jax.P("x", "y")),
    )
    whole, parts = jax.jit(lambda key: sample(key, (8, 6), 0))(KEY), sharded(KEY)
    assert parts.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(parts, whole)
    assert "all-gather" not in sharded.lower(KEY).compile().as_text()


@pytest.mark.parametrize("shape", [(24, 130), (7, 5), (1, 3)])
def test_a_matrix_by_rows_is_that_at_once(shape):
    key = jnp.array([3, 2**31], jnp.uint32)
    np.testing.assert_array_equal(by_rows(_bits, key, shape), _bits(key, shape, 0))
    for sample in (signs, normals):
        at_once = random_matrix(sample, key, shape)
        np.testing.assert_array_equal(at_once, sample(key, shape, 0))
        np.testing.assert_allclose(by_rows(sample, key, shape), at_once, rtol=1e-6)


def test_streams_shapes_and_keys_differ():
    one = np.asarray(_bits(KEY, (64,), 0))
    assert (one != _bits(KEY, (64,), 1)).all()
    assert (one != _bits(KEY[::-1], (64,), 0)).all()
    assert len(np.unique(one)) == 64


def test_uniform_and_normal():
    """Bits, signs and normals of 2**16 samples, within five standard errors."""
    n = 2**16
    words = np.asarray(_bits(KEY, (n,), 0))
    ones = (words[:, None] >> np.arange(32, dtype=np.uint32) & 1).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / n**0.5
    x = np.asarray(normals(KEY, (n,), 0), np.float64)
    for power, mean, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - mean) < 5 * (spread / n) ** 0.5
    assert np.isfinite(normals(KEY, (n,), 0)).all()


def test_keys_go_by_path_name_and_epoch():
    root = jnp.asarray(KEY)
    both = leaf_keys(root, "name", ["a", "b"], 0)
    (alone,) = leaf_keys(root, "name", ["b"], 0)
    np.testing.assert_array_equal(both[1], alone)
    others = [
        leaf_keys(root, "name", ["b"], 1),
        leaf_keys(root, "other", ["b"], 0),
        leaf_keys(root + 1, "name", ["b"], 0),
        both[:1],
    ]
    assert all((other[0] != alone).any() for other in others)
