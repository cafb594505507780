"""The accumulator for optax.microbatching equals the transformation's cycle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import assert_close

SKETCH = fj.Sketch(4, key=3, min_dim_size=8)
MEAN = optax.microbatching.AccumulationType.MEAN
DATA = np.random.default_rng(4).normal(size=(8, 16)).astype(np.float32)
PARAMS = {
    "w": np.random.default_rng(5).normal(size=(16, 24)).astype(np.float32),
    "b": np.zeros(24, np.float32),
}


def loss(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


gradient_of = jax.jit(jax.grad(loss))


def cycle(gradients, number, use_mean, sketch=SKETCH):
    """What compressed_accumulation gives to its inner transformation in one cycle."""
    tx = fj.compressed_accumulation(
        optax.identity(), len(gradients), sketch, use_grad_mean=use_mean
    )
    fresh = tx.init(gradients[0])._replace(gradient_step=jnp.int32(number))
    state, step = fresh, jax.jit(tx.update)
    for gradient in gradients:
        update, state = step(gradient, state)
    return update


@pytest.mark.sample(1)
@pytest.mark.parametrize("use_mean", [True, False])
@pytest.mark.parametrize("projection", [fj.Gaussian(), fj.CountSketch()])
def test_equals_compressed_accumulation(projection, use_mean):
    sketch = dataclasses.replace(SKETCH, projection=projection)
    rng = np.random.default_rng(6)
    gradients = [
        {"w": rng.normal(size=(3, 16, 24)).astype(np.float32), "b": np.ones(3, "f4")}
        for _ in range(4)
    ]

    @jax.jit
    def accumulate(gradients, step):
        accumulator = fj.compressed_accumulator(sketch, step=step, use_mean=use_mean)
        carry = accumulator.init(jax.eval_shape(lambda: gradients[0]))
        for i, gradient in enumerate(gradients):
            carry = accumulator.update(carry, gradient, i)
        return accumulator.finalize(carry)

    sampled = [accumulate(gradients, step) for step in (0, 1)]
    for step in (0, 1):
        expected = cycle(gradients, step, use_mean, sketch)
        assert_close(sampled[step], expected)
    assert np.abs(sampled[0]["w"] - sampled[1]["w"]).max() > 0.1


@functools.partial(jax.jit, static_argnums=3)
def microbatched(params, data, step, size):
    accumulator = fj.compressed_accumulator(SKETCH, step=step)
    return optax.microbatching.microbatch(
        jax.value_and_grad(loss),
        argnums=1,
        microbatch_size=size,
        accumulator=(MEAN, accumulator),
    )(params, data)


@pytest.mark.full
@pytest.mark.parametrize("step", [0, 7])
def test_inside_microbatch_with_a_traced_step(step):
    value, gradient = microbatched(PARAMS, DATA, step, 2)
    # optax deals the batch column-major: micro-batch i has the rows i, i + 4.
    parts = [gradient_of(PARAMS, DATA[i::4]) for i in range(4)]
    assert_close(gradient, cycle(parts, step, True))
    assert_close(gradient["b"], gradient_of(PARAMS, DATA)["b"])
    assert_close(value, loss(PARAMS, DATA))


@pytest.mark.full
def test_stops_early_with_the_mean_of_what_it_saw():
    @jax.jit
    def gradient(params, data, number):
        return optax.microbatching.microbatch(
            jax.grad(loss),
            argnums=1,
            microbatch_size=2,
            accumulator=fj.compressed_accumulator(SKETCH),
            num_real_microbatches=number,
        )(params, data)

    parts = [gradient_of(PARAMS, DATA[i::4]) for i in range(3)]
    assert_close(gradient(PARAMS, DATA, 3), cycle(parts, 0, True))


@pytest.mark.full
@pytest.mark.parametrize("use_mean", [True, False])
def test_aggregates_inside_micro_vmap(use_mean):
    """Each micro-batch is vmapped, aggregated, and then sketched once."""

    @jax.jit
    def gradient(params, data):
        return optax.microbatching.micro_vmap(
            jax.grad(loss),
            in_axes=(None, 0),
            microbatch_size=2,
            accumulator=fj.compressed_accumulator(SKETCH, use_mean=use_mean),
        )(params, data)

    each = [gradient_of(PARAMS, row) for row in DATA]
    scale = 0.5 if use_mean else 1.0
    parts = [
        jax.tree.map(lambda x, y: scale * (x + y), each[i], each[i + 4])
        for i in range(4)
    ]
    assert_close(gradient(PARAMS, DATA), cycle(parts, 0, use_mean))


@pytest.mark.full
def test_gradients_come_back_in_their_dtype():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    data = jnp.asarray(DATA, jnp.bfloat16)
    _, gradient = microbatched(params, data, 0, 4)
    parts = [gradient_of(params, data[i::2]) for i in range(2)]
    assert {leaf.dtype for leaf in gradient.values()} == {jnp.dtype(jnp.bfloat16)}
    assert_close(gradient, cycle(parts, 0, True))


@pytest.mark.full
@pytest.mark.parametrize(
    "key", [3, jax.random.key(3), np.array([0, 3], np.uint32)], ids=type
)
def test_key_in_every_form(key):
    gradients = [{"w": np.eye(16, dtype=np.float32)}]
    accumulator = fj.compressed_accumulator(fj.Sketch(4, key=key, min_dim_size=8))
    carry = accumulator.update(accumulator.init(gradients[0]), gradients[0], 0)
    assert_close(accumulator.finalize(carry), cycle(gradients * 2, 0, True))


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"step": 1.5}, TypeError, "`step` must be an integer"),
        ({"axis_name": 3}, TypeError, "`axis_name`"),
        ({"dtype": "int8"}, TypeError, "`dtype`"),
        ({"sketch": fj.Sketch(4, projection=fj.TopSVD())}, TypeError, "regenerates"),
    ],
)
def test_bad_arguments(settings, error, match):
    with pytest.raises(error, match=match):
        fj.compressed_accumulator(**{"sketch": SKETCH} | settings)
