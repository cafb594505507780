"""On 8 devices: sharding types, sharded parameters, and shard_map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import assert_close
from tests.conformance.cases import (
    CASES,
    EVERY_K,
    FOLDS,
    SMALL,
    STEPS,
    assert_identical,
    each_of,
    every_case,
    gradients,
    layer,
    named,
    run_layer,
)
from tests.conformance.states import own_states, own_trees

P = jax.P
accumulations = each_of([c for c in CASES if c.accumulates])


def mesh(shape, names, kind):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def types(tree):
    return jax.tree.map(jax.typeof, tree)


@pytest.mark.sample(1)
@every_case
def test_sharding_types_of_init_and_update(case):
    # As optax asks (optax/_src/sharding_test.py); here the last axis is sketched.
    explicit = mesh((8,), ("x",), jax.sharding.AxisType.Explicit)
    tx = case(SMALL)
    with jax.set_mesh(explicit):
        sharding = jax.NamedSharding(explicit, P(None, "x"))
        params = jnp.ones((2, 8, 4), jnp.float16, out_sharding=sharding)
        state = tx.init(params)
        for name, tree in own_trees(state):
            (leaf,) = jax.tree.leaves(tree)
            expected = "x" if leaf.shape[1] == 8 else None
            assert jax.typeof(leaf).sharding.spec[1] == expected, name
        assert types(jax.jit(tx.init)(params)) == types(state)
        updates, new = tx.update(params, state, params)
        assert types(new) == types(state)
        assert types(updates) == types(params)
        # Types are decided in tracing: nothing more to see in a compiled update.
        traced = jax.eval_shape(tx.update, params, state, params)
        assert types(traced) == types((updates, new))


@pytest.mark.sample(1)
@every_case
def test_sharded_parameters_give_the_same_numbers(case):
    # Both sides of the kernel are sharded: the sketched one, 8 long, and the other.
    reference = run_layer(case)
    auto = mesh((4, 2), ("data", "model"), jax.sharding.AxisType.Auto)
    specs = {"layer": {"kernel": P("data", "model"), "bias": P("model")}}
    shard = functools.partial(
        jax.tree.map, lambda x, spec: jax.device_put(x, jax.NamedSharding(auto, spec))
    )
    params = shard(reference.params, specs)
    # A transfer of momentum and the end of a cycle.
    i = STEPS - 1
    grads, state = reference.grads[i], reference.states[i]
    empty = reference.tx.init(params)
    for name, tree in own_trees(empty):
        kernel = named(tree)["layer/kernel"]
        expected = (None if n % 2 else "model" for n in kernel.shape[1:])
        assert kernel.sharding.mesh == auto, name
        assert tuple(kernel.sharding.spec[1:]) == tuple(expected), name
    everywhere = jax.NamedSharding(auto, P())
    shardings = jax.tree.map(
        lambda x: x.sharding if len(x.devices()) == 8 else everywhere,
        empty,
    )
    on_mesh = jax.device_put(state, shardings)
    updates, new = jax.jit(reference.tx.update)(shard(grads, specs), on_mesh, params)
    assert_close(updates, reference.updates[i])
    assert_close(new, reference.states[i + 1], "float32")


def stacked(tree, i=0):
    """Gradients of eight devices, along a new axis."""
    return gradients(jax.tree.map(lambda x: jnp.zeros((8, *x.shape)), tree), i)


def mean_of(tree):
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)


def local(tree):
    return jax.tree.map(lambda x: x[0], tree)


def unlocal(tree):
    return jax.tree.map(lambda x: x[None], tree)


@pytest.mark.sample(1)
@every_case
def test_a_replicated_state_under_shard_map(case):
    # Gradients are reduced first. check_vma proves, in tracing, that all outputs are
    # the same on all devices, and that branches of cond agree on what differs.
    tx, params = case(), layer()
    batch = mesh((8,), ("batch",), jax.sharding.AxisType.Auto)

    def step(grads, state, params):
        return tx.update(jax.lax.pmean(local(grads), "batch"), state, params)

    specs = {"in_specs": (P("batch"), P(), P()), "out_specs": P()}
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(
        jax.shard_map(step, mesh=batch, **specs), stacked(params), state, params
    )
    assert types(new) == types(state)
    assert types(updates) == types(params)


def per_device(case, **options):
    """A step with gradients that are not reduced, and its state before the first.

    The accumulator and what the skip function keeps are each device's own, along a
    first axis; the rest of the state is the same on all of them.
    """
    batch = mesh((8,), ("batch",), jax.sharding.AxisType.Auto)
    tx = case(axis_name="batch", **options)
    own = ("acc_grads", "skip_state")

    def change(state, f):
        return state._replace(**{k: f(getattr(state, k)) for k in own})

    state = tx.init(layer())
    specs = change(
        jax.tree.map(lambda _: P(), state),
        functools.partial(jax.tree.map, lambda _: P("batch")),
    )

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=batch,
        in_specs=(P("batch"), specs, P()),
        out_specs=(P(), specs),
    )
    def step(grads, state, params):
        updates, state = tx.update(local(grads), change(state, local), params)
        return updates, change(state, unlocal)

    repeat = functools.partial(
        jax.tree.map, lambda x: jnp.broadcast_to(x, (8, *x.shape))
    )
    # On the mesh from the start, or the second step would compile again.
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(batch, spec), specs)
    return step, jax.device_put(change(state, repeat), shardings)


@pytest.mark.sample(1)
@accumulations
def test_accumulators_of_each_device(case):
    # A sketch is linear: the mean of the devices' is that of the mean gradient.
    reference = run_layer(case)
    params, theirs = reference.params, reference.tx.init(reference.params)
    step, ours = per_device(case)
    for i in range(2 * EVERY_K):
        grads = stacked(params, i)
        updates, ours = step(grads, ours, params)
        expected, theirs = reference.step(mean_of(grads), theirs, params)
        assert_close(updates, expected)
        assert_close(mean_of(ours.acc_grads), theirs.acc_grads, "float32")
    assert_close(ours.inner_opt_state, theirs.inner_opt_state, "float32")
    step(grads, ours, params)  # The state of an ended cycle is taken back.


@pytest.mark.sample(1)
@accumulations
def test_a_skip_on_one_device_makes_all_skip(case):
    reference = run_layer(case)
    params, theirs = reference.params, reference.tx.init(reference.params)
    step, ours = per_device(case, should_skip_update_fn=optax.skip_not_finite)
    for i in range(2 * EVERY_K):
        grads = stacked(params, i)
        bad = jax.tree.map(lambda x, i=i: x.at[i].set(jnp.nan), grads)
        before = ours
        updates, ours = step(bad, before, params)
        assert not any(np.any(x) for x in jax.tree.leaves(updates))
        assert_identical(ours.acc_grads, before.acc_grads)
        assert_identical(ours.inner_opt_state, before.inner_opt_state)
        assert int(ours.mini_step) == i % EVERY_K
        assert np.array_equal(ours.skip_state["should_skip"], np.arange(8) == i)
        updates, ours = step(grads, ours, params)
        expected, theirs = reference.step(mean_of(grads), theirs, params)
        assert_close(updates, expected)
    (own,) = own_states(ours)
    assert int(own.gradient_step) == 2


def test_a_key_on_the_mesh_stands_for_samples_of_any_rank():
    """One of a CountSketch's samples is a scalar, which has no axis of the key's."""
    explicit = mesh((8,), ("x",), jax.sharding.AxisType.Explicit)
    with jax.set_mesh(explicit):
        replicated = jax.NamedSharding(explicit, P())
        params = jax.device_put(layer(), replicated)
        tx = fj.flora_adamw(0.1, FOLDS)
        state = jax.device_put(tx.init(params), replicated)
        _, new = jax.eval_shape(tx.update, params, state, params)
    assert types(new) == types(state)
