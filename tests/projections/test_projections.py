"""Projections against their own matrix, for each key."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as fj
from tests.common import assert_close

WIDTH = 12
ISOMETRIC = fj.CountSketch(normalization="isometric")
KINDS = [fj.Gaussian, fj.Rademacher, fj.CountSketch, fj.Orthogonal, fj.SRHT]
ISOMETRIES = [fj.CountSketch, fj.Orthogonal, fj.SRHT]
PROJECTIONS = {kind.__name__: kind() for kind in KINDS}
PROJECTIONS |= {
    f"isometric {k.__name__}": k(normalization="isometric") for k in ISOMETRIES
}
# Dividing the width and not, the smallest, the largest that is below it, and itself.
RANKS = [4, 5, 1, WIDTH - 1, WIDTH]
CASES = [
    *((fj.CountSketch(), rank) for rank in RANKS),
    *(
        (kind(), rank)
        for kind in KINDS
        if kind != fj.CountSketch
        for rank in (5, 1, 11)
    ),
    *(
        (kind(normalization="isometric"), rank)
        for kind in ISOMETRIES
        for rank in (4, 5)
    ),
]
each_projection = pytest.mark.parametrize(
    "projection", PROJECTIONS.values(), ids=PROJECTIONS
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 2, 4))
def there_and_back(projection, key, rank, matrix, axis):
    sketch = projection.sketch(key, matrix, rank, axis)
    return sketch, projection.unsketch(key, sketch, matrix.shape[axis], axis)


@functools.cache
def matrix_of(projection, rank, width=WIDTH, seed=1):
    s = projection.matrix(jax.random.key(seed), rank, width)
    assert s.shape == (rank, width)
    assert s.dtype == jnp.float32
    return np.asarray(s, np.float64)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("projection", "rank"), CASES)
def test_sketches_columns_with_its_matrix(projection, rank):
    """G S' and G S' S, of a stack that shares one S."""
    s, g = matrix_of(projection, rank), normal(2, 3, 7, WIDTH)
    sketch, estimate = there_and_back(projection, jax.random.key(1), rank, g, -1)
    assert_close(sketch, g @ s.T, "float32")
    assert_close(estimate, g @ s.T @ s, "float32")


@pytest.mark.sample(1)
@pytest.mark.parametrize(("projection", "rank"), CASES)
def test_sketches_rows_with_the_same_matrix(projection, rank):
    """S G and S' S G."""
    s, g = matrix_of(projection, rank), normal(2, WIDTH, 7)
    sketch, estimate = there_and_back(projection, jax.random.key(1), rank, g, -2)
    assert_close(sketch, s @ g, "float32")
    assert_close(estimate, s.T @ s @ g, "float32")


@pytest.mark.full
@pytest.mark.parametrize("width", [13, 30, 64, 97])
@pytest.mark.parametrize("axis", [-1, -2])
def test_any_width(width, axis):
    """Primes, and widths that no power of two divides."""
    for projection in (fj.CountSketch(), fj.SRHT()):
        s, g = matrix_of(projection, 8, width), normal(width, width)
        sketch, estimate = there_and_back(projection, jax.random.key(1), 8, g, axis)
        expected = g @ s.T if axis == -1 else s @ g
        assert_close(sketch, expected, "float32")
        assert_close(estimate, expected @ s if axis == -1 else s.T @ expected)


@pytest.mark.sample(1)
@each_projection
def test_unsketch_is_the_adjoint_of_sketch(projection):
    """<sketch(x), y> = <x, unsketch(y)>, of rows and of columns."""
    x, y = normal(WIDTH, WIDTH), normal(WIDTH, 5, seed=1)

    @jax.jit
    def both(key):
        columns = projection.sketch(key, x, 5, -1), projection.unsketch(key, y, 12, -1)
        rows = projection.sketch(key, x, 5, -2), projection.unsketch(key, y.T, 12, -2)
        return columns, rows

    for (sketch, estimate), other in zip(
        both(jax.random.key(2)), (y, y.T), strict=True
    ):
        sketch, estimate = np.float64(sketch), np.float64(estimate)
        size = np.linalg.norm(sketch) * np.linalg.norm(other)
        assert abs((sketch * other).sum() - (x * estimate).sum()) < 1e-6 * size


@pytest.mark.sample(1)
@each_projection
def test_both_are_linear_and_differentiable(projection):
    """The gradient of <sketch(x), y> in x is unsketch(y)."""
    x, y = normal(7, WIDTH), normal(7, 4, seed=1)

    @jax.jit
    def gradients(key):
        of_sketch = jax.grad(lambda x: (projection.sketch(key, x, 4, -1) * y).sum())(x)
        of_estimate = jax.grad(
            lambda y: (projection.unsketch(key, y, WIDTH, -1) * x).sum()
        )(y)
        return of_sketch, of_estimate

    of_sketch, of_estimate = gradients(jax.random.key(1))
    s = matrix_of(projection, 4)
    assert_close(of_sketch, y @ s, "float32")
    assert_close(of_estimate, x @ s.T, "float32")


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("projection", [fj.CountSketch(), ISOMETRIC])
def test_rows_of_a_count_sketch_are_orthogonal(projection, rank):
    s = matrix_of(projection, rank)
    gram = projection.gram_diagonal(rank, WIDTH)
    assert gram.shape == (rank,)
    assert_close(np.diag(gram), s @ s.T, "float32")
    sizes = np.sort(np.count_nonzero(s, axis=1))
    assert sizes.sum() == WIDTH
    assert sizes[-1] - sizes[0] <= 1
    assert (np.count_nonzero(s, axis=0) == 1).all()
    expected = np.ones(rank) if projection == ISOMETRIC else sizes[::-1]
    assert_close(np.sort(gram)[::-1], expected, "float32")
    if WIDTH % rank == 0 and projection != ISOMETRIC:
        assert_close(s @ s.T, WIDTH / rank * np.eye(rank), "float32")


@pytest.mark.sample(1)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("normalization", ["unbiased", "isometric"])
@pytest.mark.parametrize("kind", [fj.Orthogonal, fj.SRHT])
def test_scaled_isometries(kind, normalization, rank):
    """S S' = (m/r) I, or I."""
    projection = kind(normalization=normalization)
    s, gram = matrix_of(projection, rank), projection.gram_diagonal(rank, WIDTH)
    square = WIDTH / rank if normalization == "unbiased" else 1.0
    assert_close(s @ s.T, square * np.eye(rank), "float32")
    assert_close(gram, np.full(rank, square), "float32")


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", [fj.Gaussian, fj.Rademacher])
def test_rows_of_independent_entries_are_not_orthogonal(kind):
    assert kind().gram_diagonal(4, WIDTH) is None
    gram = matrix_of(kind(), 4) @ matrix_of(kind(), 4).T
    assert np.abs(gram - np.diag(np.diag(gram))).max() > 0.1


def test_entries_of_rademacher():
    s = matrix_of(fj.Rademacher(), 4)
    assert set(np.unique(s)) == {-0.5, 0.5}


def test_haar_signs_are_random():
    """QR alone returns columns of one sign: the mean of the diagonal would not be 0."""
    corners = [matrix_of(fj.Orthogonal(), 1, 2, seed)[0, 0] for seed in range(12)]
    assert min(corners) < 0 < max(corners)


@pytest.mark.sample(1)
@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize("kind", ISOMETRIES)
def test_isometric_estimates_are_orthogonal_projections(kind, rank):
    """P = P' = P P of rank r, so that they shrink."""
    _, p = there_and_back(
        kind(normalization="isometric"),
        jax.random.key(3),
        rank,
        np.eye(WIDTH, dtype=np.float32),
        -1,
    )
    p = np.asarray(p, np.float64)
    assert_close(p, p.T, "float32")
    assert_close(p @ p, p, "float32")
    assert np.linalg.matrix_rank(p, tol=1e-5) == rank
    assert_close(np.trace(p), np.float64(rank), "float32")


def test_count_sketch_of_full_rank_is_a_signed_permutation():
    s = matrix_of(fj.CountSketch(), WIDTH)
    assert set(np.unique(s)) == {-1, 0, 1}
    assert (s @ s.T == np.eye(WIDTH)).all()


@pytest.mark.sample(1)
@each_projection
def test_the_same_under_jit_as_without(projection):
    g, key = normal(7, WIDTH), jax.random.key(1)
    sample = functools.partial(projection.matrix, rank=5, width=WIDTH)
    jitted, eager = jax.jit(sample)(key), sample(key)
    # XLA fuses the factors of an entry, which saves a rounding.
    if not isinstance(projection, fj.CountSketch):
        assert_close(jitted, eager)
    else:
        np.testing.assert_array_equal(jitted, eager)
    sketch, estimate = there_and_back(projection, key, 5, g, -1)
    assert_close(sketch, projection.sketch(key, g, 5, -1))
    assert_close(estimate, projection.unsketch(key, sketch, WIDTH, -1))


@each_projection
def test_another_key_is_another_matrix(projection):
    first, second = (matrix_of(projection, 4, seed=seed) for seed in (1, 2))
    assert (first != second).mean() > 0.2


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("projection", "rank", "width", "expected"),
    [
        (
            fj.CountSketch(),
            3,
            8,
            [
                [0, 0, 1, 0, -1, 0, 0, -1],
                [1, 0, 0, 1, 0, 1, 0, 0],
                [0, -1, 0, 0, 0, 0, 1, 0],
            ],
        ),
        (
            fj.CountSketch(),
            4,
            8,
            [
                [0, 0, 0, 1, 0, 0, 1, 0],
                [1, 0, 0, 0, 0, 0, 0, -1],
                [0, -1, 0, 0, -1, 0, 0, 0],
                [0, 0, 1, 0, 0, 1, 0, 0],
            ],
        ),
        (
            fj.Gaussian(),
            2,
            3,
            [[-0.9047996, 1.2585086, -1.2233642], [-0.1483895, -0.0244418, -0.4154533]],
        ),
        (fj.Rademacher(), 1, 6, [[1, -1, 1, 1, -1, 1]]),
        (
            fj.Orthogonal(),
            2,
            3,
            [[-0.7281822, -0.9845628, -0.0196708], [0.9226032, -0.6735308, -0.441769]],
        ),
        (
            fj.SRHT(),
            2,
            4,
            [
                [0.7071067, 0.7071067, -0.7071067, 0.7071067],
                [0.7071067, 0.7071067, 0.7071067, -0.7071067],
            ],
        ),
    ],
)
def test_matrices_are_those_of_the_first_release(projection, rank, width, expected):
    """A checkpoint must decode for ever: these numbers never change."""
    matrix = projection.matrix(jax.random.key(42), rank, width)
    assert_close(matrix, np.array(expected), "float32")


@pytest.mark.sample(1)
@each_projection
def test_is_a_static_setting(projection):
    """optax.inject_hyperparams takes whatever is callable for a schedule."""
    assert not callable(projection)
    copy = dataclasses.replace(projection)
    assert copy == projection
    assert hash(copy) == hash(projection)
    with pytest.raises(dataclasses.FrozenInstanceError):
        projection.normalization = "isometric"
    assert jax.tree.leaves(projection) == [projection]


def test_those_that_differ_are_not_equal():
    assert len(set(PROJECTIONS.values())) == len(PROJECTIONS)


@pytest.mark.parametrize("kind", [fj.Gaussian, fj.Rademacher])
def test_independent_entries_cannot_be_isometric(kind):
    with pytest.raises(ValueError, match="'isometric'.*use Orthogonal"):
        kind(normalization="isometric")
