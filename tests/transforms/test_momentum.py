"""Sketched momentum against the oracle and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import assert_close
from tests.reference import folds
from tests.reference.momentum import sketched_momentum
from tests.transforms.samples import case_id, run, sampled_matrix, sketch_and_rest

ALL = tuple(folds.SHAPES)
# Every shape, on its columns and on its rows, whether or not the rank divides the side.
CASES = [
    (fj.Gaussian(), "paper", "smaller", ALL),
    (fj.Gaussian(), "paper", "larger", ALL),
    (fj.Gaussian(), "paper", "left", ("tall",)),
    (fj.Gaussian(), "paper", "right", ("wide",)),
    (fj.Gaussian(), "nesterov", "smaller", ("tall", "cut")),
    (fj.Gaussian(), "fresh", "smaller", ("wide", "stack")),
    (fj.CountSketch(), "fresh", "larger", ("tall", "cut")),
    (fj.CountSketch(), "paper", "smaller", ("wide", "square", "stack")),
    (fj.CountSketch(), "paper", "left", ("tall",)),
    (fj.CountSketch(), "nesterov", "right", ("wide",)),
    (fj.CountSketch(), "residual", "smaller", ("tall", "cut", "stack")),
    (fj.CountSketch(), "residual", "larger", ("wide", "square")),
    (fj.CountSketch("isometric"), "residual", "smaller", ("wide",)),
]


def momentum(rank=folds.RANKS, decay=0.5, **settings):
    settings = {"resample_every": 3, "min_dim_size": 8, "key": 11, **settings}
    sketch, rest = sketch_and_rest(rank, settings)
    return fj.compressed_momentum(decay, sketch, **rest)


def expected_momentum(gradients, name, projection, estimator, side, every):
    """The oracle's updates, and its last momentum, of one leaf."""
    results = [
        sketched_momentum(
            matrices,
            sampled_matrix(projection, 11, "compressed_momentum", name, side),
            0.5,
            every,
            estimator,
            folds.left(name, side),
        )
        for matrices in zip(
            *(folds.fold(name, g[name]) for g in gradients), strict=True
        )
    ]
    updates = [np.stack(u) for u in zip(*(r[0] for r in results), strict=True)]
    return updates, np.stack([r[1] for r in results])


def check_oracle(gradients, projection, estimator, side, every):
    tx = momentum(
        {name: folds.RANKS[name] for name in gradients[0]},
        projection=projection,
        estimator=estimator,
        side=side,
        resample_every=every,
    )
    updates, state = run(tx, gradients)
    assert int(state.count) == len(gradients)
    for name in gradients[0]:
        expected, last = expected_momentum(
            gradients, name, projection, estimator, side, every
        )
        assert_close([folds.fold(name, u[name]) for u in updates], expected, "float32")
        kept = np.asarray(state.momentum[name], np.float64).reshape(last.shape)
        assert_close(kept, last, "float32")


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("projection", "estimator", "side", "names"), CASES, ids=case_id
)
def test_equals_algorithm_2(projection, estimator, side, names):
    # Eight steps: S is replaced before the steps 3 and 6.
    check_oracle(folds.gradients(8, names), projection, estimator, side, 3)


@pytest.mark.sample(1)
@pytest.mark.parametrize("every", [None, 1])
def test_interval_none_keeps_one_projection_and_one_replaces_it_always(every):
    gradients = folds.gradients(4, ("wide",))
    if every is None:
        check_oracle(gradients, fj.Gaussian(), "paper", "smaller", every)
    else:
        with pytest.warns(UserWarning, match="rho"):
            check_oracle(gradients, fj.Gaussian(), "paper", "smaller", every)


def test_residual_is_the_designs_formula_where_the_rank_divides_the_width():
    """The update is (r/m) M S + (G - G P), P the projector onto the rows of S."""
    r, m = folds.RANKS["tall"], 16
    gradients = folds.gradients(5, ("tall",))
    tx = momentum(r, projection=fj.CountSketch(), estimator="residual")
    s = sampled_matrix(fj.CountSketch(), 11, "compressed_momentum", "tall", "smaller")
    updates, state = run(tx, gradients)
    s, g = s(1), np.asarray(gradients[-1]["tall"], np.float64)
    kept = np.asarray(state.momentum["tall"], np.float64)
    expected = r / m * kept @ s + g - g @ (r / m * s.T @ s)
    assert_close(updates[-1]["tall"], expected, "float32")


@pytest.mark.full
@pytest.mark.parametrize("decay", [jnp.float32(0.5), np.float32(0.5)])
def test_decay_may_be_an_array(decay):
    gradients = folds.gradients(5, ("wide",))
    updates, _ = run(momentum(4, decay), gradients)
    plain, _ = run(momentum(4, float(decay)), gradients)
    assert_close(updates, plain)


@pytest.mark.sample(2)
@pytest.mark.filterwarnings("ignore:.* sketches only 0 of . leaves:UserWarning")
@pytest.mark.parametrize(
    ("estimator", "projection", "uncompressed"),
    [
        ("paper", fj.Gaussian(), optax.ema(0.5, debias=False)),
        (
            "nesterov",
            fj.Gaussian(),
            optax.chain(optax.scale(0.5), optax.trace(0.5, nesterov=True)),
        ),
        ("fresh", fj.Gaussian(), optax.ema(0.5, debias=False)),
        ("residual", fj.CountSketch(), optax.ema(0.5, debias=False)),
    ],
)
def test_dense_leaves_equal_optax(estimator, projection, uncompressed):
    rng = np.random.default_rng(1)
    shapes = {"bias": (16,), "scalar": (), "masked": (16, 24), "narrow": (16, 4)}
    gradients = [
        {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
        for _ in range(7)
    ]
    tx = momentum(
        4,
        estimator=estimator,
        projection=projection,
        mask=lambda path, shape: path != "masked",
    )
    assert_close(run(tx, gradients)[0], run(uncompressed, gradients)[0])


def test_leaves_of_a_tree_do_not_share_a_projection():
    """Nor do two epochs, nor the two transformations with one key."""
    gradients = [{"a": np.eye(16, dtype=np.float32), "b": np.eye(16, dtype=np.float32)}]
    updates, _ = run(
        momentum(4, resample_every=1, decay=0.0, estimator="paper"), 2 * gradients
    )
    with pytest.warns(UserWarning, match="every_k"):
        once = fj.compressed_accumulation(
            optax.identity(), 1, fj.Sketch(4, min_dim_size=8, key=11)
        )
    accumulated, _ = run(once, gradients)
    sampled = [updates[0]["a"], updates[0]["b"], updates[1]["a"], accumulated[0]["a"]]
    # The estimate of the identity is S'S; those of independent S differ widely.
    for i, x in enumerate(sampled):
        for y in sampled[:i]:
            assert np.abs(np.asarray(x) - np.asarray(y)).max() > 0.1


@pytest.mark.full
def test_bfloat16_gradients_and_state():
    gradients = folds.gradients(7, ("stack",))
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), gradients)
    expected, _ = run(momentum(8, projection=fj.CountSketch()), gradients)
    updates, state = run(
        momentum(8, projection=fj.CountSketch(), dtype=jnp.bfloat16), half
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    kept = jax.tree.leaves(state.momentum)
    assert {leaf.dtype for leaf in kept} == {jnp.dtype("bfloat16")}
    assert_close(updates, expected, "bfloat16")
