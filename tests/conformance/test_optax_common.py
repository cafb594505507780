"""What optax asks of its own optimizers (optax/contrib/_common_test.py)."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import _common_test as optax_test

import flora_jax as fj
from tests.common import assert_close, cached
from tests.conformance.cases import (
    CASES,
    DECAY,
    EVERY_K,
    FOLDS,
    SMALL,
    each_of,
    every_case,
    layer,
    run,
    run_layer,
)

DTYPES = ["float16", "bfloat16", "float32", "float64"]


RECIPES = (
    "flora",
    "galore",
    "fira",
    "apollo",
    "apollo_mini",
    "dct_adamw",
    "flora_adamw",
    "flora_muon",
)
TESTS = (
    "test_optimizers_accept_extra_args",
    "test_optimizers_can_be_wrapped_in_inject_hyperparams",
    "test_preserve_dtype",
    "test_gradient_accumulation",
    "test_state_shape_dtype_shard_stability",
)


# Its parameters are a vector, which nothing sketches, or matrices of 2 x 3.
@pytest.mark.filterwarnings("ignore:.* sketches only 0 of 1 leaves:UserWarning")
@pytest.mark.sample(2)
@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_optax_own_test_as_it_stands(recipe, test, monkeypatch):
    theirs = optax_test.ContribTest(f"{test}0")
    monkeypatch.setattr(optax_test, "_get_opt_factory", lambda name: getattr(fj, name))
    method = getattr(optax_test.ContribTest, f"{test}0").__wrapped__
    arguments = {
        "opt_name": recipe,
        "opt_kwargs": {"learning_rate": 1e-2, "sketch": SMALL},
        "wrapper_name": None,
        "wrapper_kwargs": None,
        "wrap": False,
        "dtype": jnp.bfloat16,
    }
    known = inspect.signature(method).parameters
    method(theirs, **{k: v for k, v in arguments.items() if k in known})


@pytest.mark.sample(1)
@every_case
def test_unknown_extra_arguments_are_accepted_and_nothing_is_retraced(case):
    # run_layer passes an argument that no optimizer expects.
    reference = run_layer(case)
    assert len(reference.updates) > 2
    assert len(reference.traces) == 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", RECIPES)
def test_hyperparameters_may_be_schedules_and_masks_callables(recipe):
    """Learning rate, decays and intervals are traced; no argument is named static."""

    def mask(params):
        return jax.tree.map(lambda x: jnp.ndim(x) == 2, params)

    every = "resample_every" if recipe == "flora" else "refresh_every"
    decays = {"b1": DECAY} if recipe == "flora" else {"b1": DECAY, "b2": 0.9}
    settings = {"learning_rate": 0.1, "weight_decay": 0.01, every: 3, **decays}
    factory, params = getattr(fj, recipe), layer()
    make = optax.inject_hyperparams(factory)
    tx = make(
        **{name: optax.constant_schedule(value) for name, value in settings.items()},
        sketch=FOLDS,
        weight_decay_mask=mask,
    )
    alone = factory(**settings, sketch=FOLDS, weight_decay_mask=mask)
    state, expected = tx.init(params), alone.init(params)
    assert settings.keys() <= state.hyperparams.keys()
    shapes = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(jax.typeof, shapes[1].inner_state) == jax.tree.map(
        jax.typeof, jax.eval_shape(alone.update, params, expected, params)[1]
    )
    assert_close(
        run(tx, params, 4).updates[-1], run(alone, params, 4).updates[-1], "float32"
    )


@pytest.mark.sample(1)
@every_case
def test_inject_hyperparams_changes_nothing(case):
    # What decides shapes is static; no recipe has such an int.
    static = {"min_size"} if case.factory is fj.quantize_state else ()
    inject = optax.inject_hyperparams(case.factory, static_args=static)
    reference = run_layer(case)
    injected = run(inject(**case.arguments()), reference.params)
    numbers = {"decay", "decay_rate", "learning_rate"}
    assert {x for x in numbers if case.takes(x)} <= injected.states[
        0
    ].hyperparams.keys()
    for ours, theirs in zip(injected.updates, reference.updates, strict=True):
        assert_close(ours, theirs)
    for ours, theirs in zip(injected.states, reference.states, strict=True):
        assert jax.tree.structure(ours.inner_state) == jax.tree.structure(theirs)
        assert_close(ours.inner_state, theirs, "float32")


@functools.cache
def low_precision(case):
    """A case whose inner transformation is as good in float16 as in float32.

    optax.adam keeps its second moment in the gradients' dtype, where it underflows.
    """
    return {"inner": optax.sgd(0.1)} if case.accumulates else {}


@cached
def in_float32(case):
    """The step that others are compared with."""
    changes = low_precision(case)
    return run(case(**changes), layer(), 1).step if changes else run_layer(case).step


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("kernel", "bias"),
    [("bfloat16", "float16"), ("float64", "float64")],
)
@every_case
def test_updates_in_other_dtypes_are_those_of_float32(case, kernel, bias):
    tx = case(**low_precision(case))
    with jax.enable_x64(kernel == "float64"):
        params = {
            "layer": {
                "kernel": layer(kernel)["layer"]["kernel"],
                "bias": layer(bias)["layer"]["bias"],
            }
        }
        ours = run(tx, params, EVERY_K)
        # Rounded first, so that only the arithmetic differs.
        params, *rounded = optax.tree.cast([ours.params, *ours.grads], jnp.float32)
    state = tx.init(params)
    for grads, updates in zip(rounded, ours.updates, strict=True):
        expected, state = in_float32(case)(grads, state, params)
        assert updates["layer"]["kernel"].dtype == kernel
        assert updates["layer"]["bias"].dtype == bias
        assert_close(updates, expected)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("dtype", "gradient_dtype"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "float16"),
        ("float64", "float32"),
        ("float32", "float64"),
    ],
)
@every_case
def test_updates_take_the_gradients_dtype(case, dtype, gradient_dtype):
    with jax.enable_x64("float64" in (dtype, gradient_dtype)):
        params, grads = layer(dtype), layer(gradient_dtype)
        state = jax.eval_shape(case().init, params)
        updates, new = jax.eval_shape(case().update, grads, state, params)
        assert {x.dtype.name for x in jax.tree.leaves(updates)} == {gradient_dtype}
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", DTYPES)
@every_case
def test_state_can_be_a_branch_of_cond(case, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx, params = case(), layer(dtype)

        def step(params, state, flip):
            updates, new = jax.lax.cond(
                flip,
                lambda: tx.update(params, state, params),
                lambda: (params, state),
            )
            return optax.apply_updates(params, updates), new

        state = jax.eval_shape(tx.init, params)
        new_params, new = jax.eval_shape(step, params, state, True)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        assert {x.dtype.name for x in jax.tree.leaves(new_params)} == {dtype}


@pytest.mark.sample(1)
@every_case
def test_multi_steps_around(case):
    reference = run_layer(case)
    tx = optax.MultiSteps(case(), every_k_schedule=2)
    step = jax.jit(tx.update)
    params, state = reference.params, tx.init(reference.params)
    for grads, expected in zip(reference.grads, reference.updates, strict=True):
        # The mean of one gradient and itself is that gradient, exactly.
        updates, state = step(grads, state, params)
        assert not any(np.any(x) for x in jax.tree.leaves(updates))
        updates, state = step(grads, state, params)
        assert_close(updates, expected)


@pytest.mark.sample(1)
@each_of([c for c in CASES if c.takes("learning_rate")])
def test_a_learning_rate_schedule(case):
    # Times 1, 2, 3, ...: the reference has a constant rate.
    reference = run_layer(case)
    rate = case.options["learning_rate"]
    schedule = optax.linear_schedule(rate, 11 * rate, 10)
    scheduled = run(case(learning_rate=schedule), reference.params)
    for i, updates in enumerate(scheduled.updates):
        expected = optax.tree.scale(1.0 + i, reference.updates[i])
        assert_close(updates, expected)
