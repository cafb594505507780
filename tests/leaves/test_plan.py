"""Leaf plans: folds, sides, ranks, masks, reasons, paths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from flora_jax.sketching.sketcher import Sketcher
from tests.common import SKETCHED, every_fold

# Shape, batch, rows and columns of the fold at the defaults.
FOLDS = [
    ((768, 12, 64), (), 768, 768),
    ((12, 768, 3072), (12,), 768, 3072),
    ((48, 1600, 1600), (48,), 1600, 1600),
    ((32, 4096, 32, 128), (32,), 4096, 4096),
    ((64, 2048, 1408), (64,), 2048, 1408),
    ((3, 3, 256, 512), (3, 3), 256, 512),
    ((32000, 4096), (), 32000, 4096),
    ((8192, 512), (), 8192, 512),
    ((128, 128), (), 128, 128),
]


def one(shape, rank=16, **rules):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    return fj.plan_leaves(leaf, fj.Sketch(rank, **rules))


@pytest.mark.parametrize(("shape", "batch", "rows", "columns"), FOLDS)
def test_fold(shape, batch, rows, columns):
    plan = one(shape)
    assert plan.dense_reason is None
    assert tuple(shape[i] for i in plan.batch_axes) == batch
    assert (plan.rows, plan.columns) == (rows, columns)


@pytest.mark.parametrize(
    ("shape", "rules", "reason"),
    [
        ((), {}, "fewer than two axes"),
        ((768,), {}, "fewer than two axes"),
        ((768, 127), {}, "768x127 fold is below min_dim_size=128"),
        ((768, 127), {"min_dim_size": 127}, None),
        ((0, 768), {}, "below min_dim_size"),
        ((50257, 768), {}, "aspect ratio of its 50257x768 fold exceeds 16"),
        ((50257, 768), {"max_aspect_ratio": 66}, None),
        ((2048, 128), {}, None),  # 16 exactly.
        ((2049, 128), {}, "aspect ratio"),
        ((256, 512), {"rank": 256}, "rank=256 is not below the sketched side"),
        ((256, 512), {"rank": 255}, None),
        ((256, 512), {"rank": 300, "side": "larger"}, None),
        ((256, 512), {"mask": lambda path, shape: False}, "the mask leaves it out"),
        ((12, 768, 64), {}, "below min_dim_size"),  # Needs dimension numbers.
        ((256, 512), {"weight_dimension_numbers": [None]}, "leave it out"),
    ],
)
def test_dense_reason(shape, rules, reason):
    rules = {"rank": 16, **rules}
    tree = [jax.ShapeDtypeStruct(shape, jnp.float32)]
    (plan,) = fj.plan_leaves(tree, fj.Sketch(**rules))
    if reason is None:
        assert plan.dense_reason is None
        assert plan.rank > 0
    else:
        assert reason in plan.dense_reason
        assert plan.state_shape == shape


@pytest.mark.parametrize(
    ("side", "tall", "wide", "square"),
    [
        ("smaller", (512, 16), (16, 512), (256, 16)),
        ("larger", (16, 256), (256, 16), (16, 256)),
        ("left", (16, 256), (16, 512), (16, 256)),
        ("right", (512, 16), (256, 16), (256, 16)),
    ],
)
def test_side(side, tall, wide, square):
    shapes = [(512, 256), (256, 512), (256, 256)]
    assert [one(s, side=side).state_shape for s in shapes] == [tall, wide, square]
    by_path = {"other": "smaller", "*": side}
    assert [one(s, side=by_path).state_shape for s in shapes] == [tall, wide, square]


@pytest.mark.parametrize(
    ("shape", "rules", "state_shape"),
    [
        ((12, 768, 3072), {}, (12, 16, 3072)),
        ((768, 12, 64), {}, (768, 1, 16)),
        ((768, 12, 64), {"side": "larger"}, (16, 12, 64)),
        ((3, 3, 256, 512), {}, (3, 3, 16, 512)),
    ],
)
def test_state_keeps_the_number_of_axes(shape, rules, state_shape):
    assert one(shape, **rules).state_shape == state_shape


@pytest.mark.parametrize(
    ("shape", "spec", "state_shape"),
    [
        (
            (12, 768, 64),
            optax.contrib.MuonDimensionNumbers(1, (0, 2)),
            (1, 768, 16),
        ),
        (
            (768, 3, 12, 64),
            optax.contrib.GaLoreDimensionNumbers(0, (2, 3)),
            (768, 3, 1, 16),
        ),
        ((4, 256, 512), optax.contrib.MuonDimensionNumbers(-1, 1), (4, 16, 512)),
    ],
)
@pytest.mark.parametrize("form", ["spec", "tree", "callable"])
def test_weight_dimension_numbers(shape, spec, state_shape, form):
    tree = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    given = {"spec": spec, "tree": {"w": spec}, "callable": lambda p: {"w": spec}}
    plans = fj.plan_leaves(tree, fj.Sketch(16, weight_dimension_numbers=given[form]))
    assert plans["w"].state_shape == state_shape


def test_fold_and_unfold_are_inverse_with_permuted_axes():
    shape = (12, 16, 8)
    spec = optax.contrib.MuonDimensionNumbers(1, (0, 2))
    sketch = fj.Sketch(4, min_dim_size=8, weight_dimension_numbers=spec)
    plan = fj.plan_leaves(jnp.zeros(shape), sketch)
    x = jnp.arange(12 * 16 * 8.0).reshape(shape)
    matrix = plan.fold(x)
    assert matrix.shape == (16, 96)
    np.testing.assert_array_equal(matrix, x.transpose(1, 0, 2).reshape(16, 96))
    np.testing.assert_array_equal(plan.unfold(matrix, plan.shape), x)
    sketch = matrix[:4]  # Rows are the smaller side.
    stored = plan.unfold(sketch, plan.state_shape)
    assert stored.shape == plan.state_shape == (12, 4, 8)
    np.testing.assert_array_equal(plan.fold(stored), sketch)


def test_stacked_leaf_has_the_plan_of_its_slice():
    flat, stacked = one((256, 512)), one((5, 256, 512))
    assert stacked.state_shape == (5, *flat.state_shape)
    assert (stacked.axis, stacked.rank) == (flat.axis, flat.rank)


def test_every_fold_of_the_test_tree():
    plans = fj.plan_leaves(every_fold(), fj.Sketch(4, min_dim_size=8))
    assert {k for k, plan in plans.items() if plan.dense_reason is None} == SKETCHED


def test_rank_by_leaf():
    tree = {"a": jnp.zeros((256, 512)), "b": {"c": jnp.zeros((128, 512))}}
    by_shape = fj.plan_leaves(tree, fj.Sketch(lambda path, shape: shape[0] // 8))
    by_tree = fj.plan_leaves(tree, fj.Sketch({"a": 32, "b": {"c": 16}}))
    assert by_shape == by_tree
    assert by_tree["b"]["c"].path == "b/c"
    assert by_tree["b"]["c"].rank == 16


def test_mask_leaves_out_an_embedding_that_the_aspect_rule_lets_in():
    tree = {"wte": jnp.zeros((4096, 256)), "w": jnp.zeros((256, 256))}
    free = fj.plan_leaves(tree, 32)
    assert free["wte"].dense_reason is None
    for mask in (lambda path, shape: path != "wte", {"wte": False, "w": True}):
        plans = fj.plan_leaves(tree, fj.Sketch(32, mask=mask))
        assert plans["wte"].dense_reason == "the mask leaves it out"
        assert plans["w"].dense_reason is None


def test_a_parameter_called_value_keeps_its_name():
    tree = {"attn": {"query": jnp.zeros((256, 256)), "value": jnp.zeros((256, 256))}}
    sketch = fj.Sketch(32, mask=lambda path, shape: "value" not in path)
    plans = fj.plan_leaves(tree, sketch)
    assert plans["attn"]["value"].path == "attn/value"
    assert plans["attn"]["value"].dense_reason == "the mask leaves it out"
    assert plans["attn"]["query"].dense_reason is None


def test_plan_is_hashable_and_equal():
    assert hash(one((256, 512))) == hash(one((256, 512)))
    assert one((256, 512)) != one((256, 513))


def test_what_sketches_mean_keeps_its_checksum():
    """It is in the states of checkpoints: those of before are still known by it."""
    params = {
        "gate_proj": {"kernel": jnp.ones((16, 24)), "bias": jnp.ones(24)},
        "up_proj": {"kernel": jnp.ones((16, 32))},
    }
    shared = [("gate_proj", "up_proj")]
    for groups, expected in (((), 178133755), (shared, 3994884993)):
        sketch = fj.Sketch(4, fj.Gaussian(), min_dim_size=8, same_projection=groups)
        sketcher = Sketcher("compressed_momentum", sketch)
        assert sketcher.identity(sketcher.plan(params)) == expected
