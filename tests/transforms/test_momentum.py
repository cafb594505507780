"""Sketched momentum against the oracle, optax and its own equations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import assert_close
from tests.reference import folds
from tests.reference.momentum import sketched_momentum
from tests.transforms.draws import draw, run

NAME = "compressed_momentum"
READINGS = ["paper", "interpolated", "residual"]
UNCOMPRESSED = {
    "paper": optax.ema(0.5, debias=False),
    "interpolated": optax.chain(optax.scale(0.5), optax.trace(0.5, nesterov=True)),
    "residual": optax.ema(0.5, debias=False),
}
CASES = [
    (projection, reading, side)
    for projection, readings in (
        (fj.Gaussian(), READINGS[:2]),
        (fj.CountSketch(), READINGS),
        (fj.CountSketch(scale="isometric"), READINGS[2:]),
    )
    for reading in readings
    for side in ("smaller", "larger", "left", "right")
]


def momentum(rank=folds.RANKS, **settings):
    settings = {"resample_every": 3, "min_dim_size": 8, "key": 11, **settings}
    return fj.compressed_momentum(0.5, rank, **settings)


@pytest.mark.parametrize(("projection", "reading", "side"), CASES)
def test_equals_algorithm_2(projection, reading, side):
    gradients = folds.gradients(8)  # Resampled before steps 3 and 6.
    tx = momentum(projection=projection, reading=reading, side=side)
    updates, state = run(tx, gradients)
    for name in folds.SHAPES:
        slices = zip(*(folds.fold(name, g[name]) for g in gradients), strict=True)
        results = [
            sketched_momentum(
                matrices,
                draw(projection, 11, NAME, name, side),
                0.5,
                3,
                reading,
                folds.left(name, side),
            )
            for matrices in slices
        ]
        expected = [np.stack(u) for u in zip(*(r[0] for r in results), strict=True)]
        assert_close([folds.fold(name, u[name]) for u in updates], expected, "float32")
        last = np.stack([r[1] for r in results])
        kept = np.asarray(state.momentum[name], np.float64)
        assert_close(kept.reshape(last.shape), last, "float32")
