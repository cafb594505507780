"""What quantize_state wraps, and what wraps it; sharded parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from flora_jax.quantization.quantize_state import quantize_state
from tests.common import assert_close
from tests.conformance.cases import assert_identical
from tests.quantization.test_quantize_state import (
    SHAPES,
    adam,
    gradients,
    params,
    quantize,
    run,
    types,
)


def coded_trees(state):
    """Paths of the trees that are coded, with the dtype of their codes."""
    return {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/"): x.dtype.name
        for path, x in jax.tree_util.tree_flatten_with_path(state.inner)[0]
        if x.dtype.name in ("int8", "uint8")
    }


SKETCH = fj.Sketch(16, min_dim_size=8, max_aspect_ratio=32)
ADAM = {"0/mu": "int8", "0/nu": "uint8"}


def under(path, trees):
    return {f"{path}/{name}": dtype for name, dtype in trees.items()}


def without_stack(tree):
    return {name: name != "stack" for name in tree}


def multi_steps(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()


WRAPPED = {
    "chain": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
        under("1", ADAM),
    ),
    "adafactor": (optax.adafactor(0.1, momentum=0.9), {"4/ema": "int8"}),
    "masked": (
        optax.masked(optax.adam(0.1), without_stack),
        under("inner_state", ADAM),
    ),
    # Their states are in a dict, which jit gives back in the order of its keys.
    "partition": (
        optax.partition(
            {"sgd": optax.sgd(0.1, momentum=0.9), "adam": optax.adam(0.1)},
            lambda tree: {name: "adam" if name == "w" else "sgd" for name in tree},
        ),
        under("inner_states/adam/inner_state", ADAM)
        | {"inner_states/sgd/inner_state/0/trace": "int8"},
    ),
    "multi-steps": (
        multi_steps(optax.adam(0.1)),
        {"acc_grads": "int8", **under("inner_opt_state", ADAM)},
    ),
    "accumulation": (
        fj.compressed_accumulation(optax.sgd(0.1, momentum=0.9), 2, SKETCH),
        {"acc_grads": "int8", "inner_opt_state/0/trace": "int8"},
    ),
    "momentum": (
        fj.compressed_momentum(0.5, SKETCH, resample_every=2),
        {"momentum": "int8"},
    ),
}


def assert_near(updates, exact):
    """One rounding has a relative error of 0.9%, and each of these a few of them.

    Of normal numbers, in the mean square: a step 3 cbrt(s x^2)/127 over sqrt(12), with
    s = 2.7 and |x| = 0.8 standard deviations.
    """
    for name in ("w", "stack"):
        error = np.linalg.norm(updates[name] - exact[name])
        assert error <= 0.02 * np.linalg.norm(exact[name])
    assert np.linalg.norm(updates["w"] - exact["w"]) > 0


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", WRAPPED)
def test_what_it_wraps(name):
    inner, expected = WRAPPED[name]
    updates, states = run(quantize(inner), 4)
    assert coded_trees(states[-1]) == expected
    assert_near(updates, run(inner, 4)[0])
    assert len({str(types(state)) for state in states}) == 1


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: fj.compressed_accumulation(tx, 2, SKETCH),
        multi_steps,
        lambda tx: optax.apply_if_finite(tx, 2),
        lambda tx: optax.masked(tx, without_stack),
    ],
    ids=["accumulation", "multi-steps", "apply-if-finite", "masked"],
)
def test_what_wraps_it(wrap):
    updates, states = run(wrap(quantize(optax.adam(0.1))), 4)
    assert len({str(types(state)) for state in states}) == 1
    assert_near(updates, run(wrap(optax.adam(0.1)), 4)[0])


@pytest.mark.full
def test_narrow_moments_come_back_in_their_dtype():
    """Branches of a condition inside would not agree otherwise; scales tell it."""
    tx = quantize(optax.apply_if_finite(optax.adam(0.1), 2))
    updates, states = run(tx, 2, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(states[-1].scales)} == {
        jnp.dtype("bfloat16")
    }
    assert str(types(states[-1])) == str(types(states[0]))


def test_fields_that_are_not_named_stay():
    tx = quantize(optax.adam(0.1), fields=("nu",))
    state = tx.init(params())
    assert coded_trees(state) == {"0/nu": "uint8"}
    assert len(state.scales) == 1
    assert state.inner[0].mu["w"].dtype == jnp.float32


class Watched(NamedTuple):
    """The state of a transformation that logs, under names that optax has as well."""

    trace: jax.Array
    error: Any
    momentum: Any
    inner: Any


def watched(inner):
    """A transformation beside whose state other things are kept."""

    def init(params):
        history = jnp.full((64, 128), 0.3)
        return Watched(history, {"w": history[0]}, {"x": history}, inner.init(params))

    def update(updates, state, params=None):
        updates, new = inner.update(updates, state.inner, params)
        return updates, state._replace(inner=new)

    return optax.GradientTransformation(init, update)


def test_fields_that_are_no_moments_stay():
    """By their paths or numbers of axes; the moments beside them are coded."""
    tx = quantize(watched(optax.adam(0.1)))
    updates, states = run(tx, 3)
    assert coded_trees(states[-1]) == under("inner", ADAM)
    first, last = states[0].inner, states[-1].inner
    assert_identical(last[:3], first[:3])
    np.testing.assert_array_equal(last.trace, np.full((64, 128), np.float32(0.3)))
    assert_close(updates, adam()[1])


def test_a_state_whose_fields_are_no_moments():
    tx = fj.quantize_state(watched(optax.sgd(0.1)))
    with pytest.raises(ValueError, match="none in fields named acc_grads, ema, error"):
        tx.init(params())


def test_trees_without_leaves_and_map_params():
    tx, _, states = adam()
    updates, state = tx.update({}, tx.init({}))
    assert updates == {}
    assert state.scales == ({}, {})
    seen = optax.tree.map_params(tx, lambda x: "parameter", states[0])
    expected = dict.fromkeys(SHAPES, "parameter")
    assert seen.scales == (expected, expected)
    assert (seen.inner[0].mu, seen.inner[0].nu) == (expected, expected)
    assert seen.count.dtype == jnp.int32


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda u, p: value * p, updates, params), state

    inner = optax.GradientTransformationExtraArgs(optax.trace(0.9).init, update)
    tx = quantize_state(inner)
    updates, _ = tx.update(params(), tx.init(params()), params(), value=3.0)
    assert_close(updates, jax.tree.map(lambda x: 3 * x, params()))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_parameters(kind):
    """The same numbers; codes lie where the parameter does, also after an update."""
    types = (jax.sharding.AxisType[kind],) * 2
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=types)
    tx = quantize_state(optax.adam(0.1), min_size=64)
    whole = {"w": gradients(0)["w"][:32]}
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, jax.P("a", "b"))
        grads = jax.device_put(whole, sharding)
        state = tx.init(grads)
        for tree in (state.inner[0].mu, state.inner[0].nu):
            assert tree["w"].sharding.is_equivalent_to(sharding, 2)
        for tree in state.scales:
            assert tree["w"].shape == (32, 1)
            rows = jax.NamedSharding(mesh, jax.P("a"))
            assert tree["w"].sharding.is_equivalent_to(rows, 2)
        updates, new = jax.jit(tx.update)(grads, state)
        if kind == "Explicit":
            assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        assert new.inner[0].mu["w"].sharding.is_equivalent_to(sharding, 2)
    expected = jax.jit(tx.update)(whole, tx.init(whole))
    assert_close(updates, expected[0])
    assert_identical(
        [np.asarray(x) for x in jax.tree.leaves(new.inner)],
        [np.asarray(x) for x in jax.tree.leaves(expected[1].inner)],
    )
