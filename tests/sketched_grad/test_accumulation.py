"""Accumulators that are given sketched gradients do what full ones make them do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj

SKETCH = fj.Sketch(4, key=5, min_dim_size=8)
CYCLE = 2


def numbers(seed, *shape, scale=0.3):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


X = jnp.asarray(numbers(0, 4, 6, 16, scale=1))


def accumulated(fun, sketched, params, batches, **settings):
    tx = fj.compressed_accumulation(optax.adam(1e-2), 2, SKETCH, **settings)

    @jax.jit
    def step(params, state, x):
        if sketched:
            _, grads = fj.sketched_value_and_grad(fun, SKETCH)(state, params, x)
        else:
            grads = jax.grad(fun)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for x in batches:
        params, state = step(params, state, x)
    return params, state


def _loss(p, x):
    return jnp.mean(jnp.sin(jnp.tanh(x @ p["w"] + p["b"])))


PARAMS = {"w": numbers(1, 16, 24), "b": numbers(2, 24)}


@pytest.mark.sample(1)
@pytest.mark.parametrize("skip", [None, optax.skip_not_finite])
def test_compressed_accumulation_takes_sketches(skip):
    batches = [*X, X[0].at[0, 0].set(jnp.nan), X[1]] if skip else [*X, X[1]]
    settings = {"should_skip_update_fn": skip} if skip else {}
    ours = accumulated(_loss, True, PARAMS, batches, **settings)
    theirs = accumulated(_loss, False, PARAMS, batches, **settings)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-4, atol=1e-6
        )


@pytest.mark.sample(1)
@pytest.mark.parametrize("use_mean", [True, False])
def test_the_accumulator_of_microbatches_takes_sketches(use_mean):
    mean = optax.microbatching.AccumulationType.MEAN

    def run(value_and_grad):
        accumulator = fj.compressed_accumulator(SKETCH, step=CYCLE, use_mean=use_mean)
        return jax.jit(
            optax.microbatching.microbatch(
                value_and_grad,
                argnums=1,
                microbatch_size=2,
                accumulator=(mean, accumulator),
            )
        )(PARAMS, X)

    gradient = fj.sketched_value_and_grad(_loss, SKETCH)
    ours = run(lambda params, x: gradient(SKETCH.cycle(CYCLE), params, x))
    theirs = run(jax.value_and_grad(_loss))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"projection": fj.Gaussian()}, "with projection CountSketch.* both the same"),
        ({"key": 6}, r"with key_data \[0 5\], but it has \[0 6\]"),
        ({"side": "larger"}, "leaf 'w' planned as .* give both the same Sketch"),
    ],
)
def test_sketches_that_mean_something_else_are_refused(settings, match):
    gradient = fj.sketched_value_and_grad(_loss, SKETCH)
    grads = gradient(SKETCH.cycle(0), PARAMS, X)[1]
    other = dataclasses.replace(SKETCH, **settings)
    tx = fj.compressed_accumulation(optax.adam(1e-2), 2, other)
    with pytest.raises(ValueError, match=match):
        tx.update(grads, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=match):
        fj.compressed_accumulator(other).init(grads)
