"""What CountSketch computes on other platforms and meshes, here on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as fj
from flora_jax.projections import count_sketch
from tests.common import assert_close, assert_near

KEY = jnp.array([3, 5], jnp.uint32)


@pytest.fixture(params=["cuda", "tpu", "cpu on a mesh"])
def platform(request, monkeypatch):
    name, _, mesh = request.param.partition(" ")

    def chosen(*arguments, default=None, **forms):
        return forms.get(name, default)(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    monkeypatch.setattr(count_sketch, "is_sharded", lambda: bool(mesh))
    return request.param


def sampled(rank, width):
    projection = fj.CountSketch("isometric")
    s = np.asarray(projection.matrix(KEY, rank, width), np.float64)
    return projection, projection.sample(KEY, rank, width), s


# Without and with a last, shorter chunk; fewer and more chunks than are unrolled.
@pytest.mark.parametrize(
    ("rank", "width"), [(8, 32), (8, 37), pytest.param(2, 259, marks=pytest.mark.full)]
)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(
    ("weights", "dtype"), [(None, "float32"), ((3,), "float32"), ((1,), "bfloat16")]
)
def test_sketches_are_products_with_its_matrix(
    platform, rank, width, axis, weights, dtype
):
    projection, sample, s = sampled(rank, width)
    rng = np.random.default_rng(0)
    shape = (3, 5, width) if axis == -1 else (3, width, 5)
    matrix = jnp.asarray(rng.normal(size=shape), dtype)
    full = np.asarray(matrix, np.float64)
    if weights is not None:
        weights = jnp.asarray(rng.normal(size=(*weights, width)), "float32")
        full = full * np.expand_dims(np.asarray(weights, np.float64), -3 - axis)
    found, squares = projection.compress_with_squares(
        sample, matrix, rank, axis, weights
    )
    assert found.dtype == squares.dtype == jnp.float32
    assert_close(squares, np.sum(full**2, axis, keepdims=True), "float32")
    assert_close(found, full @ s.T if axis == -1 else s @ full, "float32")


@pytest.mark.parametrize(("rank", "width"), [(8, 32), (8, 37)])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_estimates_are_products_with_its_matrix(platform, rank, width, axis, dtype):
    projection, sample, s = sampled(rank, width)
    shape = (3, 5, rank) if axis == -1 else (3, rank, 5)
    sketch = jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)
    full = np.asarray(sketch, np.float64)
    found = projection.expand(sample, sketch, width, axis)
    assert found.dtype == jnp.float32
    tolerance = 2.0**-16 if platform == "tpu" else 1e-6
    assert_near(found, full @ s if axis == -1 else s.T @ full, tolerance)


@pytest.mark.parametrize(("rank", "width"), [(8, 32), (8, 37)])
def test_transfers_are_products_of_two_matrices(platform, rank, width):
    projection, old, s = sampled(rank, width)
    other = jnp.array([7, 11], jnp.uint32)
    new = projection.sample(other, rank, width)
    t = np.asarray(projection.matrix(other, rank, width), np.float64)
    assert_close(projection.transfer(old, new, rank, width), s @ t.T, "float32")


def test_under_vmap_and_grad(platform):
    projection, sample, s = sampled(8, 37)
    matrices = jnp.asarray(np.random.default_rng(2).normal(size=(4, 5, 37)), "float32")

    def energy(matrix):
        return jnp.sum(projection.compress(sample, matrix, 8, -1) ** 2) / 2

    # Of ‖G Sᵀ‖²/2 the gradient is G Sᵀ S.
    found = jax.vmap(jax.grad(energy))(matrices)
    assert_close(found, np.asarray(matrices, np.float64) @ s.T @ s, "float32")
