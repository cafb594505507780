"""The list is complete, and its leaves really are sketched."""

import inspect

import jax
import optax
import pytest

import flora_jax as fj
from tests.common import SKETCHED, every_fold
from tests.conformance.cases import (
    CASES,
    FOLDS,
    SMALL,
    every_sketching_case,
    layer,
    named,
)
from tests.conformance.states import SKETCHES, TREES, own_states, own_trees

# Public functions that make no transformation. Whatever else is public is in the list.
OTHERS = {
    "apply_updates",
    "compressed_accumulator",
    "compressed_pmean",
    "diagnostics",
    "embeddings",
    "explain_sketched_gradients",
    "has_updated",
    "memory_plan",
    "not_embeddings",
    "plan_leaves",
    "rank_for_budget",
    "ranks_for_budget",
    "sketched_value_and_grad",
    "update_and_apply",
    "state_sharding",
    "verify_state",
}
# Without a state there is little to conform: flora_muon has it inside.
STATELESS = {"orthogonalize"}


def plan(params, setting):
    plans = named(fj.plan_leaves(params, setting))
    return {path: leaf.dense_reason for path, leaf in plans.items()}


def test_the_list_has_every_public_transformation():
    functions = {name for name in fj.__all__ if inspect.isfunction(getattr(fj, name))}
    listed = {case.factory.__name__ for case in CASES}
    assert functions - OTHERS == listed | STATELESS
    assert not listed & STATELESS
    for name in STATELESS:
        assert getattr(fj, name)().init(layer()) == optax.EmptyState()
    for name in OTHERS:
        returns = inspect.signature(getattr(fj, name)).return_annotation
        assert "GradientTransformation" not in str(returns), name


def test_the_list_has_every_public_state_of_a_transformation():
    states = {name for name in fj.__all__ if name.endswith("State")}
    assert states == {state.__name__ for state in TREES}
    assert len({case.name for case in CASES}) == len(CASES)
    found = {
        type(state) for case in CASES for state in own_states(case().init(layer()))
    }
    assert found == set(TREES)


def test_every_kind_of_fold_is_planned():
    reasons = plan(every_fold(), FOLDS)
    assert {path for path, why in reasons.items() if why is None} == SKETCHED


def test_the_small_setting_sketches_a_2x2_matrix():
    reasons = plan(
        {"vector": jax.numpy.ones(3), "matrix": jax.numpy.ones((2, 2))}, SMALL
    )
    assert reasons == {"vector": "it has fewer than two axes", "matrix": None}


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("make", "sketched"),
    [(every_fold, SKETCHED), (layer, {"layer/kernel"})],
    ids=["folds", "layer"],
)
@every_sketching_case
def test_the_planned_leaves_are_sketched(case, make, sketched):
    params = make()
    state = jax.eval_shape(case().init, params)
    trees = (tree for name, tree in own_trees(state) if name.endswith(SKETCHES))
    shapes = {path: leaf.shape for path, leaf in named(params).items()}
    smaller = {
        path
        for path, leaf in named(next(trees)).items()
        # Adam has the dense leaves of flora_muon; a single zero stands for each.
        if leaf.shape not in (shapes[path], (1,) * leaf.ndim)
    }
    assert smaller == sketched
