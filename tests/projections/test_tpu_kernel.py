"""The kernel that sketches and squares in one pass on a TPU, here interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as fj
from flora_jax.projections import count_sketch, tpu_kernel

WIDTH, OTHER, RANK = 512, 256, 128


def sides(axis):
    rng = np.random.default_rng(0)
    shape = (OTHER, WIDTH) if axis == -1 else (WIDTH, OTHER)
    s = rng.choice([-1.0, 0.0, 1.0], size=(RANK, WIDTH))
    return jnp.asarray(s, jnp.bfloat16), jnp.asarray(rng.normal(size=shape), "float32")


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("axis", [-1, -2])
def test_equals_a_product_and_sums(axis, weighed):
    s, matrix = sides(axis)
    weights = None
    full = np.asarray(matrix, np.float64)
    if weighed:
        weights = jnp.asarray(
            np.random.default_rng(1).uniform(0.5, 2, WIDTH), "float32"
        )
        full = full * np.expand_dims(np.asarray(weights, np.float64), -3 - axis)
    found, squares = tpu_kernel.sketch_with_squares(s, matrix, weights, axis, True)
    wide = np.asarray(s, np.float64)
    expected = full @ wide.T if axis == -1 else wide @ full
    # G is left with an error of 2⁻¹⁶ or less; without a second part it would be 2⁻⁹.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-17 * scale)
    np.testing.assert_allclose(squares, np.sum(full**2, axis, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("axis", [-1, -2])
def test_its_derivatives_are_those_of_a_product(axis):
    s, matrix = sides(axis)
    weights = jnp.linspace(0.5, 2, WIDTH)

    def reference(matrix, weights):
        full = matrix * jnp.expand_dims(weights, -3 - axis)
        wide = s.astype(jnp.float32)
        sketch = full @ wide.T if axis == -1 else wide @ full
        return sketch, jnp.sum(full * full, axis, keepdims=True)

    def loss(fn):
        def summed(*arguments):
            sketch, squares = fn(*arguments)
            return jnp.sum(jnp.sin(sketch / 30)) + jnp.sum(jnp.sqrt(squares))

        return jax.grad(summed, argnums=(0, 1))(matrix, weights)

    ours = loss(lambda *x: tpu_kernel.sketch_with_squares(s, *x, axis, True))
    for x, y in zip(ours, loss(reference), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * np.abs(y).max())


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("weights", [None, (1,), (3,)])
def test_a_stack_is_sketched_as_by_products(axis, weights, monkeypatch):
    def chosen(*arguments, tpu, **others):
        return tpu(*arguments)

    interpreted = functools.partial(tpu_kernel.sketch_with_squares, interpret=True)
    calls = []

    def once(*arguments):
        calls.append(arguments)
        return interpreted(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    projection = fj.CountSketch("isometric")
    sampled = projection.sample(jnp.array([3, 5], jnp.uint32), RANK, WIDTH)
    shape = (3, OTHER, WIDTH) if axis == -1 else (3, WIDTH, OTHER)
    matrix = jax.random.normal(jax.random.key(0), shape)
    if weights is not None:
        weights = jax.random.uniform(jax.random.key(1), (*weights, WIDTH))
    give = projection.compress_with_squares
    monkeypatch.setattr(tpu_kernel, "sketch_with_squares", once)
    found = give(sampled, matrix, RANK, axis, weights)
    assert calls
    monkeypatch.setattr(count_sketch.tpu_kernel, "fits", lambda *_: False)
    calls.clear()
    expected = give(sampled, matrix, RANK, axis, weights)
    assert not calls
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_only_what_fits_and_can_have_no_other_device(monkeypatch):
    assert not tpu_kernel.fits((WIDTH, OTHER), RANK, -1)  # Of eight devices here.
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert tpu_kernel.fits((7, OTHER, WIDTH), RANK, -1)
    assert tpu_kernel.fits((WIDTH, OTHER), RANK, -2)
    assert not tpu_kernel.fits((OTHER, WIDTH + 1), RANK, -1)
    assert not tpu_kernel.fits((OTHER - 1, WIDTH), RANK, -1)
    assert not tpu_kernel.fits((OTHER, WIDTH), RANK - 1, -1)
    assert not tpu_kernel.fits((4096, 2**15), 128, -1)
