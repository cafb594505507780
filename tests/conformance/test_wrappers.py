"""Optax's wrappers around each transformation change nothing about it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.common import assert_close
from tests.conformance.cases import (
    CASES,
    FEW,
    assert_identical,
    few_cases,
    jit,
    named,
    run,
    run_layer,
)
from tests.conformance.states import own_states, own_trees

KERNEL, BIAS = "layer/kernel", "layer/bias"


def assert_zero(tree):
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(tree))


@few_cases
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
        marks = () if case.name in FEW else pytest.mark.full
        yield pytest.param(case, other, id=f"{case.name}-{other.name}", marks=marks)


@pytest.mark.parametrize(("case", "other"), list(pairs()))
def test_partition_between_two_transformations(case, other):
    labels = {"layer": {"kernel": "a", "bias": "b"}}
    first, second = run_layer(case), run_layer(other)
    both = run(optax.partition({"a": case(), "b": other()}, labels), first.params)
    for ours, a, b in zip(both.updates, first.updates, second.updates, strict=True):
        assert_close(named(ours)[KERNEL], named(a)[KERNEL])
        assert_close(named(ours)[BIAS], named(b)[BIAS])
    found = own_states(both.states[-1])
    expected = own_states(first.states[-1]) + own_states(second.states[-1])
    assert [type(s) for s in found] == [type(s) for s in expected]


def test_multi_transform_is_partition():
    assert optax.multi_transform is optax.partition


@few_cases
def test_apply_if_finite_leaves_the_state_alone(case):
    reference = run_layer(case)
    tx = optax.apply_if_finite(case(), max_consecutive_errors=3)
    step = jit(tx.update)
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
