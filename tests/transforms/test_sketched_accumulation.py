"""Accumulators that are given sketched gradients do what full ones make them do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.transforms.draws import jit

RULES = {"min_dim_size": 8}
RANK, SEED, CYCLE = 4, 3, 2


def numbers(seed, *shape, scale=0.3):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


X = jnp.asarray(numbers(0, 4, 6, 16, scale=1))


def accumulated(fun, sketched, params, batches, **settings):
    tx = fj.compressed_accumulation(
        optax.adam(1e-2), 2, RANK, key=5, **RULES, **settings
    )

    @jit
    def step(params, state, x):
        if sketched:
            key, cycle = state.key, state.gradient_step
            _, grads = fj.sketched_value_and_grad(
                fun, RANK, key=key, step=cycle, **RULES
            )(params, x)
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


@pytest.mark.parametrize("use_mean", [True, False])
def test_the_accumulator_of_microbatches_takes_sketches(use_mean):
    mean = optax.microbatching.AccumulationType.MEAN

    def run(value_and_grad):
        accumulator = fj.compressed_accumulator(
            RANK, key=SEED, step=CYCLE, use_mean=use_mean, **RULES
        )
        return jit(
            optax.microbatching.microbatch(
                value_and_grad,
                argnums=1,
                microbatch_size=2,
                accumulator=(mean, accumulator),
            )
        )(PARAMS, X)

    ours = run(fj.sketched_value_and_grad(_loss, RANK, key=SEED, step=CYCLE, **RULES))
    theirs = run(jax.value_and_grad(_loss))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"projection": fj.Gaussian()}, "give both the same `projection`"),
        ({"side": "larger"}, "leaf 'w' planned as .* give both the same rank"),
    ],
)
def test_sketches_that_mean_something_else_are_refused(settings, match):
    value_and_grad = fj.sketched_value_and_grad(_loss, RANK, key=5, **RULES)
    grads = value_and_grad(PARAMS, X)[1]
    tx = fj.compressed_accumulation(
        optax.adam(1e-2), 2, RANK, key=5, **RULES, **settings
    )
    with pytest.raises(ValueError, match=match):
        tx.update(grads, tx.init(PARAMS), PARAMS)
