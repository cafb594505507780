"""Random transformations on random trees: they work as promised, or refuse clearly."""

import collections
import re
import zlib
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.conformance.cases import assert_identical
from tests.properties.strategies import FACTORIES, cases, plans_of
from tests.properties.trees import FLOATS, ODD, gradients, parameters

STEPS = 6  # Past a refresh or a cycle of every interval that strategies draw.
PACKAGE = Path(fj.__file__).parent


def settings(examples):
    """No shrinking, which would compile for minutes; cases print themselves as code."""
    return hypothesis.settings(
        max_examples=examples,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def assert_refused(case, params):
    """It raises before a first update, in flora_jax, and says what and where."""
    with pytest.raises((TypeError, ValueError)) as caught:
        jax.eval_shape(case.make().init, params)
    message = str(caught.value)
    assert any(re.search(reason, message) for reason in case.reasons), message
    assert re.search(r"`[a-z_]+[0-9]?`|leaf '", message), message
    assert PACKAGE in Path(str(caught.traceback[-1].path)).parents, caught.traceback


def assert_stable(case, params):
    """Updates are like the gradients and states like the first, by types alone."""
    tx = case.make()
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert signature(new) == signature(state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(params)]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(updates)] == shapes


def signature(tree):
    """All that decides whether a compiled function fits."""
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


def assert_runs(case, params, rng):
    """STEPS updates under jit: finite, of the same types, compiled once."""
    tx, traces = case.make(), []

    @jax.jit
    def step(grads, state, params):
        traces.append(None)
        return tx.update(grads, state, params)

    state = jax.jit(tx.init)(params)
    for _ in range(STEPS):
        grads = gradients(case.tree, rng, case.narrow, case.boundless)
        updates, state = step(grads, state, params)
        for tree in (updates, state):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                assert is_finite(leaf), jax.tree_util.keystr(path)
    assert len(traces) == 1
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for update, param in zip(*map(jax.tree.leaves, (updates, params)), strict=True):
        assert (update.shape, update.dtype) == (param.shape, param.dtype)


def is_finite(x):
    x = np.asarray(x)
    x = x if x.dtype.kind == "c" else x.astype(np.float32)
    return np.isfinite(x).all()


def traits(case):
    """What a case's tree is made of, and whether some leaf of it is sketched."""
    nodes = []
    leaves = jax.tree.leaves(case.tree, is_leaf=lambda x: nodes.append(x) and False)
    found = {type(node).__name__ for node in nodes}
    for leaf in leaves:
        found |= {leaf.dtype, f"{len(leaf.shape)}-D"}
        found |= {"zero-size axis"} if 0 in leaf.shape else set()
        found |= {"size-1 axis"} if 1 in leaf.shape else set()
    if not case.reasons and case.sketch is not None:
        plans = jax.tree.leaves(plans_of(case.sketch, case.tree))
        found |= {"sketched"} if any(not plan.dense_reason for plan in plans) else set()
    return found


def search(factory, examples, compiled):
    """Draws cases, checks each, and counts how they went and what they held."""
    seen = collections.Counter()

    # The same cases in every run, others in each test.
    @hypothesis.seed(zlib.crc32(f"{factory.__name__} {examples}".encode()))
    @settings(examples)
    @hypothesis.given(cases(factory))
    def check(case):
        rng = np.random.default_rng(case.seed)
        params = parameters(case.tree, rng)
        if case.reasons:
            assert_refused(case, params)
        elif compiled:
            assert_runs(case, params, rng)
        else:
            assert_stable(case, params)
        seen.update(traits(case))
        seen["cases"] += 1
        seen["refused" if case.reasons else "worked"] += 1

    check()
    counts = ", ".join(f"{seen[name]} {name}" for name in COUNTED if seen[name])
    print(f"{factory.__name__}: {counts}", flush=True)
    assert seen["cases"] >= examples
    return seen


TREES = [*(f"{n}-D" for n in range(6)), "size-1 axis", "zero-size axis", *FLOATS, *ODD]
TREES += ["dict", "list", "tuple", "Pair", "Layer", "NoneType", "MaskedNode"]
COUNTED = ["cases", "worked", "refused", "sketched", *TREES]
# Most trees have leaves that are not sketched, as most settings leave them.
pytestmark = pytest.mark.filterwarnings("ignore:.* sketches .* leaves:UserWarning")
names = pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__name__)


@pytest.mark.sample(1)
@pytest.mark.parametrize("examples", [5, 8])
@names
def test_types_and_refusals(factory, examples):
    assert search(factory, examples, compiled=False)["worked"]


@pytest.mark.full
@names
def test_runs(factory):
    assert search(factory, 3, compiled=True)["worked"]


TOTAL = collections.Counter()


@pytest.mark.slow
@names
def test_runs_of_many(factory):
    seen = search(factory, 154, compiled=True)
    TOTAL.update(seen)
    print(f"so far: {TOTAL['cases']} cases", flush=True)  # 2,156 in the end.
    assert seen["worked"] >= 50
    assert seen["refused"]
    assert min(seen[name] for name in TREES if name not in ODD) >= 1


def test_complex_moments_are_kept_exactly():
    params = {"z": jnp.ones((4, 8), jnp.complex64) * (1 + 2j)}
    inner = optax.adam(0.1)
    tx = fj.quantize_state(inner, min_size=1)
    state, expected = tx.init(params), inner.init(params)
    for _ in range(2):
        ours, state = tx.update(params, state)
        theirs, expected = inner.update(params, expected)
        assert_identical(ours, theirs)
    assert_identical(state.inner, expected)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_moments_of_integers_are_refused(dtype):
    params = {"w": jnp.ones((4, 8)), "n": jnp.ones(3, dtype)}
    tx = fj.quantize_state(optax.adam(0.1))
    name = jnp.dtype(dtype).name
    with pytest.raises(TypeError, match=f"`inner` must keep .* got {name} .*leaf 'n'"):
        tx.init(params)
    rest = optax.masked(tx, {"w": True, "n": False})
    assert rest.init(params).inner_state.inner[0].mu["w"].shape == (4, 8)


@pytest.mark.full
def test_complex_leaves_split_as_the_refusal_says():
    ones = {"z": jnp.ones((8, 16), jnp.complex64), "d": jnp.ones(3, jnp.complex64)}
    params = jax.tree.map(lambda x: x * (1 + 2j), ones)
    ours = fj.compressed_momentum(0.5, fj.Sketch(2, min_dim_size=8), estimator="paper")
    with pytest.raises(TypeError, match="leaf 'd' .*split_real_and_imaginary"):
        ours.init(params)
    tx = optax.contrib.split_real_and_imaginary(ours)
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    shapes = [x.shape for x in jax.tree.leaves(state.inner_state.momentum)]
    assert shapes == [(3,), (3,), (2, 16), (2, 16)]
    np.testing.assert_array_equal(updates["d"], 0.5 * params["d"])
    # A bucket is half of the sum of four signs, for the imaginary part twice that.
    z = np.asarray(updates["z"])
    assert set(np.abs(z.real).ravel()) <= {0.0, 1.0, 2.0}
    assert set(np.abs(z.imag).ravel()) <= {0.0, 2.0, 4.0}
    assert z.dtype == np.complex64
    assert z.real.any()
