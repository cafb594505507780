"""What holds on average over keys: bias, variance, norms and cosines.

Keys are fixed. Tolerances are five standard errors, taken from the samples; where many
means are compared at once the quantile is Bonferroni's, of the same total level.
"""

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as fj
from flora_jax.random.keys import leaf_keys

KEYS, WIDTH = 2000, 48
NORMAL = statistics.NormalDist()
position = np.arange(WIDTH)
DIRECTIONS = np.stack(
    [
        np.ones(WIDTH),
        position,
        (-1.0) ** position,
        position % 7 - 2.0,
        np.cos(2 * np.pi * position / 8),
        np.where(position < WIDTH // 2, 1.0, -0.5),
        np.random.default_rng(0).normal(size=WIDTH),
        1.0 / (1 + position),
        np.isin(position, (0, 24)),
        position % 8 == 3,  # one column of each head
    ]
)
DIRECTIONS /= np.linalg.norm(DIRECTIONS, axis=1, keepdims=True)


def assert_mean(samples, expected, bound):
    """Asserts that means over the first axis are as expected, within five s.e.

    bound: what a standard error may be at most for the test to mean something.
    """
    samples = np.asarray(samples, np.float64)
    mean = samples.mean(axis=0)
    error = samples.std(axis=0, ddof=1) / math.sqrt(len(samples))
    assert error.max() < bound
    z = -NORMAL.inv_cdf(NORMAL.cdf(-5) / mean.size)
    # Some entries are the same for all keys: they have but a rounding.
    difference = np.abs(mean - expected) - 1e-5
    assert (difference <= z * error).all(), (difference / (error + 1e-9)).max()


def sample(projection, rank):
    """Sketches and estimates of the unit vectors, and then of DIRECTIONS, by key."""
    vectors = np.concatenate([np.eye(WIDTH), DIRECTIONS])
    matrix = jnp.asarray(vectors, jnp.float32)

    @jax.jit
    @jax.vmap
    def sample(epoch):
        # The keys that a transformation uses, one per epoch.
        root = jnp.array([0, 9], jnp.uint32)
        (key,) = leaf_keys(root, "test", ["h/0/kernel"], epoch)
        sketch = projection.sketch(key, matrix, rank, -1)
        return sketch, projection.unsketch(key, sketch, WIDTH, -1)

    return [np.asarray(x) for x in sample(jnp.arange(KEYS))]


# Of ranks that divide the width and do not, the smallest, and the largest.
KINDS = [fj.Gaussian, fj.Rademacher, fj.CountSketch, fj.Orthogonal, fj.SRHT]
CASES = [(kind, r) for kind in KINDS for r in (8, 7, 1, 47)]


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}"
)
def sampled(request):
    """Rank, expected squared error, sketches and estimates."""
    kind, rank = request.param
    return rank, expected_variance(kind, rank), *sample(kind(), rank)


def expected_variance(kind, rank):
    """E‖G S'S − G‖² / ‖G‖², as each projection documents it."""
    if kind == fj.Gaussian:
        return (WIDTH + 1) / rank
    if kind == fj.Rademacher:
        return (WIDTH - 1) / rank
    tail = WIDTH % rank if kind == fj.CountSketch else 0
    return WIDTH / rank - 1 + tail * (rank - tail) / (rank * WIDTH)


def largest_error(rank):
    """Of the mean of x'S'S y for unit vectors: the variance is 2/r at most (x = y)."""
    return 1.2 * math.sqrt(2 / (rank * KEYS))


@pytest.mark.sample(1)
def test_estimates_are_unbiased(sampled):
    """E[S'S] = I, entry by entry."""
    rank, _, _, estimates = sampled
    assert_mean(estimates[:, :WIDTH], np.eye(WIDTH), largest_error(rank))


@pytest.mark.sample(2)
def test_estimates_are_unbiased_along_structured_directions(sampled):
    """Many small errors of one sign would hide in the entries of S'S."""
    rank, _, _, estimates = sampled
    estimates = estimates[:, WIDTH:]
    assert_mean(estimates, DIRECTIONS, largest_error(rank))
    assert_mean((estimates * DIRECTIONS).sum(axis=-1), 1.0, largest_error(rank))


@pytest.mark.sample(3)
def test_squared_norm_of_the_sketch_is_unbiased(sampled):
    rank, _, sketches, _ = sampled
    assert_mean((sketches**2).sum(axis=-1), 1.0, largest_error(rank))


@pytest.mark.sample(2)
def test_distortion_of_norms(sampled):
    """Johnson-Lindenstrauss: E(‖Sx‖² − 1)² ≤ 2/r, of unit vectors that are not random.

    One column, two, one of each head, constant, ramp, periodic, power law.
    """
    rank, _, sketches, _ = sampled
    distortion = ((sketches**2).sum(axis=-1).astype(np.float64) - 1) ** 2
    error = distortion.std(axis=0, ddof=1) / math.sqrt(KEYS)
    assert (distortion.mean(axis=0) <= 2 / rank + 5 * error + 1e-9).all()


@pytest.mark.full
def test_where_a_count_sketch_is_weaker():
    """Two columns alone meet with probability 1/r, and then cancel or double."""
    rank, pair = 8, WIDTH + len(DIRECTIONS) - 2
    share = {}
    for kind in (fj.CountSketch, fj.Orthogonal):
        sketches, _ = sample(kind(), rank)
        squares = (sketches[:, pair] ** 2).sum(axis=-1)
        share[kind] = (np.abs(squares - 1) > 0.99).mean()
    error = math.sqrt(1 / rank * (1 - 1 / rank) / KEYS)
    assert abs(share[fj.CountSketch] - 1 / rank) < 5 * error
    assert share[fj.Orthogonal] < 0.5 / rank


@pytest.mark.sample(5)
def test_variance_is_that_of_the_formula(sampled):
    """In every direction: neither projection prefers one."""
    _, variance, _, estimates = sampled
    errors = ((estimates[:, WIDTH:] - DIRECTIONS) ** 2).sum(axis=-1)
    assert_mean(errors, variance, 0.05 * max(variance, 0.1))


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", [fj.CountSketch, fj.Orthogonal, fj.SRHT])
def test_isometric_estimates_shrink_to_the_seen_part(kind):
    """E[S'S] = (r/m) I, though r does not divide m."""
    _, estimates = sample(kind(normalization="isometric"), 7)
    assert_mean(estimates[:, :WIDTH], 7 / WIDTH * np.eye(WIDTH), 0.01)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("projection", "rank", "expected"),
    [
        (fj.Gaussian(), 256, 1 / math.sqrt(1 + 513 / 256)),
        (fj.Gaussian(), 8, 1 / math.sqrt(1 + 513 / 8)),
        (fj.CountSketch(), 256, math.sqrt(1 / 2)),
        (fj.CountSketch(), 8, math.sqrt(1 / 64)),
        (fj.Orthogonal(), 64, math.sqrt(1 / 8)),
        (fj.SRHT(), 64, math.sqrt(1 / 8)),
    ],
)
def test_cosine_of_the_estimate(projection, rank, expected):
    """Of many rows, so that the cosine of one sample is near its expectation."""
    matrix = np.random.default_rng(1).normal(size=(128, 512)).astype(np.float32)

    @jax.jit
    def cosine(key):
        sketch = projection.sketch(key, matrix, rank, -1)
        estimate = projection.unsketch(key, sketch, 512, -1)
        return jnp.vdot(matrix, estimate) / (
            jnp.linalg.norm(matrix) * jnp.linalg.norm(estimate)
        )

    cosines = [cosine(key) for key in jax.random.split(jax.random.key(1), 16)]
    assert_mean(cosines, expected, 0.02 * expected)
