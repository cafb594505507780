"""The kernel that sketches and squares in one pass on a TPU, here interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as fj
from flora_jax.projections import tpu_kernel
from flora_jax.projections.linalg import product_with_squares

WIDTH, OTHER, RANK = 512, 256, 128
both_axes = pytest.mark.parametrize("axis", [-1, -2])


def sides(axis, dtype="bfloat16"):
    rng = np.random.default_rng(0)
    shape = (OTHER, WIDTH) if axis == -1 else (WIDTH, OTHER)
    exact = dtype == "bfloat16"
    size = (RANK, WIDTH)
    s = rng.choice([-1.0, 0.0, 1.0], size) if exact else rng.normal(size=size)
    return jnp.asarray(s, dtype), jnp.asarray(rng.normal(size=shape), "float32")


@pytest.fixture
def interpreted(monkeypatch):
    """What a TPU would run, if it were alone; how often its kernel is called."""
    calls = []
    kernel = functools.partial(tpu_kernel.sketch_with_squares, interpret=True)

    def counted(*arguments):
        calls.append(arguments)
        return kernel(*arguments)

    def on_tpu(*arguments, tpu, **others):
        return tpu(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_tpu)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(tpu_kernel, "sketch_with_squares", counted)
    return calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weighed", [False, True])
@both_axes
def test_equals_a_product_and_sums(axis, weighed, dtype):
    s, matrix = sides(axis, dtype)
    weights, full = None, np.asarray(matrix, np.float64)
    if weighed:
        weights = jnp.linspace(0.5, 2, WIDTH)
        full = full * np.expand_dims(np.asarray(weights, np.float64), -3 - axis)
    found, squares = tpu_kernel.sketch_with_squares(s, matrix, weights, axis, True)
    wide = np.asarray(s, np.float64)
    expected = full @ wide.T if axis == -1 else wide @ full
    # 2⁻¹⁶ of the entries or less; without the second parts it would be 2⁻⁹.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-16 * scale)
    np.testing.assert_allclose(squares, np.sum(full**2, axis, keepdims=True), rtol=1e-6)


@both_axes
def test_its_derivatives_are_those_of_a_product(axis):
    s, matrix = sides(axis, "float32")
    weights = jnp.linspace(0.5, 2, WIDTH)

    def gradients(fn):
        def loss(*arguments):
            sketch, squares = fn(*arguments)
            return jnp.sum(jnp.sin(sketch / 30)) + jnp.sum(jnp.sqrt(squares))

        return jax.grad(loss, argnums=(0, 1, 2))(s, matrix, weights)

    ours = gradients(lambda *x: tpu_kernel.sketch_with_squares(*x, axis, True))
    theirs = gradients(lambda *x: product_with_squares(*x, axis, weigh_s=False))
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * np.abs(y).max())


@pytest.mark.parametrize("projection", [fj.CountSketch("isometric"), fj.Gaussian()])
@pytest.mark.parametrize("weights", [None, (1,), (3,)])
@both_axes
def test_a_stack_shares_a_random_projection(projection, axis, weights, interpreted):
    sampled = projection.sample(jnp.array([3, 5], jnp.uint32), RANK, WIDTH)
    shape = (3, OTHER, WIDTH) if axis == -1 else (3, WIDTH, OTHER)
    matrix = jax.random.normal(jax.random.key(0), shape)
    if weights is not None:
        weights = jax.random.uniform(jax.random.key(1), (*weights, WIDTH))
    compress = projection.compress_with_squares
    found = compress(sampled, matrix, RANK, axis, weights)
    assert len(interpreted) == 1
    s = projection.as_matrix(sampled, RANK, WIDTH)
    full = matrix
    if weights is not None:
        full = matrix * jnp.expand_dims(weights, -3 - axis)
    subscripts = "bnm,rm->bnr" if axis == -1 else "bnm,rn->brm"
    expected = jnp.einsum(subscripts, full, s)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-3)
    squares = jnp.sum(full * full, axis, keepdims=True)
    np.testing.assert_allclose(found[1], squares, rtol=1e-5)


@both_axes
def test_each_matrix_of_a_stack_has_its_stored_basis(axis, interpreted):
    shape = (3, OTHER, WIDTH) if axis == -1 else (3, WIDTH, OTHER)
    matrix = jax.random.normal(jax.random.key(0), shape)
    bases = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (3, WIDTH, RANK)))[0]
    sampled = bases.swapaxes(-1, -2)
    projection = fj.TopSVD()
    s = projection.as_matrix(sampled, RANK, WIDTH)
    found, _ = projection.compress_with_squares(sampled, matrix, RANK, axis)
    assert len(interpreted) == 1
    subscripts = "bnm,brm->bnr" if axis == -1 else "bnm,brn->brm"
    np.testing.assert_allclose(
        found, jnp.einsum(subscripts, matrix, s), rtol=1e-4, atol=1e-4
    )


def test_only_what_fits():
    def fits(rank, width, other, dtype="float32"):
        s = jax.ShapeDtypeStruct((rank, width), jnp.float32)
        matrix = jax.ShapeDtypeStruct((7, other, width), jnp.dtype(dtype))
        return tpu_kernel.fits(s, matrix, -1)

    assert fits(RANK, WIDTH, OTHER)
    assert not fits(RANK, WIDTH, OTHER, "bfloat16")
    assert not fits(RANK, WIDTH + 1, OTHER)
    assert not fits(RANK, WIDTH, OTHER - 1)
    assert not fits(RANK - 1, WIDTH, OTHER)
    assert not fits(RANK, 2**15, 4096)


def test_only_a_program_that_can_have_no_other_device(interpreted, monkeypatch):
    s, matrix = sides(-1)
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        tpu_kernel.product_with_squares(s, matrix, None, -1)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    tpu_kernel.product_with_squares(s, matrix, None, -1)
    assert not interpreted
