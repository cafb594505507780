"""Warnings say what will not work, and point at the user's line, however deep it is."""

import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import flora_jax as fj

WIDE = {"w": jnp.ones((256, 512))}
DENSE = {"embedding": jnp.ones((2000, 40)), "bias": jnp.ones(40)}
SKETCH = fj.Sketch(8)


def noisy():
    return fj.compressed_momentum(0.99, SKETCH, resample_every=100)


def under_jit(tx, params):
    return jax.jit(tx.init)(params)


def under_scan(tx, params):
    return jax.lax.scan(lambda carry, _: (carry, tx.init(params)), 0, length=1)


def under_filter_jit(tx, params):
    return eqx.filter_jit(tx.init)(params)


def in_nnx(tx, params):
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(params["w"])

    return nnx.Optimizer(Model(), tx, wrt=nnx.Param)


def directly(tx, params):
    return tx.init(params)


WRAPPERS = {
    "alone": noisy,
    "chain": lambda: optax.chain(optax.clip(1.0), optax.chain(noisy(), optax.scale(1))),
    "recipe": lambda: fj.flora(1e-3, SKETCH, 0.99, resample_every=100),
    "injected": lambda: optax.inject_hyperparams(fj.compressed_accumulation)(
        inner=noisy(), every_k=lambda step: 4, sketch=SKETCH
    ),
    "multi-steps": lambda: optax.MultiSteps(noisy(), 2),
    "masked": lambda: optax.masked(noisy(), True),
    "accumulation": lambda: fj.compressed_accumulation(noisy(), 4, SKETCH),
    "quantized": lambda: fj.quantize_state(noisy(), min_size=1),
}


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    "call", [directly, under_jit, under_filter_jit, under_scan, in_nnx]
)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_warning_points_at_the_line_that_called(wrapper, call):
    tx = WRAPPERS[wrapper]()
    with pytest.warns(UserWarning, match="rho = decay") as caught:
        call(tx, WIDE)
    (warning,) = {(w.filename, w.lineno) for w in caught}
    file, line = warning
    assert Path(file) == Path(__file__)
    assert "tx" in Path(file).read_text().splitlines()[line - 1]


def test_a_warning_at_construction_points_there_too():
    with pytest.warns(UserWarning, match="every_k=1 saves nothing") as caught:
        fj.compressed_accumulation(optax.sgd(1.0), 1, SKETCH)
    assert Path(caught[0].filename) == Path(__file__)
    make = optax.inject_hyperparams(fj.flora)
    tx = make(learning_rate=1e-3, sketch=fj.Sketch(8, mask=lambda path, shape: False))
    with pytest.warns(UserWarning, match="sketches only 0 of 1 leaves") as caught:
        tx.init(WIDE)
    assert Path(caught[0].filename) == Path(__file__)


MAKE = {
    "compressed_momentum": lambda sketch: fj.compressed_momentum(0.9, sketch),
    "compressed_accumulation": lambda sketch: fj.compressed_accumulation(
        optax.sgd(1.0), 4, sketch
    ),
    "scale_in_subspace": lambda sketch: fj.galore(1e-3, sketch),
    "flora_muon": lambda sketch: fj.flora_muon(1e-3, sketch),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_state_that_saves_nothing_says_so(name):
    tx = MAKE[name](SKETCH)
    match = (
        rf"^{name} sketches only 0 of 2 leaves \(0% of 80,040 elements\), .* its"
        r" largest dense leaf 'embedding' of shape \(2000, 40\) is dense because"
        " .*plan_leaves"
    )
    with pytest.warns(UserWarning, match=match):
        tx.init(DENSE)


def test_a_little_is_too_little_and_a_tenth_is_enough():
    tx = fj.compressed_momentum(0.9, SKETCH)
    small = {"w": jnp.ones((128, 128)), "table": jnp.ones((128, 8000))}
    with pytest.warns(UserWarning, match="sketches only 1 of 2 leaves .2% of"):
        tx.init(small)
    tx.init({"w": jnp.ones((128, 128)), "table": jnp.ones((8000, 18))})
    tx.init({})


def test_planning_memory_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fj.memory_plan(MAKE["compressed_momentum"](SKETCH), DENSE)
