"""A leaf's layers in a loop give what they give together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

import flora_jax as fj
from flora_jax.leaves.layers import by_layers
from flora_jax.leaves.mesh import common_shards

NUMBERS = MuonDimensionNumbers((0,), (2,))  # Layers along the second axis.


def mesh():
    return jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=2 * (jax.sharding.AxisType.Auto,)
    )


# 12 layers: as 4 x 3 if nothing is known, else as it is said.
@pytest.mark.parametrize(
    ("shards", "loops"), [(0, 3), (1, 12), (2, 6), (5, 1), (12, 1)]
)
def test_gives_the_same(shards, loops):
    sketch = fj.Sketch(2, min_dim_size=2, weight_dimension_numbers=NUMBERS)
    (plan,) = sketch.plan({"w": jnp.zeros((4, 12, 6))})
    plan = dataclasses.replace(plan, layer_shards=shards)
    rng = np.random.default_rng(0)
    leaf, new = (jnp.float32(rng.normal(size=(4, 12, 6))) for _ in range(2))
    row, scalar = jnp.float32(rng.normal(size=(4, 1, 6))), jnp.float32(3)
    each = jnp.float32(rng.normal(size=(12, 6, 2)))  # One matrix for each layer.
    shapes = []

    def fn(plan, arrays, folded, renewed):
        leaf, row, scalar = arrays
        shapes.append(plan.shape)
        assert leaf.shape == renewed.shape == plan.shape
        matrices = plan.fold(leaf * row * scalar) @ folded
        sums = renewed.sum((0, 2), keepdims=True)
        return renewed + leaf, (plan.unfold(matrices, (4, plan.shape[1], 2)), sums)

    expected = fn(plan, (leaf, row, scalar), each, new)
    with jax.set_mesh(mesh()):
        found = jax.jit(lambda *x: by_layers(fn, plan, *x))(
            (leaf, row, scalar), each, new
        )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, expected
    )
    assert shapes[-1] == (4, 12 // loops, 6)
    # Not on one device, which holds the full sketch anyway.
    by_layers(fn, plan, (leaf, row, scalar), each, new)
    assert shapes[-1] == (4, 12, 6)


@pytest.mark.parametrize(("size", "shards"), [(12, 4), (6, 2), (5, 1), (16, 8)])
def test_every_number_of_shards_divides_the_common_one(size, shards):
    with jax.set_mesh(mesh()):
        assert common_shards(size) == shards
