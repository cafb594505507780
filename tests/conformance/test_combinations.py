"""Wrappers of optax around ours, inside flax and on meshes: both at once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import flora_jax as fj
from tests.common import assert_close

SKETCH = fj.Sketch(4, min_dim_size=8)
MAKE = {
    "accumulation": lambda: fj.compressed_accumulation(optax.sgd(1e-2), 2, SKETCH),
    "flora": lambda: fj.flora(1e-2, SKETCH, resample_every=20),
}


def matrices(tree):
    return jax.tree.map(lambda x: jnp.ndim(x) == 2, tree)


def labels(tree):
    return jax.tree.map(lambda x: "ours" if jnp.ndim(x) == 2 else "rest", tree)


WRAP = {
    "masked": lambda tx: optax.masked(tx, matrices),
    "partition": lambda tx: optax.partition({"ours": tx, "rest": optax.sgd(1)}, labels),
}


class Layer(nnx.Module):
    def __init__(self, metadata):
        init = nnx.initializers.lecun_normal()
        if metadata:
            init = nnx.with_partitioning(init, ("data", "model"))
        self.linear = nnx.Linear(16, 32, kernel_init=init, rngs=nnx.Rngs(0))


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "wrapper", "metadata"),
    [
        ("accumulation", "masked", True),
        ("flora", "partition", True),
        ("accumulation", "masked", False),
        ("accumulation", "partition", False),
        ("accumulation", "partition", True),
        ("flora", "masked", False),
        ("flora", "masked", True),
        ("flora", "partition", False),
    ],
)
def test_wrapped_in_nnx(name, wrapper, metadata):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=AUTO * 2)
    with jax.set_mesh(mesh):
        model = Layer(metadata)
        optimizer = nnx.Optimizer(model, WRAP[wrapper](MAKE[name]()), wrt=nnx.Param)
        grads = nnx.grad(lambda m: (m.linear(jnp.ones((2, 16))) ** 2).sum())(model)
        before = jnp.array(model.linear.kernel[...])
        for _ in range(2):
            optimizer.update(model, grads)
    assert not jnp.array_equal(before, model.linear.kernel[...])


AUTO = (jax.sharding.AxisType.Auto,)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", MAKE)
def test_masked_in_linen_boxes(name):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
    model = nn.Dense(32, kernel_init=init)
    params = model.init(jax.random.key(0), jnp.ones((2, 16)))
    tx = WRAP["masked"](MAKE[name]())
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.full
@pytest.mark.parametrize("name", MAKE)
def test_explicit_mesh_without_a_context(name):
    # Four devices, as the rank is 4.
    mesh = jax.make_mesh(
        (4,),
        ("x",),
        axis_types=(jax.sharding.AxisType.Explicit,),
        devices=jax.devices()[:4],
    )
    params = {"w": jax.random.normal(jax.random.key(0), (16, 32))}
    spec = jax.NamedSharding(mesh, jax.P("x", None))
    sharded = jax.device_put(params, spec)
    tx = MAKE[name]()
    expected, state = tx.init(params), tx.init(sharded)
    for _ in range(2):
        updates, expected = jax.jit(tx.update)(params, expected, params)
        ours, state = jax.jit(tx.update)(sharded, state, sharded)
    assert ours["w"].sharding.is_equivalent_to(spec, 2)
    assert_close(ours, updates)


@pytest.mark.full
@pytest.mark.parametrize("projection", [fj.CountSketch(), fj.Gaussian()], ids=repr)
def test_accumulator_on_an_explicit_mesh(projection):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    plain = jax.random.normal(jax.random.key(0), (16, 32))

    def accumulate(grads):
        accumulator = fj.compressed_accumulator(
            fj.Sketch(4, projection, min_dim_size=8)
        )
        carry = accumulator.init(jax.eval_shape(lambda x: x, grads))
        for i in range(2):
            carry = accumulator.update(carry, grads, i)
        return accumulator.finalize(carry)

    with jax.set_mesh(mesh):
        sharded = jax.device_put(plain, jax.NamedSharding(mesh, jax.P("x", None)))
        ours = jax.jit(accumulate)(sharded)
        assert jax.typeof(ours).sharding.spec == jax.P("x", None)
    assert_close(ours, jax.jit(accumulate)(plain))
