"""Factors that are not multiplied out change no number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from flora_jax import LeafPlan
from flora_jax.sketching.sketcher import ScaledLeaf, Sketcher
from flora_jax.transforms.elementwise import parameter_scale
from tests.common import assert_close

PLANS = {
    "columns": LeafPlan("w", (12, 10), (), (0,), (1,), axis=-1, rank=4),
    "rows": LeafPlan("w", (12, 10), (), (0,), (1,), axis=-2, rank=5),
    "stack": LeafPlan("w", (3, 8, 12), (0,), (1,), (2,), axis=-1, rank=3),
    "folded": LeafPlan("w", (12, 3, 4), (), (0,), (1, 2), axis=-1, rank=5),
}
# One size per axis of the leaf: its own, or 1.
FACTORS = {
    "columns": [(1, 10), (12, 1), (12, 10), (1, 1)],
    "rows": [(1, 10), (12, 1), (12, 10)],
    "stack": [(3, 1, 12), (3, 8, 1), (1, 1, 12), (3, 1, 1), (3, 8, 12)],
    # The last two are of other folds than the plan's.
    "folded": [(12, 1, 1), (1, 3, 4), (12, 3, 1), (1, 1, 4)],
}
PROJECTIONS = [fj.CountSketch("unbiased"), fj.Gaussian(), fj.SRHT("unbiased")]


@pytest.mark.sample(1)
@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", PLANS)
def test_sketch_of_a_scaled_leaf(name, projection):
    plan, rng = PLANS[name], np.random.default_rng(0)
    sketcher = Sketcher("test", fj.Sketch(plan.rank, projection))
    leaf = rng.normal(size=plan.shape).astype(np.float32)
    factors = [rng.uniform(0.5, 2, size=s).astype(np.float32) for s in FACTORS[name]]
    factors.append(np.float32(3.0))

    @jax.jit
    def sketches(leaf, factors):
        (sampled,) = sketcher.sample([plan], jnp.zeros(2, jnp.uint32), 0)
        scaled = ScaledLeaf(leaf).times(*factors)
        plain = ScaledLeaf(scaled.value())
        return [sketcher.sketch_leaf(plan, sampled, x) for x in (scaled, plain)]

    scaled, plain = sketches(leaf, [jnp.asarray(factor) for factor in factors])
    assert scaled.shape == plan.state_shape
    assert_close(scaled, plain)
    value = ScaledLeaf(jnp.asarray(leaf)).times(*map(jnp.asarray, factors)).value()
    expected = leaf.astype(np.float64)
    for factor in factors:
        expected = expected * factor
    assert_close(value, expected, "float32")


def test_a_leaf_without_factors_is_itself():
    leaf = jnp.arange(4, dtype=jnp.bfloat16)
    assert ScaledLeaf(leaf).value().dtype == jnp.float32
    np.testing.assert_array_equal(ScaledLeaf(leaf).value(), [0, 1, 2, 3])


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_clips_as_optax(size):
    leaf = size * np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    tx = optax.clip_by_block_rms(0.5)
    expected, _ = tx.update(leaf, tx.init(leaf))
    factor = jnp.float32(2.0)
    clipped = ScaledLeaf(jnp.asarray(leaf / 2), (factor,), threshold=0.5)
    assert_close(clipped.value(), expected)


@pytest.mark.parametrize("size", [1e-3, 10.0])
@pytest.mark.parametrize("axis", ["left", "right"])
def test_a_sketch_is_clipped_by_the_rms_of_what_is_sketched(size, axis):
    rng = np.random.default_rng(0)
    shape = (3, 12, 16)
    leaf = np.float32(size * rng.normal(size=shape))
    leaf[:, 2] = 0
    row = np.float32(rng.uniform(0.5, 2, (3, 12, 1)))
    row[:, 2] = 1e25  # Its square is beyond float32, as is Adafactor's of a zero row.
    column = np.float32(rng.uniform(0.5, 2, (3, 1, 16)))
    factors = tuple(map(jnp.asarray, (row, column)))
    sketcher = Sketcher("x", fj.Sketch(4, fj.CountSketch(), min_dim_size=8, side=axis))
    (plan,) = sketcher.plan({"w": jnp.asarray(leaf)})
    (sampled,) = sketcher.sample([plan], jnp.zeros(2, jnp.uint32), 0)
    scaled = ScaledLeaf(jnp.asarray(leaf), factors, threshold=0.5)
    sketch, clipped = sketcher.sketch_clipped(plan, sampled, scaled)
    full = leaf * row * column
    expected = full / max(1, np.sqrt(np.mean(full**2)) / 0.5)
    assert_close(clipped.value(), expected)
    assert_close(scaled.value(), expected)
    given = ScaledLeaf(jnp.asarray(expected))
    assert_close(sketch, sketcher.sketch_leaf(plan, sampled, given))


@pytest.mark.sample(2)
@pytest.mark.parametrize("size", [0.0, 1e-4, 10.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_by_parameters_as_optax(size, dtype):
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(size * rng.normal(size=(4, 5)), dtype),
        "s": jnp.ones(()),
    }
    updates = {"w": jnp.asarray(rng.normal(size=(4, 5)), dtype), "s": jnp.ones(())}
    ours, theirs = parameter_scale().tx, optax.scale_by_param_block_rms()
    expected, _ = theirs.update(updates, theirs.init(params), params)
    found, state = ours.update(updates, ours.init(params), params)
    assert state == optax.EmptyState()
    assert found["w"].dtype == updates["w"].dtype
    assert_close(found["w"], expected["w"], dtype)
    assert_close(found["s"], expected["s"])
