"""What jax does to a state: scan, vmap, donation, no jit, another order of leaves."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.common import assert_close
from tests.conformance.cases import (
    CASES,
    EVERY_K,
    RESAMPLE_EVERY,
    STEPS,
    assert_identical,
    gradients,
    jit,
    named,
    own_trees,
    run,
    run_layer,
)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def at(i, tree):
    return jax.tree.map(lambda x: x[i], tree)


@every_case
def test_without_jit(case):
    reference = run_layer(case)
    # Here the momentum is transferred, and a cycle of accumulation ends.
    i = STEPS - 1
    assert i % RESAMPLE_EVERY == 0
    assert (i + 1) % EVERY_K == 0
    updates, state = reference.tx.update(
        reference.grads[i], reference.states[i], reference.params
    )
    assert_close(updates, reference.updates[i])
    assert jax.tree.structure(state) == jax.tree.structure(reference.states[-1])
    assert_close(state, reference.states[-1], "float32")


@every_case
def test_scan_carries_the_state(case):
    reference = run_layer(case)
    grads = stack(reference.grads)

    @jit
    def scan(state, grads, params):
        def body(state, grads):
            updates, state = reference.tx.update(grads, state, params)
            return state, updates

        return jax.lax.scan(body, state, grads)

    state, updates = scan(reference.states[0], grads, reference.params)
    assert_close(state, reference.states[-1], "float32")
    for i, expected in enumerate(reference.updates):
        assert_close(at(i, updates), expected)


@every_case
def test_vmap_over_an_ensemble(case):
    reference = run_layer(case)
    tx, step = reference.tx, reference.step
    members = [gradients(reference.params, 100 + i) for i in range(3)]
    params = stack(members)
    state = jit(jax.vmap(tx.init))(params)
    update = jit(jax.vmap(tx.update))
    grads = [
        [gradients(m, 10 * t + i) for i, m in enumerate(members)] for t in range(STEPS)
    ]
    together = []
    for row in grads:
        updates, state = update(stack(row), state, params)
        together.append(updates)
    for i, member in enumerate(members):
        alone = tx.init(member)
        for t in range(STEPS):
            expected, alone = step(grads[t][i], alone, member)
            assert_close(at(i, together[t]), expected)
        assert_close(at(i, state), alone, "float32")


@every_case
def test_the_state_can_be_donated(case):
    reference = run_layer(case)
    step = jit(reference.tx.update, donate_argnums=1)
    # Straight from init: no two of its arrays may share a buffer. Nor may the
    # transformation keep one, so that another state can be made and donated.
    for _ in range(2):
        state = reference.tx.init(reference.params)
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
        assert len(set(buffers)) == len(buffers)
        for grads, expected in zip(reference.grads, reference.updates, strict=True):
            donated = state
            updates, state = step(grads, donated, reference.params)
            assert_close(updates, expected)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))


@every_case
def test_the_order_and_nesting_of_leaves_do_not_matter(case):
    reference = run_layer(case)

    def turned(tree):
        # An OrderedDict is flattened as it was filled; dicts are by their keys.
        return collections.OrderedDict(reversed(list(named(tree).items())))

    params = turned(reference.params)
    assert list(named(params)) == list(named(reference.params))[::-1]
    other = run(case(), params)
    for ours, theirs in zip(other.updates, reference.updates, strict=True):
        assert_close(named(ours), named(theirs))
    for ours, theirs in zip(other.states, reference.states, strict=True):
        for (_, tree), (_, expected) in zip(
            own_trees(ours), own_trees(theirs), strict=True
        ):
            assert_close(named(tree), named(expected))


@every_case
def test_init_under_jit_is_init(case):
    reference = run_layer(case)
    state = jit(reference.tx.init)(reference.params)
    assert_identical(state, reference.states[0])
    assert not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(state))


@every_case
def test_updates_do_not_depend_on_who_asked_before(case):
    # No hidden state: the same call gives the same bits, from the same transformation
    # and from another of the same settings.
    reference = run_layer(case)
    i = STEPS // 2
    args = (reference.grads[i], reference.states[i], reference.params)
    again = reference.step(*args)
    assert_identical(again, (reference.updates[i], reference.states[i + 1]))
    assert any(np.any(x) for x in jax.tree.leaves(optax.tree.sub(again[1], args[1])))
