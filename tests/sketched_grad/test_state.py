"""Key and cycle come from the state; one that does not fit gives NaN, not noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flora_jax as fj
from flora_jax.sketched_grad.api import find_source
from tests.common import assert_close

SKETCH = fj.Sketch(4, key=5, min_dim_size=8)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 16)), jnp.float32)
PARAMS = {
    "w": jnp.asarray(np.random.default_rng(1).normal(size=(16, 24)), jnp.float32),
    "v": jnp.asarray(np.random.default_rng(2).normal(size=(24, 16)), jnp.float32),
    "b": jnp.ones(24),
}


def loss(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) @ params["v"])


def accumulation(sketch=SKETCH, inner=None, **settings):
    return fj.compressed_accumulation(
        optax.sgd(0.1) if inner is None else inner, 2, sketch, **settings
    )


@functools.cache
def gradient_of(sketch):
    return jax.jit(fj.sketched_value_and_grad(loss, sketch))


def sketched(state, sketch=SKETCH):
    return gradient_of(sketch)(state, PARAMS, X)


def momentum():
    return fj.compressed_momentum(0.5, SKETCH, estimator="paper")


WRAPPERS = {
    "itself": accumulation,
    "chain": lambda: optax.chain(optax.scale(1.0), accumulation(), optax.scale(1.0)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda rate: accumulation(inner=optax.sgd(rate))
    )(rate=0.1),
    "masked": lambda: optax.masked(accumulation(), {"w": True, "v": True, "b": True}),
    "partition": lambda: optax.partition({"a": accumulation()}, lambda p: "a"),
    "quantize_state": lambda: fj.quantize_state(accumulation(), min_size=16),
    "the outermost of two": lambda: accumulation(inner=momentum()),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_state_is_found(name):
    state = WRAPPERS[name]().init(PARAMS)
    state = optax.tree.set(state, gradient_step=jnp.int32(3))
    for given in (state, {"optimizer": state, "step": 5}):
        source = find_source(given)
        assert (source.name, int(source.cycle)) == ("compressed_accumulation", 3)
        assert source.key.tolist() == [0, 5]


def test_the_cycle_is_that_of_the_state():
    state = accumulation().init(PARAMS)._replace(gradient_step=jnp.int32(2))
    assert_close(sketched(state), sketched(SKETCH.cycle(2)))
    assert (
        jnp.abs(
            sketched(state)[1].tree["w"] - sketched(SKETCH.cycle(1))[1].tree["w"]
        ).max()
        > 0.01
    )


def test_the_state_of_an_nnx_optimizer_is_found():
    class Model(nnx.Module):
        def __init__(self):
            self.w, self.v, self.b = (nnx.Param(PARAMS[name]) for name in "wvb")

    model = Model()
    tx = optax.chain(optax.scale(1.0), accumulation())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model)
    gradient = jax.jit(
        fj.sketched_value_and_grad(
            lambda params, x: loss({n: params[n][...] for n in "wvb"}, x), SKETCH
        )
    )
    for cycle in (0, 1):
        value, grads = gradient(optimizer.opt_state, params, X)
        of_cycle = sketched(SKETCH.cycle(cycle))
        assert_close(value, of_cycle[0])
        assert_close(
            [grads.tree[n] for n in "wvb"], [of_cycle[1].tree[n] for n in "wvb"]
        )
        optimizer.opt_state[1].gradient_step.set_value(jnp.int32(1))


def test_the_salt_follows_from_the_state():
    state = momentum().init(PARAMS)
    _, grads = sketched(state)
    assert grads.name == "compressed_momentum"
    _, other = sketched(accumulation().init(PARAMS))
    assert other.name == "compressed_accumulation"
    assert jnp.abs(grads.tree["w"] - other.tree["w"]).max() > 0.01


def test_a_state_without_any():
    with pytest.raises(ValueError, match="got dict without one; pass the optimizer's"):
        fj.sketched_value_and_grad(loss, SKETCH)(PARAMS, X)
    with pytest.raises(ValueError, match=r"or sketch\.cycle\(step\) where"):
        sketched(optax.adam(0.1).init(PARAMS))


def test_a_state_with_several():
    state = optax.chain(momentum(), accumulation()).init(PARAMS)
    with pytest.raises(
        ValueError, match="got CompressedMomentumState at '0', Compressed.* at '1'"
    ):
        sketched(state)
    assert jnp.isfinite(sketched(state[1])[0])


def test_a_state_whose_key_was_cast():
    state = optax.tree.cast(accumulation().init(PARAMS), jnp.bfloat16)
    state = state._replace(key=state.key.astype(jnp.float32))
    with pytest.raises(TypeError, match=r"`state\.key` of compressed_accumulation"):
        sketched(state)


def other_sketch(**settings):
    return fj.Sketch(**{"rank": 4, "key": 5, "min_dim_size": 8} | settings)


# Their states have the shapes that the state of SKETCH has, but for the masked leaf.
OTHERS = {
    "rank": other_sketch(rank={"w": 4, "v": 3}),
    "projection": other_sketch(projection=fj.Gaussian()),
    "mask": other_sketch(mask=lambda path, shape: path != "w"),
    "key": other_sketch(key=6),
}


def assert_nan(value, grads):
    assert jnp.isnan(value)
    for leaf, plan in zip(jax.tree.leaves(grads), grads.plans, strict=True):
        assert plan.dense or jnp.isnan(leaf).all()


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_another_sketch_gives_nan(name):
    """Of the loss and of every gradient, also the dense ones."""
    state = accumulation(OTHERS[name]).init(PARAMS)
    assert_nan(*sketched(state))
    value, grads = sketched(state, OTHERS[name])
    assert jnp.isfinite(value)
    assert jnp.isfinite(grads.global_norm())
    assert_nan(*sketched(momentum().init(PARAMS), OTHERS[name]))


def test_the_cycle_of_another_sketch_gives_nan():
    assert_nan(*sketched(OTHERS["key"].cycle(0)))


@pytest.mark.full
@pytest.mark.parametrize(
    "settings",
    [
        {"inner": optax.apply_if_finite(optax.sgd(0.1), 3)},
        {"should_skip_update_fn": optax.skip_not_finite},
    ],
    ids=["apply_if_finite", "skip_not_finite"],
)
def test_a_guard_against_nan_does_not_hide_it(settings):
    """The parameters stay as they were, and each loss says why."""
    tx = accumulation(**settings)

    @jax.jit
    def step(params, state, x):
        value, grads = fj.sketched_value_and_grad(loss, SKETCH)(state, params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state = PARAMS, accumulation(OTHERS["key"], **settings).init(PARAMS)
    for _ in range(4):
        params, state, value = step(params, state, X)
        assert jnp.isnan(value)
    assert_close(params, PARAMS)


def test_a_leaf_report_reads_as_a_sentence():
    def fun(p):
        return jnp.sum(X @ p["w"]) + jnp.sum(jnp.cos(p["v"])) + jnp.sum(p["b"])

    lines = map(str, fj.explain_sketched_gradients(fun, SKETCH)(PARAMS))
    assert list(lines) == [
        "b (24,): not sketched, because it has fewer than two axes",
        "v (24, 16): computed in full and then sketched at mul (24, 16)"
        " (both of its operands may vary along the sketched axes)",
        "w (16, 24): sketched during backpropagation",
    ]
