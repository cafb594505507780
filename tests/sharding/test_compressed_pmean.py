"""Means of sketches over eight devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as fj
from experiments.common.collectives import collectives, total
from flora_jax.random.keys import leaf_keys
from tests.common import assert_close

P = jax.P
SHAPES = {"wide": (16, 24), "stack": (3, 40, 16), "bias": (16,)}
SKETCH = fj.Sketch(4, key=5, min_dim_size=8)


def batch():
    return jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))


def gradients(step, dtype=np.float32):
    rng = np.random.default_rng(step)
    return {k: rng.normal(size=(8, *v)).astype(dtype) for k, v in SHAPES.items()}


def over_devices(function):
    """A function of one device's gradients and the step, on all of them."""

    def local(grads, *rest):
        return function(jax.tree.map(lambda x: x[0], grads), *rest)

    specs = (P("batch"), P())
    return jax.jit(jax.shard_map(local, mesh=batch(), in_specs=specs, out_specs=P()))


def bytes_reduced(compiled):
    """Bytes of all all-reduces in a compiled program."""
    sent = collectives(compiled.as_text())
    return total(each for each in sent if each.kind == "all-reduce")


@pytest.mark.sample(1)
@pytest.mark.parametrize("projection", [None, fj.Gaussian()])
def test_is_the_sketch_of_the_mean(projection):
    sketch = dataclasses.replace(SKETCH, projection=projection)
    mean = over_devices(
        lambda grads, step: fj.compressed_pmean(grads, "batch", sketch, step=step)
    )
    grads, step = gradients(0), jnp.int32(3)
    found = mean(grads, step)
    root = jnp.array([0, 5], jnp.uint32)
    used = fj.CountSketch("unbiased") if projection is None else projection
    for name, axis in (("wide", -2), ("stack", -1)):
        (key,) = leaf_keys(root, "compressed_pmean", [name], 3)
        s = np.asarray(used.matrix(key, 4, 16), np.float64)
        exact = grads[name].astype(np.float64).mean(0)
        expected = exact @ s.T @ s if axis == -1 else s.T @ s @ exact
        assert_close(found[name], expected, "float32")
    assert_close(found["bias"], grads["bias"].astype(np.float64).mean(0), "float32")
    # Another step, another S.
    again = mean(grads, jnp.int32(4))
    assert np.abs(found["wide"] - again["wide"]).max() > 0.1


def test_devices_send_rank_over_width():
    def plain(grads, step):
        return jax.lax.pmean(grads, "batch")

    def sketched(grads, step):
        return fj.compressed_pmean(grads, "batch", SKETCH, step=step)

    programs = [
        over_devices(f).lower(gradients(0), jnp.int32(0)).compile()
        for f in (plain, sketched)
    ]
    full, ours = map(bytes_reduced, programs)
    assert full == 4 * (16 * 24 + 3 * 40 * 16 + 16)
    assert ours == 4 * (4 * 24 + 3 * 40 * 4 + 16)


def test_full_rank_is_the_plain_mean():
    mean = over_devices(
        lambda grads, step: fj.compressed_pmean(
            grads, "batch", fj.Sketch(16, min_dim_size=8), step=step
        )
    )
    grads = gradients(1)
    exact = jax.tree.map(lambda x: x.astype(np.float64).mean(0), grads)
    assert_close(mean(grads, jnp.int32(0)), exact, "float32")


@pytest.mark.full
def test_error_feedback_loses_nothing():
    """What was estimated and what is kept add up to all gradients seen."""

    @functools.partial(
        jax.shard_map,
        mesh=batch(),
        in_specs=(P("batch"), P("batch"), P()),
        out_specs=(P(), P("batch")),
    )
    def step_fn(grads, error, step):
        first = functools.partial(jax.tree.map, lambda x: x[0])
        means, error = fj.compressed_pmean(
            first(grads), "batch", SKETCH, step=step, error=first(error)
        )
        return means, jax.tree.map(lambda x: x[None], error)

    step_fn = jax.jit(step_fn)
    error = jax.tree.map(np.zeros_like, gradients(0))
    seen = told = jax.tree.map(lambda x: np.zeros(x.shape[1:]), error)
    for i in range(6):
        grads = gradients(i)
        means, error = step_fn(grads, error, jnp.int32(i))
        seen = jax.tree.map(lambda a, x: a + x.astype(np.float64).mean(0), seen, grads)
        told = jax.tree.map(lambda a, x: a + np.asarray(x, np.float64), told, means)
    kept = jax.tree.map(lambda x: np.asarray(x, np.float64).mean(0), error)
    assert_close(jax.tree.map(np.add, told, kept), seen, "float32")
    assert np.abs(kept["wide"]).max() > 0.1
    assert not np.any(kept["bias"])


@pytest.mark.full
def test_updates_have_the_gradients_dtype():
    mean = over_devices(
        lambda grads, step: fj.compressed_pmean(grads, "batch", SKETCH, step=step)
    )
    found = mean(jax.tree.map(jnp.bfloat16, gradients(0)), jnp.int32(0))
    assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.bfloat16)}


def test_refuses_what_does_not_fit():
    grads = jax.tree.map(lambda x: x[0], gradients(0))

    def call(error=grads, **settings):
        sketch = dataclasses.replace(SKETCH, **settings)
        fj.compressed_pmean(grads, "batch", sketch, step=0, error=error)

    with pytest.raises(ValueError, match="`error` needs an isometric projection, got"):
        call(projection=fj.CountSketch("unbiased"))
    with pytest.raises(ValueError, match="`state.error` of compressed_pmean holds"):
        call({**grads, "wide": grads["wide"][:8]})
    with pytest.raises(TypeError, match="`projection` must be one that a key regen"):
        call(projection=fj.TopSVD())


@pytest.mark.full
def test_sketches_are_not_sketched_again():
    def loss(w):
        return jnp.sum(jnp.sin(jnp.ones((4, 16)) @ w))

    value_and_grad = fj.sketched_value_and_grad(loss, SKETCH)
    _, grads = value_and_grad(SKETCH.cycle(0), jnp.ones((16, 24)))
    match = "`grads` of compressed_pmean are Sketched.*average them with jax.lax.pmean"
    with pytest.raises(TypeError, match=match):
        fj.compressed_pmean(grads, "d", SKETCH, step=0)
