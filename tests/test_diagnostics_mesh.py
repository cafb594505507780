"""Diagnostics on a mesh with Explicit axes."""

import jax
import numpy as np
import optax
import pytest

import flora_jax as fj


def test_they_are_refused_and_the_remedy_works():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    tx = fj.compressed_accumulation(optax.sgd(0.1), 2, fj.Sketch(8, min_dim_size=8))
    plain = {"w": jax.random.normal(jax.random.key(0), (16, 24))}

    def measure(state, grads):
        return fj.diagnostics(tx, state, grads)

    expected = jax.jit(measure)(tx.init(plain), plain)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(plain, jax.NamedSharding(mesh, jax.P("x")))
        state = tx.init(sharded)
        with pytest.raises(ValueError, match="Explicit axes, got .'x',.; call diag"):
            jax.jit(measure)(state, sharded)
        inside = jax.sharding.auto_axes(measure, out_sharding=jax.P())
        found = jax.jit(inside)(state, sharded)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
