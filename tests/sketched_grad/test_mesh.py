"""Sketched gradients on eight devices: what is reduced, and whole training steps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from experiments.common.collectives import collectives

# A rank that no shard of a weight has as a side.
SKETCH = fj.Sketch(3, key=3, min_dim_size=8)


def numbers(seed, *shape, scale=0.3):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


X = numbers(0, 4, 6, 16, scale=1)
STACK = {
    "a": numbers(1, 16, 40),
    "b": numbers(2, 3, 40, 40),
    "c": numbers(3, 40, 56),
}


def _deep(p, x):
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    h, _ = jax.lax.scan(layer, jnp.tanh(x @ p["a"]), p["b"])
    return jnp.mean(jnp.sin(h @ p["c"]))


BATCH = jnp.tile(X, (2, 1, 1)) * jnp.linspace(0.5, 1, 8)[:, None, None]


def sketched_deep(p, x):
    gradient = fj.sketched_value_and_grad(_deep, SKETCH)
    return gradient(SKETCH.cycle(0), p, x)[1].tree


def data_parallel_by_hand(gradient, mesh):
    """Each device's sketches of its own gradients are averaged."""

    def step(p, x):
        p = jax.lax.pcast(p, "d", to="varying")
        return jax.lax.pmean(gradient(p, x), "d")

    specs = {"in_specs": (jax.P(), jax.P("d")), "out_specs": jax.P()}
    return jax.shard_map(step, mesh=mesh, **specs)


def data_parallel_by_shard_map(gradient, mesh):
    """At replicated parameters jax sums the gradients, here their sketches."""

    def step(p, x):
        return jax.tree.map(lambda g: g / jax.lax.axis_size("d"), gradient(p, x))

    specs = {"in_specs": (jax.P(), jax.P("d")), "out_specs": jax.P()}
    return jax.shard_map(step, mesh=mesh, **specs)


def by_the_compiler(gradient, mesh):
    del mesh
    return gradient


def reduced_gradients(compiled, params):
    """Reductions over devices of a weight's shape, each side of it sharded or not."""
    full = set()
    for x in params.values():
        local = x.sharding.shard_shape(x.shape)
        rows, columns = list(zip(x.shape, local, strict=True))[-2:]
        full |= {*itertools.product(rows, columns), *itertools.product(columns, rows)}
    kinds = ("all-reduce", "reduce-scatter")
    found = [x for x in collectives(compiled.as_text()) if x.kind in kinds]
    assert found
    return [shape for x in found for shape in x.shapes if shape[-2:] in full]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("step", "kind", "spec"),
    [
        (by_the_compiler, "Auto", {}),
        (data_parallel_by_hand, "Auto", {}),
        (data_parallel_by_shard_map, "Auto", {}),
        (by_the_compiler, "Auto", {"a": (None, "m"), "b": (None, None, "m")}),
        (by_the_compiler, "Auto", {"a": ("d",), "b": (None, "d"), "c": ("d",)}),
        (by_the_compiler, "Auto", {"a": ("d", "m"), "b": (None, "d", "m")}),
        (by_the_compiler, "Explicit", {}),  # Falls back to full gradients.
        (by_the_compiler, "Explicit", {"c": (None, "m")}),
    ],
    ids=[
        *("compiler", "own", "summed", "tensor parallel", "FSDP", "both"),
        *("explicit", "explicit, sharded"),
    ],
)
def test_on_a_mesh_sketches_are_reduced(step, kind, spec):
    """And with full gradients the same search finds them."""
    kinds = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=kinds)

    def place(name, x):
        names = jax.P(*spec.get(name, ()))
        return jax.device_put(x, jax.NamedSharding(mesh, names))

    expected = jax.jit(sketched_deep)(STACK, BATCH)
    with jax.set_mesh(mesh):
        params = {name: place(name, x) for name, x in STACK.items()}
        batch = jax.device_put(BATCH, jax.NamedSharding(mesh, jax.P("d")))
        compiled, full = (
            jax.jit(step(gradient, mesh)).lower(params, batch).compile()
            for gradient in (sketched_deep, jax.grad(_deep))
        )
    ours = compiled(params, batch)
    for name, x in ours.items():
        error = np.linalg.norm(np.asarray(x) - expected[name])
        assert error <= 2e-6 * np.linalg.norm(expected[name]), name
    if kind == "Auto":
        assert not reduced_gradients(compiled, params)
        assert reduced_gradients(full, params)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["data parallel", "FSDP", "tensor parallel", "both"])
def test_training_steps_with_donated_and_sharded_state(kind):
    """The same as on one device with full gradients."""
    a, b, c = {
        "data parallel": ((), (), ()),
        "FSDP": (("d",), (None, "d"), ("d",)),
        "tensor parallel": ((None, "m"), (None, "m"), ("m",)),
        "both": (("d", "m"), (None, "m", "d"), ("m", "d")),
    }[kind]
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(auto, auto))
    layout = {
        name: jax.NamedSharding(mesh, jax.P(*names))
        for name, names in zip("abc", (a, b, c), strict=True)
    }
    tx = fj.compressed_accumulation(optax.sgd(0.5, momentum=0.9), 2, SKETCH)

    def sketched(params, state, x):
        return fj.sketched_value_and_grad(_deep, SKETCH)(state, params, x)

    def step(gradient, params, state, x):
        value, grads = gradient(params, state, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    batches = [BATCH, 3 * BATCH, 2 * BATCH, BATCH]
    expected = jax.tree.map(jnp.asarray, STACK), tx.init(STACK)

    def full(params, state, x):
        return jax.value_and_grad(_deep)(params, x)

    unsharded = jax.jit(lambda *now: step(full, *now))
    for x in batches:
        *expected, _ = unsharded(*expected, x)

    states = fj.state_sharding(tx, STACK, layout)
    by_rows = jax.NamedSharding(mesh, jax.P("d"))
    with jax.set_mesh(mesh):
        params = jax.device_put(STACK, layout)
        state = jax.jit(tx.init, out_shardings=states)(params)
        compiled = jax.jit(
            lambda *now: step(sketched, *now),
            donate_argnums=(0, 1),
            out_shardings=(layout, states, None),
        )
        for x in batches:
            old = params, state
            params, state, _ = compiled(params, state, jax.device_put(x, by_rows))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old[0]))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old[1].acc_grads))
    leaves = jax.tree.leaves((params, state)), jax.tree.leaves(expected)
    for x, y in zip(*leaves, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-4, atol=1e-6)
    assert int(state.gradient_step) == 2


@pytest.mark.full
def test_accumulators_of_devices_take_sketches():
    """With axis_name: each device's own sketches, averaged once per cycle."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = fj.compressed_accumulation(optax.sgd(0.5), 2, SKETCH, axis_name="d")

    def cycle(params, x):
        state = tx.init(params)
        own = jax.lax.pcast(params, "d", to="varying")
        for part in (x, 3 * x):
            gradient = fj.sketched_value_and_grad(_deep, SKETCH)
            _, grads = gradient(state, own, part)
            updates, state = tx.update(grads, state, params)
        return updates

    specs = {"in_specs": (jax.P(), jax.P("d")), "out_specs": jax.P()}
    found = jax.jit(jax.shard_map(cycle, mesh=mesh, **specs))(STACK, BATCH)

    whole = fj.compressed_accumulation(optax.sgd(0.5), 2, SKETCH)
    state = whole.init(STACK)
    for part in (BATCH, 3 * BATCH):
        expected, state = jax.jit(whole.update)(
            jax.jit(jax.grad(_deep))(STACK, part), state
        )
    for name, x in expected.items():
        assert np.linalg.norm(x) > 0
        error = np.linalg.norm(np.asarray(found[name]) - x)
        assert error <= 5e-6 * np.linalg.norm(x), name
