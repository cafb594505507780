"""What jax does to a state: scan, vmap, donation, no jit, another order of leaves."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.common import assert_close, assert_near, cached
from tests.conformance.cases import (
    EVERY_K,
    RESAMPLE_EVERY,
    STEPS,
    assert_identical,
    every_case,
    gradients,
    is_orthogonal,
    layer,
    named,
    run,
    run_layer,
)
from tests.conformance.states import own_trees


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def at(i, tree):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.sample(1)
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


@pytest.mark.sample(1)
@every_case
def test_scan_carries_the_state_of_a_chain(case):
    reference = run_layer(case)
    # Powers of two are exact.
    tx = optax.chain(optax.scale(-0.5), case(), optax.scale(4.0))
    grads = stack([optax.tree.scale(-2.0, grads) for grads in reference.grads])

    @jax.jit
    def scan(state, grads, params):
        def body(state, grads):
            updates, state = tx.update(grads, state, params)
            return state, updates

        return jax.lax.scan(body, state, grads)

    state, updates = scan(tx.init(reference.params), grads, reference.params)
    assert_close(state[1], reference.states[-1], "float32")
    for i, expected in enumerate(reference.updates):
        assert_close(at(i, updates), optax.tree.scale(4.0, expected))


@pytest.mark.sample(1)
@every_case
def test_vmap_over_an_ensemble(case):
    reference = run_layer(case)
    tx, step = reference.tx, reference.step
    members = [gradients(reference.params, 100 + i) for i in range(3)]
    params = stack(members)
    state = jax.vmap(tx.init)(params)
    update = jax.jit(jax.vmap(tx.update))
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
            if is_orthogonal(case):  # Which multiplies roundings by about 1000.
                assert_near(at(i, together[t]), expected, 2e-4)
            else:
                assert_close(at(i, together[t]), expected)
        assert_close(at(i, state), alone, "float32")


def turned(tree):
    """The leaves in the opposite order, and not nested; their paths are the same."""
    # An OrderedDict is flattened as it was filled, a dict by its keys.
    return collections.OrderedDict(reversed(list(named(tree).items())))


@cached
def run_turned(case):
    """A run with the leaves in another order, each state donated to the next step."""
    return run(case(), turned(layer()), donate=True)


@pytest.mark.sample(1)
@every_case
def test_the_order_and_nesting_of_leaves_do_not_matter(case):
    ours, theirs = run_turned(case), run_layer(case)
    assert list(named(ours.params)) == list(named(theirs.params))[::-1]
    for updates, expected in zip(ours.updates, theirs.updates, strict=True):
        assert_close(named(updates), named(expected))
    for state, expected in zip(ours.states, theirs.states, strict=True):
        for (_, tree), (_, other) in zip(
            own_trees(state), own_trees(expected), strict=True
        ):
            assert_close(named(tree), named(other))


@pytest.mark.sample(1)
@every_case
def test_the_state_can_be_donated(case):
    # Straight from init: no two of its arrays may share a buffer. Nor may the
    # transformation keep one, so that another state can be made and donated.
    ours = run_turned(case)
    for _ in range(2):
        state = ours.tx.init(ours.params)
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
        assert len(set(buffers)) == len(buffers)
        updates, new = ours.step(ours.grads[0], state, ours.params)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        assert_identical((updates, new), (ours.updates[0], ours.states[1]))


@pytest.mark.sample(3)
@every_case
def test_init_under_jit_is_init(case):
    reference = run_layer(case)
    state = jax.jit(reference.tx.init)(reference.params)
    assert_identical(state, reference.states[0])
    assert not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(state))


@pytest.mark.sample(1)
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
