"""The accumulator for optax.microbatching equals the transformation's cycle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import assert_close
from tests.transforms.draws import jit, run

SETTINGS = {"min_dim_size": 8, "key": 3}
MEAN = optax.microbatching.AccumulationType.MEAN
DATA = np.random.default_rng(4).normal(size=(8, 16)).astype(np.float32)
PARAMS = {
    "w": np.random.default_rng(5).normal(size=(16, 24)).astype(np.float32),
    "b": np.zeros(24, np.float32),
}


def loss(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


gradient_of = jit(jax.grad(loss))


def cycle(gradients, number, use_mean, **settings):
    """What compressed_accumulation gives to its inner transformation in one cycle."""
    tx = fj.compressed_accumulation(
        optax.identity(),
        len(gradients),
        4,
        use_grad_mean=use_mean,
        **SETTINGS,
        **settings,
    )
    fresh = tx.init(gradients[0])._replace(gradient_step=jnp.int32(number))
    state, step = fresh, jit(tx.update)
    for gradient in gradients:
        update, state = step(gradient, state)
    return update


@pytest.mark.parametrize("use_mean", [True, False])
@pytest.mark.parametrize("projection", [fj.Gaussian(), fj.CountSketch()])
def test_equals_compressed_accumulation(projection, use_mean):
    rng = np.random.default_rng(6)
    gradients = [
        {"w": rng.normal(size=(3, 16, 24)).astype(np.float32), "b": np.ones(3, "f4")}
        for _ in range(4)
    ]

    @jit
    def accumulate(gradients, step):
        accumulator = fj.compressed_accumulator(
            4, step=step, use_mean=use_mean, projection=projection, **SETTINGS
        )
        carry = accumulator.init(jax.eval_shape(lambda: gradients[0]))
        for i, gradient in enumerate(gradients):
            carry = accumulator.update(carry, gradient, i)
        return accumulator.finalize(carry)

    drawn = [accumulate(gradients, step) for step in (0, 1)]
    for step in (0, 1):
        expected = cycle(gradients, step, use_mean, projection=projection)
        assert_close(drawn[step], expected)
    assert np.abs(drawn[0]["w"] - drawn[1]["w"]).max() > 0.1


@functools.partial(jit, static_argnums=3)
def microbatched(params, data, step, size):
    accumulator = fj.compressed_accumulator(4, step=step, **SETTINGS)
    return optax.microbatching.microbatch(
        jax.value_and_grad(loss),
        argnums=1,
        microbatch_size=size,
        accumulator=(MEAN, accumulator),
    )(params, data)


@pytest.mark.parametrize("step", [0, 7])
def test_inside_microbatch_with_a_traced_step(step):
    value, gradient = microbatched(PARAMS, DATA, step, 2)
    # optax deals the batch column-major: micro-batch i has the rows i, i + 4.
    parts = [gradient_of(PARAMS, DATA[i::4]) for i in range(4)]
    assert_close(gradient, cycle(parts, step, True))
    assert_close(gradient["b"], gradient_of(PARAMS, DATA)["b"])
    assert_close(value, loss(PARAMS, DATA))


def test_stops_early_with_the_mean_of_what_it_saw():
    @jit
    def gradient(params, data, number):
        return optax.microbatching.microbatch(
            jax.grad(loss),
            argnums=1,
            microbatch_size=2,
            accumulator=fj.compressed_accumulator(4, **SETTINGS),
            num_real_microbatches=number,
        )(params, data)

    parts = [gradient_of(PARAMS, DATA[i::4]) for i in range(3)]
    assert_close(gradient(PARAMS, DATA, 3), cycle(parts, 0, True))


@pytest.mark.parametrize("use_mean", [True, False])
def test_aggregates_inside_micro_vmap(use_mean):
    """Each micro-batch is vmapped, aggregated, and then sketched once."""

    @jit
    def gradient(params, data):
        return optax.microbatching.micro_vmap(
            jax.grad(loss),
            in_axes=(None, 0),
            microbatch_size=2,
            accumulator=fj.compressed_accumulator(4, use_mean=use_mean, **SETTINGS),
        )(params, data)

    each = [gradient_of(PARAMS, row) for row in DATA]
    scale = 0.5 if use_mean else 1.0
    parts = [
        jax.tree.map(lambda x, y: scale * (x + y), each[i], each[i + 4])
        for i in range(4)
    ]
    assert_close(gradient(PARAMS, DATA), cycle(parts, 0, use_mean))


def test_gradients_come_back_in_their_dtype():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    data = jnp.asarray(DATA, jnp.bfloat16)
    _, gradient = microbatched(params, data, 0, 4)
    parts = [gradient_of(params, data[i::2]) for i in range(2)]
    assert {leaf.dtype for leaf in gradient.values()} == {jnp.dtype(jnp.bfloat16)}
    assert_close(gradient, cycle(parts, 0, True))


@pytest.mark.parametrize(
    "key", [jax.random.key(3), np.array([0, 3], np.uint32), jax.random.key_data]
)
def test_key_in_every_form(key):
    gradients = [{"w": np.eye(16, dtype=np.float32)}]
    tx = fj.compressed_accumulation(optax.identity(), 2, 4, min_dim_size=8, key=3)
    expected = run(tx, 2 * gradients)[0][-1]

    @jit
    def accumulate(traced):
        given = key(traced) if callable(key) else key
        accumulator = fj.compressed_accumulator(4, key=given, min_dim_size=8)
        carry = accumulator.update(accumulator.init(gradients[0]), gradients[0], 0)
        return accumulator.finalize(carry)

    assert_close(accumulate(jax.random.key(3)), expected)
