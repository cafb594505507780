"""Who takes sketches in place of gradients, who refuses them, and what they weigh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import assert_close
from tests.transforms.samples import case_id


def sketch_of(**settings):
    return fj.Sketch(4, key=3, min_dim_size=8, **settings)


PARAMS = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 24)), jnp.float32),
    "b": jnp.zeros(24),
}
BATCHES = np.random.default_rng(1).normal(size=(7, 12, 16)).astype(np.float32)


def loss(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


@pytest.mark.sample(1)
@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("projection", [fj.CountSketch(), fj.Gaussian()], ids=str)
@pytest.mark.filterwarnings("ignore:compressed_momentum with resample_every")
def test_compressed_momentum_takes_sketches(every, projection):
    """Past two resamples: the same parameters as with full gradients."""
    sketch = sketch_of(projection=projection)
    tx = optax.chain(
        fj.compressed_momentum(0.5, sketch, resample_every=every, estimator="paper"),
        optax.scale_by_learning_rate(0.1),
    )

    def sketched(params, state, x):
        return fj.sketched_value_and_grad(loss, sketch)(state, params, x)[1]

    def full(params, state, x):
        return jax.grad(loss)(params, x)

    @functools.partial(jax.jit, static_argnums=0)
    def step(gradient, params, state, x):
        updates, state = tx.update(gradient(params, state, x), state, params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
        return optax.apply_updates(params, updates), state

    ends = []
    for gradient in (sketched, full):
        params, state = PARAMS, tx.init(PARAMS)
        for x in BATCHES:
            params, state = step(gradient, params, state, x)
        ends.append((params, state[0].momentum))
    assert_close(*ends)


@functools.cache
def sketches(projection=None):
    """Those that compressed_accumulation takes, of its first cycle."""
    sketch = sketch_of(projection=projection)
    gradient = jax.jit(fj.sketched_value_and_grad(loss, sketch))
    return gradient(sketch.cycle(0), PARAMS, BATCHES[0])[1]


def momentum(sketch, estimator):
    return fj.compressed_momentum(0.5, sketch, estimator=estimator)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        *[
            (lambda sketch, e=e: momentum(sketch, e), f"'{e}' adds")
            for e in ("nesterov", "fresh", "residual")
        ],
        (
            lambda sketch: fj.flora(0.1, sketch, estimator="paper"),
            "averages the squares",
        ),
        (lambda _: fj.scale_by_factored_rms(), "averages the squares"),
        (lambda sketch: fj.galore(0.1, sketch), "squares its own sketches"),
        (
            lambda _: fj.orthogonalize(rules=fj.LeafRules(min_dim_size=8)),
            "needs full matrices",
        ),
    ],
)
def test_what_needs_the_gradient_refuses(make, match):
    tx = make(sketch_of())
    with pytest.raises(TypeError, match=f"SketchedGradients.*{match}.*use jax.grad"):
        tx.update(sketches(), tx.init(PARAMS), PARAMS)


def test_sketches_for_another_transformation_are_refused():
    tx = momentum(sketch_of(), "paper")
    with pytest.raises(ValueError, match="give .* the state of compressed_momentum"):
        tx.update(sketches(), tx.init(PARAMS))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "projection",
    [
        fj.CountSketch(),
        fj.CountSketch("isometric"),
        fj.Gaussian(),
        fj.Rademacher(),
        fj.Orthogonal(),
        fj.Orthogonal("isometric"),
        fj.SRHT(),
    ],
    ids=case_id,
)
def test_the_norm_is_an_unbiased_estimate(projection):
    """Of the square: within five standard errors over 400 cycles."""
    sketch = sketch_of(projection=projection)

    @jax.jit
    def squares(cycles):
        def one(cycle):
            gradient = fj.sketched_value_and_grad(loss, sketch)
            return gradient(sketch.cycle(cycle), PARAMS, BATCHES[0])[1].global_norm()

        return jax.lax.map(one, cycles) ** 2

    found = np.asarray(squares(jnp.arange(400)), np.float64)
    expected = float(optax.tree.norm(jax.grad(loss)(PARAMS, BATCHES[0])) ** 2)
    error = found.std(ddof=1) / np.sqrt(len(found))
    assert 0 < error < 0.1 * expected
    assert abs(found.mean() - expected) < 5 * error


@pytest.mark.full
def test_clip_by_global_norm_clips_by_the_estimate():
    given = sketches()
    limit = float(0.5 * given.global_norm())
    inner = fj.compressed_accumulation(optax.sgd(1.0), 2, sketch_of())
    tx = optax.chain(optax.clip_by_global_norm(limit), inner)
    _, state = tx.update(given, tx.init(PARAMS), PARAMS)
    halved = jax.tree.map(lambda x: 0.5 * x, given.tree)
    assert_close(state[1].acc_grads, halved)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda tx: optax.masked(tx, {"w": True, "b": True}), "SketchedGradients"),
        (lambda tx: optax.apply_if_finite(tx, 3), "cond branch outputs"),
    ],
)
def test_wrappers_that_map_over_the_tree_fail(make, why):
    """As the docstring says; there is a setting of the accumulation for each."""
    tx = make(fj.compressed_accumulation(optax.sgd(1.0), 2, sketch_of()))
    with pytest.raises((TypeError, ValueError), match=why):
        tx.update(sketches(), tx.init(PARAMS), PARAMS)


@pytest.mark.full
def test_quantized_states_and_hyperparameters_pass_sketches_on():
    plain = fj.compressed_accumulation(optax.sgd(1.0, 0.9), 2, sketch_of())
    given = sketches()

    def cycle(tx):
        update = jax.jit(tx.update)
        _, state = update(given, tx.init(PARAMS), PARAMS)
        return update(given, state, PARAMS)[0]

    coded = fj.quantize_state(plain, min_size=16)
    injected = optax.inject_hyperparams(
        lambda decay: fj.compressed_accumulation(optax.sgd(1.0, decay), 2, sketch_of())
    )(decay=0.9)
    for tx, tolerance in ((coded, 0.02), (injected, 1e-6)):
        for x, y in zip(
            jax.tree.leaves(cycle(tx)), jax.tree.leaves(cycle(plain)), strict=True
        ):
            size = np.linalg.norm(y)
            assert size > 0
            assert np.linalg.norm(x - y) <= tolerance * size


@pytest.mark.sample(1)
@pytest.mark.parametrize("projection", [fj.CountSketch(), fj.Gaussian()], ids=case_id)
def test_sketches_can_be_clipped(projection):
    """A clip by the estimate scales all leaves alike."""
    given = sketches(projection=projection)
    limit = 0.5 * given.global_norm()
    clipped = jax.tree.map(lambda x: x * limit / given.global_norm(), given)
    assert_close(clipped.global_norm(), limit)
