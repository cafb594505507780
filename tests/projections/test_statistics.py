"""What holds on average over keys: bias, variance, norms and cosines.

Keys are fixed. Tolerances are five standard errors, taken from the samples; where many
means are compared at once the quantile is Bonferroni's, of the same total level.
"""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as fj
from flora_jax._keys import leaf_key

KEYS, WIDTH = 2000, 48
NORMAL = statistics.NormalDist()
PROJECTIONS = {"Gaussian": fj.Gaussian(), "CountSketch": fj.CountSketch()}
# Dividing the width and not, the smallest, and the largest.
CASES = [(p, r) for p in PROJECTIONS for r in (8, 7, 1, WIDTH - 1)]
position = np.arange(WIDTH)
DIRECTIONS = {
    "constant": np.ones(WIDTH),
    "ramp": position / WIDTH,
    "alternating": (-1.0) ** position,
    "period 7": position % 7 - 2.0,
    "period 8": np.cos(2 * np.pi * position / 8),
    "step": np.where(position < WIDTH // 2, 1.0, -0.5),
    "random": np.random.default_rng(0).normal(size=WIDTH),
}


def assert_mean(samples, expected, largest_error):
    """Asserts that means over the first axis are as expected, within five s.e.

    largest_error: what a standard error may be at most for the test to mean something.
    """
    samples = np.asarray(samples, np.float64)
    mean = samples.mean(axis=0)
    error = samples.std(axis=0, ddof=1) / math.sqrt(len(samples))
    assert error.max() < largest_error
    z = -NORMAL.inv_cdf(NORMAL.cdf(-5) / mean.size)
    # Some entries are the same for all keys: they have but a rounding.
    difference = np.abs(mean - expected) - 1e-5
    assert (difference <= z * error).all(), (difference / (error + 1e-9)).max()


@functools.cache
def samples(name, rank, scale="unbiased"):
    """Sketches and estimates of the unit vectors, and then of DIRECTIONS."""
    projection = type(PROJECTIONS[name])(scale=scale)
    vectors = np.concatenate([np.eye(WIDTH), [*DIRECTIONS.values()]])
    matrix = jnp.asarray(vectors, jnp.float32)

    @jax.jit
    @jax.vmap
    def draw(epoch):
        # The keys that a transformation uses, one per epoch.
        key = leaf_key(jnp.array([0, 9], jnp.uint32), "test", "h/0/kernel", epoch)
        sketch = projection.sketch(key, matrix, rank, -1)
        return sketch, projection.unsketch(key, sketch, WIDTH, -1)

    return tuple(np.asarray(x) for x in draw(jnp.arange(KEYS)))


def directions(name, rank):
    """Directions, their sketches and their estimates, all of norm 1 at first."""
    vectors = np.stack(list(DIRECTIONS.values()))
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / norms, *(x[:, WIDTH:] / norms for x in samples(name, rank))


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_estimates_are_unbiased(name, rank):
    """E[S'S] = I, entry by entry."""
    gram = samples(name, rank)[1][:, :WIDTH]
    # One entry has variance 1/r (Gaussian, off the diagonal; twice that on it).
    assert_mean(gram, np.eye(WIDTH), 1.2 * math.sqrt(2 / (rank * KEYS)))


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_estimates_are_unbiased_along_structured_directions(name, rank):
    """Many small errors of one sign would hide in the entries of S'S."""
    vectors, _, estimates = directions(name, rank)
    assert_mean(estimates, vectors, 0.2 / math.sqrt(rank))
    assert_mean((estimates * vectors).sum(axis=-1), 1.0, 0.03 / math.sqrt(rank))


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_squared_norm_of_the_sketch_is_unbiased(name, rank):
    _, sketches, _ = directions(name, rank)
    assert_mean((sketches**2).sum(axis=-1), 1.0, 0.03 / math.sqrt(rank))


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_variance_is_that_of_the_formula(name, rank):
    """In every direction: neither projection prefers one."""
    vectors, _, estimates = directions(name, rank)
    tail = WIDTH % rank
    expected = {
        "Gaussian": (WIDTH + 1) / rank,
        "CountSketch": WIDTH / rank - 1 + tail * (rank - tail) / (rank * WIDTH),
    }[name]
    errors = ((estimates - vectors) ** 2).sum(axis=-1)
    assert_mean(errors, expected, 0.05 * max(expected, 0.1))


def test_isometric_estimates_shrink_to_the_seen_part():
    """E[S'S] = (r/m) I, though r does not divide m."""
    gram = samples("CountSketch", 7, "isometric")[1][:, :WIDTH]
    assert_mean(gram, 7 / WIDTH * np.eye(WIDTH), 0.01)


@pytest.mark.parametrize(
    ("projection", "rank", "expected"),
    [
        (fj.Gaussian(), 256, 1 / math.sqrt(1 + 513 / 256)),
        (fj.Gaussian(), 8, 1 / math.sqrt(1 + 513 / 8)),
        (fj.CountSketch(), 256, math.sqrt(1 / 2)),
        (fj.CountSketch(), 8, math.sqrt(1 / 64)),
    ],
)
def test_cosine_of_the_estimate(projection, rank, expected):
    """Of many rows, so that the cosine of one draw is near its expectation."""
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
