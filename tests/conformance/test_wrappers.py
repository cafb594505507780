"""Optax's wrappers around each transformation change nothing about it."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import assert_close, assert_near
from tests.conformance.cases import (
    CASES,
    DECAY,
    EVERY_K,
    FOLDS,
    assert_identical,
    every_case,
    is_orthogonal,
    layer,
    named,
    run,
    run_layer,
)
from tests.conformance.states import own_states, own_trees

KERNEL, BIAS = "layer/kernel", "layer/bias"


def assert_zero(tree):
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(tree))


@pytest.mark.sample(1)
@every_case
def test_masked_leaves_do_not_move_the_randomness_of_others(case):
    # The bias comes before the kernel, whose index therefore changes.
    reference = run_layer(case)
    masked = run(
        optax.masked(case(), {"layer": {"kernel": True, "bias": False}}),
        reference.params,
    )
    for i, (ours, theirs) in enumerate(
        zip(masked.updates, reference.updates, strict=True)
    ):
        assert_close(named(ours)[KERNEL], named(theirs)[KERNEL])
        assert_identical(named(ours)[BIAS], named(masked.grads[i])[BIAS])
    for ours, theirs in zip(masked.states, reference.states, strict=True):
        for (_, tree), (name, expected) in zip(
            own_trees(ours), own_trees(theirs), strict=True
        ):
            assert set(named(tree)) == {KERNEL}, name
            assert_close(named(tree)[KERNEL], named(expected)[KERNEL])


def pairs():
    """Each case and the next one."""
    for case, other in zip(CASES, CASES[1:] + CASES[:1], strict=True):
        yield pytest.param(case, other, id=f"{case.name}-{other.name}")


# One of the two has the bias alone.
@pytest.mark.sample(1)
@pytest.mark.filterwarnings("ignore:.* sketches only 0 of 1 leaves:UserWarning")
@pytest.mark.parametrize(("case", "other"), list(pairs()))
def test_partition_between_two_transformations(case, other):
    labels = {"layer": {"kernel": "a", "bias": "b"}}
    first, second = run_layer(case), run_layer(other)
    both = run(optax.partition({"a": case(), "b": other()}, labels), first.params)
    for ours, a, b in zip(both.updates, first.updates, second.updates, strict=True):
        if is_orthogonal(case):  # It enlarges the roundings of another program.
            assert_near(named(ours)[KERNEL], named(a)[KERNEL], 2e-4)
        else:
            assert_close(named(ours)[KERNEL], named(a)[KERNEL])
        assert_close(named(ours)[BIAS], named(b)[BIAS])
    found = own_states(both.states[-1])
    expected = own_states(first.states[-1]) + own_states(second.states[-1])
    assert [type(s) for s in found] == [type(s) for s in expected]


def test_multi_transform_is_partition():
    assert optax.multi_transform is optax.partition


@pytest.mark.sample(1)
@every_case
def test_apply_if_finite_leaves_the_state_alone(case):
    reference = run_layer(case)
    tx = optax.apply_if_finite(case(), max_consecutive_errors=3)
    step = jax.jit(tx.update)
    params, state = reference.params, tx.init(reference.params)
    for i, grads in enumerate(reference.grads):
        # One bad number, in the sketched leaf and in the dense one by turns.
        path = [KERNEL, BIAS][i % 2].split("/")[1]
        bad = {"layer": {**grads["layer"], path: grads["layer"][path] * jnp.nan}}
        updates, after = step(bad, state, params)
        assert_zero(updates)
        assert_identical(after.inner_state, state.inner_state)
        updates, state = step(grads, after, params)
        assert_close(updates, reference.updates[i])
    assert state.total_notfinite == len(reference.grads)
    assert_close(state.inner_state, reference.states[-1], "float32")


def matrices(tree):
    return jax.tree.map(lambda x: jnp.ndim(x) == 2, tree)


def masks():
    """A mask around an accumulation, and one around what it has inside."""
    half = {"a": {"kernel": True, "bias": True}, "c": {"kernel": False, "bias": False}}
    pairs = [(matrices, half), (half, matrices), (half, half), (True, half)]
    return [*pairs[:2], *(pytest.param(x, marks=pytest.mark.slow) for x in pairs[2:])]


@pytest.mark.full
@pytest.mark.parametrize("nested", masks())
def test_masks_outside_and_inside_of_an_accumulation(nested):
    outside, inside = nested
    other = {"kernel": jnp.ones((24, 8)), "bias": jnp.ones(8)}
    params = {"a": layer()["layer"], "c": other}

    def both(accumulate, masked=optax.masked):
        recipe = fj.flora(0.1, FOLDS, DECAY)
        tx = masked(accumulate(masked(recipe, inside)), outside)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(tx, params, 2 * EVERY_K).updates

    # Nothing sketched by the accumulation: optax's, to the last bits.
    none = dataclasses.replace(FOLDS, mask=lambda path, shape: False)
    ours = both(lambda inner: fj.compressed_accumulation(inner, EVERY_K, none))
    theirs = both(lambda inner: optax.MultiSteps(inner, EVERY_K))
    assert_close(ours, theirs)

    # Sketched: leaves in both masks as if there were none.
    def sketched(inner):
        return fj.compressed_accumulation(inner, EVERY_K, FOLDS)

    ours, theirs = both(sketched), both(sketched, lambda tx, mask: tx)
    for updates, expected in zip(ours, theirs, strict=True):
        assert_close(named(updates)["a/kernel"], named(expected)["a/kernel"])
