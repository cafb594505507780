"""The rules about state: one array per parameter leaf, of fixed shape and dtype."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import cached, every_fold
from tests.conformance.cases import (
    CASES,
    EVERY_K,
    FOLDS,
    STEPS,
    assert_identical,
    each_of,
    every_case,
    every_sketching_case,
    layer,
    named,
    run_layer,
)
from tests.conformance.states import COUNTERS, SKETCHES, own_states, own_trees

# Rank 4. The layout of the design at a 64th of its size (the first two) and every other
# kind of fold; shapes of the sketch, and of the second moment's two statistics.
LAYOUT = {
    (2, 12, 24): ((2, 4, 24), (2, 12, 1), (2, 1, 24)),
    (32, 4, 8): ((32, 1, 4), (32, 1, 1), (1, 4, 8)),
    (32, 16): ((32, 4), (1, 16), (32, 1)),
    (16, 24): ((4, 24), (16, 1), (1, 24)),
    (16, 16): ((16, 4), (16, 1), (1, 16)),
    (16, 4, 8): ((4, 4, 8), (16, 1, 1), (1, 4, 8)),
    (3, 3, 8, 16): ((3, 3, 4, 16), (3, 3, 8, 1), (3, 3, 1, 16)),
}
DENSE = [(16,), (), (16, 4)]
# Of the same leaves: singular vectors, numbers of cosines, and one number per matrix.
BASES = {
    (2, 12, 24): ((2, 12, 4), (2, 4, 1), (2, 1, 1)),
    (32, 4, 8): ((4, 4, 8), (1, 1, 4), (1, 1, 1)),
    (32, 16): ((4, 16), (1, 4), (1, 1)),
    (16, 24): ((16, 4), (4, 1), (1, 1)),
    (16, 16): ((4, 16), (1, 4), (1, 1)),
    (16, 4, 8): ((16, 1, 4), (4, 1, 1), (1, 1, 1)),
    (3, 3, 8, 16): ((3, 3, 8, 4), (3, 3, 4, 1), (3, 3, 1, 1)),
}


def sketch_trees(state):
    return [tree for name, tree in own_trees(state) if name.endswith(SKETCHES)]


def shapes_of(tree):
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


@pytest.mark.sample(3)
@every_sketching_case
def test_the_layout_of_sketches(case):
    params = [jnp.zeros(shape) for shape in [*LAYOUT, *DENSE]]
    trees = sketch_trees(jax.eval_shape(case().init, params))
    assert trees
    ones = [(1,) * len(shape) for shape in DENSE]
    # Adam has those of flora_muon.
    dense = ones if case.factory is fj.flora_muon else DENSE
    for tree in trees:
        assert shapes_of(tree) == [row[0] for row in LAYOUT.values()] + dense


@pytest.mark.sample(2)
@each_of([c for c in CASES if c.takes("refresh_every")])
def test_the_layout_of_a_subspace(case):
    params = [jnp.zeros(shape) for shape in [*LAYOUT, *DENSE]]
    trees = dict(own_trees(jax.eval_shape(case().init, params)))
    ones = [(1,) * len(shape) for shape in DENSE]
    vectors, cosines, single = (
        [row[i] for row in BASES.values()] + ones for i in range(3)
    )
    expected = {"error": list(LAYOUT) + ones, "limiter": single}
    own = fj.TopSVD() if case.factory in (fj.galore, fj.fira) else None
    projection = case.options.get("projection", own)
    if case.factory is fj.dct_adamw:
        expected["basis"] = cosines
    elif isinstance(projection, fj.AdaptiveProjection):
        expected["basis"] = vectors
    found = {
        field: shapes_of(trees[f"SubspaceState.{field}"])
        for field in ("basis", "limiter", "error")
        if f"SubspaceState.{field}" in trees
    }
    wanted = {"basis"} & expected.keys()
    residual = case.option("residual") if case.takes("residual") else None
    if residual is not None and residual.is_limited:
        wanted.add("limiter")
    if case.takes("error_feedback") and case.option("error_feedback"):
        wanted.add("error")
    assert found == {field: expected[field] for field in wanted}


@pytest.mark.sample(1)
@each_of([c for c in CASES if c.takes("decay_rate")])
def test_the_layout_of_second_moments(case):
    params = [jnp.zeros(shape) for shape in [*LAYOUT, *DENSE]]
    trees = dict(own_trees(jax.eval_shape(case().init, params)))
    ones = [(1,) * len(shape) for shape in [*LAYOUT, *DENSE]]
    split = len(LAYOUT)
    row, column, full = (
        shapes_of(trees[f"FactoredRmsState.{field}"])
        for field in ("v_row", "v_col", "v")
    )
    assert row == [row[1] for row in LAYOUT.values()] + ones[split:]
    assert column == [row[2] for row in LAYOUT.values()] + ones[split:]
    assert full == ones[:split] + DENSE


@cached
def folds(case):
    """Parameters with every kind of fold, and the case's state of them."""
    # And a leaf whose sketched side is made of two axes.
    params = {**every_fold(), "heads": jnp.ones((32, 4, 8))}
    # Operation by operation, codes of so many shapes would compile for long.
    return params, jax.jit(case().init)(params)


@pytest.mark.sample(1)
@every_case
def test_one_array_per_parameter_leaf_with_its_number_of_axes(case):
    params, state = folds(case)
    trees = own_trees(state)
    assert trees
    for name, tree in trees:
        leaves = named(tree)
        assert leaves.keys() == params.keys(), name
        for path, leaf in leaves.items():
            assert isinstance(leaf, jax.Array), name
            assert leaf.ndim == params[path].ndim, name


@pytest.mark.sample(1)
@every_case
def test_nothing_is_none_or_empty(case):
    leaves = jax.tree.leaves(folds(case)[1], is_leaf=lambda x: x is None)
    assert all(isinstance(x, jax.Array) and x.size > 0 for x in leaves)


@pytest.mark.sample(1)
@every_case
def test_counters_and_keys_outside_the_trees(case):
    run = run_layer(case)
    for i, state in enumerate(run.states):
        for own in own_states(state):
            counts = [getattr(own, field) for field in COUNTERS[type(own)]]
            assert all((x.dtype, x.shape) == (jnp.int32, ()) for x in counts)
            updates = i if len(counts) == 1 else [i % EVERY_K, i // EVERY_K]
            assert np.array_equal(np.squeeze(counts), updates)
            # Codes mean something without a key, factored moments without either.
            keyless = isinstance(own, fj.QuantizedState | fj.FactoredRmsState)
            assert hasattr(own, "key") == (not keyless)
    keyed = [
        [s for s in own_states(state) if hasattr(s, "key")] for state in run.states
    ]
    assert [len(states) for states in keyed] == [case.keys] * (STEPS + 1)
    for states in keyed:
        for own, first in zip(states, keyed[0], strict=True):
            assert (own.key.dtype, own.key.shape) == (jnp.uint32, (2,))
            assert (own.spec.dtype, own.spec.ndim) == (jnp.uint32, 1)
            assert_identical([own.key, own.spec], [first.key, first.spec])


@pytest.mark.sample(1)
@every_case
def test_state_keeps_its_shapes_and_dtypes(case):
    params, state = folds(case)
    _, new = jax.eval_shape(case().update, params, state, params)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
    run = run_layer(case)
    first = jax.tree.map(jax.typeof, run.states[0])
    for state in run.states[1:]:
        assert jax.tree.map(jax.typeof, state) == first
    moved = [
        np.any(x != y)
        for x, y in zip(
            jax.tree.leaves(run.states[0]), jax.tree.leaves(run.states[-1]), strict=True
        )
    ]
    assert any(moved)


@pytest.mark.sample(1)
@every_case
def test_map_params_hands_each_array_its_parameters_value(case):
    params, state = folds(case)
    specs = {name: jax.P(name, *([None] * params[name].ndim)) for name in params}
    seen = collections.Counter()

    def pair(array, spec):
        seen[spec[0]] += 1
        return spec

    mapped = optax.tree.map_params(
        case(),
        pair,
        state,
        specs,
        transform_non_params=lambda x: x,
    )
    for name, tree in own_trees(mapped):
        assert named(tree) == specs, name
    # As often for one parameter as for any other, optax's own inner trees included.
    assert set(seen) == set(params)
    assert set(seen.values()) == {seen["wide"]}
    assert seen["wide"] >= len(own_trees(state))
    # What is no parameter's stays.
    for ours, theirs in zip(own_states(mapped), own_states(state), strict=True):
        assert_identical(
            [getattr(ours, field) for field in COUNTERS[type(ours)]],
            [getattr(theirs, field) for field in COUNTERS[type(theirs)]],
        )


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@every_case
def test_state_dtype_is_the_arguments_and_not_the_parameters(case, dtype):
    def check(tx, params, sketches):
        for name, tree in own_trees(jax.eval_shape(tx.init, params)):
            # Second moments stay in float32: a coarser dtype would lose their steps.
            wanted = "float32" if name.startswith("FactoredRms") else sketches
            if name.endswith("basis") and case.factory is fj.dct_adamw:
                wanted = "int32"
            if case.factory is fj.quantize_state and name.endswith(SKETCHES):
                # Codes, and the bias as it is.
                code = "uint8" if name.endswith("nu") else "int8"
                kernel = tree["layer"].pop("kernel")
                assert kernel.dtype.name == code, name
            assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {wanted}, name

    check(case(), layer(dtype), "float32")
    if case.takes("dtype") and case.factory is not fj.quantize_state:
        check(case(dtype=dtype), layer(), dtype)


@pytest.mark.sample(1)
@every_case
def test_half_precision_state_keeps_its_dtype(case):
    dtype = {"dtype": jnp.bfloat16} if case.takes("dtype") else {}
    tx, params = case(**dtype), every_fold()
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"float32"}


@pytest.mark.sample(1)
@every_case
def test_an_empty_tree(case):
    tx = case()
    state = tx.init({})
    for _ in range(EVERY_K):
        updates, state = tx.update({}, state, {})
        assert updates == {}
    counts = [getattr(own, COUNTERS[type(own)][-1]).item() for own in own_states(state)]
    assert set(counts) == {1 if case.accumulates else EVERY_K}


@pytest.mark.sample(1)
@every_case
def test_abstract_parameters(case):
    # What optax asks (optax/_src/sharding_test.py), and more: the same structure.
    params, state = folds(case)
    expected = jax.tree.map(jax.typeof, state)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    for tree in (params, abstract):
        types = jax.eval_shape(case().init, tree)
        assert jax.tree.map(jax.typeof, types) == expected
    make = functools.partial(case().init, abstract)
    # Coding zeros operation by operation would compile for long.
    quantized = case.factory is fj.quantize_state
    concrete, state = state, jax.jit(make)() if quantized else make()
    for name, tree in own_trees(state):
        assert named(tree).keys() == params.keys(), name
        # A scale of zeros is what the code wants it to be.
        if not name.endswith("scales"):
            assert not any(np.any(leaf) for leaf in named(tree).values()), name
    assert_identical(state, concrete)
    assert jax.tree.map(jax.typeof, state) == expected


def test_the_layout_table_is_of_sketched_leaves():
    assert all(np.prod(row[0]) < np.prod(shape) for shape, row in LAYOUT.items())
    assert all(FOLDS.rank in row[0] for row in LAYOUT.values())


@pytest.mark.sample(3)
@every_case
def test_a_leaf_may_have_more_elements_than_int32(case):
    # The gate of Llama-3-70B, its layers stacked: 1.9e10.
    params = {"gate": jax.ShapeDtypeStruct((80, 8192, 28672), jnp.float32)}
    tx = case(fj.Sketch(256))
    state = jax.eval_shape(tx.init, params)
    new, _ = jax.eval_shape(
        lambda params, state: fj.update_and_apply(tx, params, state, params),
        params,
        state,
    )
    assert new == params
