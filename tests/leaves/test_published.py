"""The folds of published models, in two layouts: the same matrices in both."""

import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

import flora_jax as fj
from tests.leaves import published

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "folds.md"


@pytest.mark.parametrize("name", published.MODELS)
def test_both_layouts_have_the_same_matrices(name):
    model = published.MODELS[name]
    for path, (plain, stacked) in published.plans(name).items():
        assert plain.dense == stacked.dense, path
        if plain.dense:
            assert plain.dense_reason.split()[:3] == stacked.dense_reason.split()[:3]
            continue
        # MaxText's kernels are inputs x outputs, Hugging Face's are the transpose.
        assert (plain.columns, plain.rows) == (stacked.rows, stacked.columns), path
        assert plain.width == stacked.width or plain.rows == plain.columns
        count = math.prod(stacked.shape[i] for i in stacked.batch_axes)
        experts = model.experts if stacked.shape[0] == model.experts else 1
        assert count == stacked.shape[1] * experts, path


@pytest.mark.parametrize("name", published.MODELS)
def test_the_state_of_both_layouts_is_of_one_size(name):
    sketch, model = fj.Sketch(published.RANK), published.MODELS[name]
    params = published.boxed(name)
    tx = fj.compressed_momentum(0.9, sketch.with_metadata(params))
    momentum = jax.eval_shape(tx.init, params).momentum
    found = {path: x.get_value().size for path, x in momentum.items()}
    for path, (plain, stacked) in published.plans(name).items():
        experts = model.experts if stacked.shape[0] == model.experts else 1
        shape = plain.shape if plain.dense else plain.state_shape
        assert found[path] == stacked.shape[1] * experts * math.prod(shape), path


@pytest.mark.parametrize("name", ["Llama-3-405B", "Gemma-3-4B", "DeepSeek-V3"])
def test_the_planner_shows_the_folds(name):
    params = published.boxed(name)
    tx = fj.flora(1e-3, fj.Sketch(published.RANK).with_metadata(params))
    leaves = {leaf.path: leaf for leaf in fj.memory_plan(tx, params).leaves}
    for path, (_, plan) in published.plans(name).items():
        shapes = () if plan.dense else (plan.state_shape,)
        assert leaves[path].sketches == shapes, path


@pytest.mark.parametrize("name", published.MODELS)
def test_what_a_fold_by_shape_alone_would_merge_is_refused(name):
    params = published.boxed(name)
    with pytest.raises(ValueError, match="is stacked along axis 1"):
        jax.eval_shape(fj.flora(1e-3, fj.Sketch(published.RANK)).init, params)


def test_a_kernel_of_128_heads_is_one_matrix():
    """By its shape alone: a stack of 16,384 matrices of 128 x 128 is none."""
    kernel = {"query": jax.ShapeDtypeStruct((16384, 128, 128), jnp.float32)}
    plan = fj.plan_leaves(kernel, fj.Sketch(256))["query"]
    assert (plan.batch_axes, plan.rows, plan.columns) == ((), 16384, 16384)
    layers = {"query": jax.ShapeDtypeStruct((126, 16384, 128, 128), jnp.float32)}
    plan = fj.plan_leaves(layers, fj.Sketch(256))["query"]
    assert (plan.batch_axes, plan.rows, plan.columns) == ((0,), 16384, 16384)


def test_a_long_stack_says_what_to_do():
    params = {"w": jax.ShapeDtypeStruct((300, 256, 256), jnp.float32)}
    plan = fj.plan_leaves(params, fj.Sketch(16))["w"]
    assert "if it is a stack of 256x256 matrices, say so" in plan.dense_reason


def test_the_document_has_the_table():
    assert DOCUMENT.read_text().endswith(published.table())
