"""Bases that are chosen from a gradient, against numpy's decompositions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as fj
from flora_jax.projections import linalg, top_svd
from tests.common import assert_close
from tests.reference.dct import dct_by_fft, dct_matrix, top_rows

KEY = np.uint32([3, 4])
PROJECTIONS = [
    fj.TopSVD(method="exact"),
    fj.TopSVD(),
    fj.TopDCT(),
    fj.TopDCT(norm="l2"),
]
BOTH = pytest.mark.parametrize("axis", [-1, -2])
each = pytest.mark.parametrize("projection", PROJECTIONS, ids=repr)


def falling(*shape, rate=0.7, seed=0):
    """Matrices whose singular values fall by a constant ratio."""
    x = np.random.default_rng(seed).normal(size=shape)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return np.float32((u * rate ** np.arange(s.shape[-1])) @ vt)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def chosen(projection, matrix, rank, axis):
    """What is stored, S, the sketch and the estimate of a matrix."""
    stored = projection.choose(KEY, matrix, rank, axis)
    sampled = projection.from_stored(stored, axis)
    width = matrix.shape[axis]
    sketch = projection.compress(sampled, matrix, rank, axis)
    return (
        stored,
        projection.as_matrix(sampled, rank, width),
        sketch,
        projection.expand(sampled, sketch, width, axis),
    )


@BOTH
@each
def test_its_methods_apply_its_matrix(projection, axis):
    g = falling(2, 12, 9)
    stored, s, sketch, estimate = chosen(projection, g, 4, axis)
    width = g.shape[axis]
    assert s.shape == (2, 4, width)
    assert_close(s @ s.swapaxes(-1, -2), np.broadcast_to(np.eye(4), (2, 4, 4)))
    s = np.asarray(s, np.float64)
    across = s.swapaxes(-1, -2)
    expected = g @ across if axis == -1 else s @ g
    assert_close(sketch, expected, "float32")
    expected = expected @ s if axis == -1 else across @ expected
    assert_close(estimate, expected, "float32")
    # One side, or both, of the folded matrix have other sizes.
    sketched, other = projection.stored_sizes(4)
    shape = {axis: sketched or width, -3 - axis: other}
    assert stored.shape == (2, shape[-2], shape[-1])
    assert stored.dtype == projection.dtype


@pytest.mark.sample(1)
@BOTH
def test_exact_singular_vectors_are_numpys(axis):
    g = falling(2, 12, 9)
    _, s, _, estimate = chosen(fj.TopSVD(method="exact"), g, 4, axis)
    u, values, vt = np.linalg.svd(g.astype(np.float64), full_matrices=False)
    expected = vt[:, :4] if axis == -1 else u[..., :4].swapaxes(-1, -2)
    signs = np.sign((s * expected).sum(-1, keepdims=True))
    assert_close(s, signs * expected, "float32")
    best = (u[..., :4] * values[:, None, :4]) @ vt[:, :4]
    assert_close(estimate, best, "float32")


@pytest.mark.sample(1)
@BOTH
def test_randomized_singular_vectors_hold_nearly_as_much(axis):
    g = falling(2, 80, 60, rate=0.9)
    _, s, sketch, _ = chosen(fj.TopSVD(), g, 8, axis)
    values = np.linalg.svd(g, compute_uv=False)
    best = (values[:, :8] ** 2).sum(-1)
    held = np.square(sketch, dtype=np.float64).sum((-1, -2))
    # The columns more than asked for bring it this near.
    assert (held > 0.999 * best).all()
    assert (held < (1 + 1e-5) * best).all()
    # One iteration in place of three holds less: they are not without effect.
    _, _, fewer, _ = chosen(fj.TopSVD(iterations=1), g, 8, axis)
    assert (np.square(fewer, dtype=np.float64).sum((-1, -2)) < held).all()


def three_products(x, right, axis):
    """A product as a TPU computes it by "high", of bfloat16 parts."""
    parts = [(a.astype(jnp.bfloat16).astype(jnp.float32), a) for a in (x, right)]
    (x, x_rest), (right, right_rest) = [(high, full - high) for high, full in parts]
    subscripts = "...nm,...mr->...nr" if axis == -1 else "...nm,...nr->...rm"
    pairs = ((x, right), (x, right_rest), (x_rest, right))
    return sum(jnp.einsum(subscripts, *pair, precision="highest") for pair in pairs)


HARD = {
    "zero": lambda rng: np.zeros((64, 64)),
    "rank 1": lambda rng: rng.normal(size=(64, 1)) @ rng.normal(size=(1, 64)),
    "ones": lambda rng: np.ones((64, 64)),
    "one row": lambda rng: np.eye(64)[:, :1] * rng.normal(size=(1, 64)),
    "tiny": lambda rng: 1e-30 * rng.normal(size=(64, 3)) @ rng.normal(size=(3, 64)),
    "huge": lambda rng: 1e30 * rng.normal(size=(64, 64)),
    "steep": lambda rng: falling(64, 64, rate=0.7),
}


@pytest.mark.parametrize("products", ["float32", "of a TPU"])
@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("name", HARD)
def test_a_basis_is_orthonormal_whatever_the_gradient(
    name, rank, products, monkeypatch
):
    if products != "float32":
        for module in (linalg, top_svd):
            monkeypatch.setattr(module, "product", three_products)
    g = np.float32(HARD[name](np.random.default_rng(0)))
    basis = jax.jit(lambda g: fj.TopSVD().choose(KEY, g, rank, -2))(g)
    basis = np.asarray(basis, np.float64)
    tolerance = 2e-6 if products == "float32" else 1e-5
    assert np.abs(basis.T @ basis - np.eye(rank)).max() < tolerance
    if name not in ("zero", "huge"):  # Of few directions, or steep: it has them all.
        kept = np.linalg.norm(basis.T @ g.astype(np.float64)) ** 2
        best = np.square(np.linalg.svd(g.astype(np.float64))[1][:rank]).sum()
        assert kept > 0.999 * best


def test_each_device_has_a_basis_of_its_own_gradient():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    grads = np.stack([falling(16, 12, seed=i) for i in range(2)])
    spec = jax.P("x")

    def choose(g):
        return fj.TopSVD().choose(KEY, g[0], 4, -1)[None]

    on_devices = jax.shard_map(choose, mesh=mesh, in_specs=spec, out_specs=spec)
    found = jax.jit(on_devices)(grads)
    for g, basis in zip(grads, found, strict=True):
        assert_close(basis, choose(g[None])[0])


@BOTH
def test_randomized_singular_vectors_of_few_columns_are_exact(axis):
    g = falling(12, 9)
    _, _, sketch, estimate = chosen(fj.TopSVD(), g, 4, axis)
    _, _, exact, best = chosen(fj.TopSVD(method="exact"), g, 4, axis)
    assert_close(np.abs(sketch), np.abs(exact))
    assert_close(estimate, best)


def test_randomized_choices_follow_the_key():
    projection, g = fj.TopSVD(), falling(80, 60, rate=0.99)
    choose = jax.jit(lambda key: projection.choose(key, g, 4, -1))
    one, same, other = (
        np.asarray(choose(np.uint32(k))) for k in ([1, 2], [1, 2], [1, 3])
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3


@BOTH
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_selected_cosines_are_those_of_the_largest_norm(norm, axis):
    rng = np.random.default_rng(1)
    g = np.float32(rng.normal(size=(3, 24, 16)))
    stored, s, _, _ = chosen(fj.TopDCT(norm=norm), g, 5, axis)
    width = g.shape[axis]
    rows = np.asarray(stored).reshape(3, 5)
    expected = np.stack([top_rows(x if axis == -2 else x.T, 5, norm) for x in g])
    np.testing.assert_array_equal(rows, expected)
    assert (np.diff(rows) > 0).all()
    assert_close(s, dct_matrix(width)[rows], "float32")
    # The other norm selects others of these: the choice is tested.
    others = [
        top_rows(x if axis == -2 else x.T, 5, {"l1": "l2", "l2": "l1"}[norm]) for x in g
    ]
    assert (rows != np.stack(others)).any()


def test_the_cosine_transform_is_the_fast_one():
    x = np.random.default_rng(2).normal(size=(24, 3))
    assert_close(dct_matrix(24) @ x, dct_by_fft(x))


@pytest.mark.sample(1)
@pytest.mark.parametrize("width", [4096, 5000])
def test_cosines_of_large_angles(width):
    rows = np.array([0, 1, width // 3, width - 2, width - 1], np.int32)
    s = jax.jit(lambda rows: fj.TopDCT().as_matrix(rows, len(rows), width))(rows)
    expected = dct_matrix(width)[rows]
    # Angles reach half as many turns as the width: float32 would lose digits of them.
    assert_close(s, expected, "float32")


@each
def test_transfers_between_bases(projection):
    old, new = falling(12, 9), falling(12, 9, seed=1)
    stored, s, _, _ = chosen(projection, old, 4, -1)
    other, t, _, _ = chosen(projection, new, 4, -1)
    read = [projection.from_stored(x, -1) for x in (stored, other)]
    c = jax.jit(lambda *read: projection.transfer(*read, 4, 9))(*read)
    s, t = np.asarray(s, np.float64), np.asarray(t, np.float64)
    np.testing.assert_allclose(c, s @ t.T, rtol=0, atol=2e-6)
    if isinstance(projection, fj.TopDCT):
        assert set(np.unique(c)) <= {0.0, 1.0}
        assert np.asarray(c).sum() == np.intersect1d(stored, other).size


@each
def test_directions(projection):
    expected = 30 if isinstance(projection, fj.TopDCT) else 20
    assert projection.directions(30, 20) == expected
    assert projection.directions(20, 30) == 20
    np.testing.assert_array_equal(projection.gram_diagonal(4, 20), np.ones(4))


@each
def test_they_are_static(projection):
    assert not callable(projection)
    assert hash(projection) == hash(type(projection)(**vars(projection)))
    with pytest.raises(AttributeError):
        projection.normalization = "unbiased"


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: fj.TopSVD("unbiased"),
            ValueError,
            "`normalization` must be one of 'isometric'",
        ),
        (
            lambda: fj.TopDCT("unbiased"),
            ValueError,
            "`normalization` must be one of 'isometric'",
        ),
        (lambda: fj.TopSVD(method="qr"), ValueError, "`method` must be one of 'exact'"),
        (lambda: fj.TopDCT(norm="l3"), ValueError, "`norm` must be one of 'l1', 'l2'"),
        (lambda: fj.TopSVD(iterations=0), ValueError, "`iterations` must be positive"),
        (lambda: fj.TopSVD(iterations=1.0), TypeError, "`iterations` must be an int"),
    ],
)
def test_bad_settings(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_widths_whose_angles_do_not_fit_in_32_bits():
    rows = jax.ShapeDtypeStruct((4,), jnp.int32)

    def entries(width):
        return jax.eval_shape(lambda rows: fj.TopDCT().as_matrix(rows, 4, width), rows)

    assert entries(46340).shape == (4, 46340)
    with pytest.raises(
        ValueError, match="takes sides up to 46340, got a side of 46341"
    ):
        entries(46341)


def test_the_largest_angle_that_fits():
    # i (2j+1) of the last row and column, below 2**32.
    last = 46339
    s = fj.TopDCT().as_matrix(jnp.array([last], jnp.int32), 1, last + 1)[0, -1]
    turns = (last * (2 * last + 1)) % (4 * (last + 1))
    expected = (2 / (last + 1)) ** 0.5 * np.cos(turns * np.pi / (2 * (last + 1)))
    np.testing.assert_allclose(s, expected, rtol=0, atol=1e-8)
