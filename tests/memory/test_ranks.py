"""Ranks for a budget against WeLore's rule in float64, over all thresholds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import flora_jax as fj
from tests.reference import folds

SKETCH = fj.Sketch(1, min_dim_size=8, max_aspect_ratio=4)
# Of the state but for the sketches: counters, the key, and the spec's 64 words.
MOMENTUM_BYTES = 2 * 4 + 8 + 4 * 64
DENSE = {"bias": (16,), "narrow": (16, 4)}


def sketched(rank, **settings):
    return dataclasses.replace(SKETCH, rank=rank, **settings)


def momentum(rank, **settings):
    return fj.compressed_momentum(0.5, sketched(rank, **settings))


def tree(seed=0):
    """Leaves whose spectra fall differently fast, and dense ones."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for power, (name, (shape, fold)) in enumerate(folds.SHAPES.items()):
        u, s, vt = np.linalg.svd(rng.normal(size=fold), full_matrices=False)
        leaf = (u * s[:, None, :] ** (1 + power / 2)) @ vt
        leaves[name] = leaf.reshape(shape).astype(np.float32)
    return {**leaves, **{k: np.ones(s, np.float32) for k, s in DENSE.items()}}


def welore(matrix):
    """The normalized spectrum of one matrix."""
    s = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    return (s - s.min()) / (s.max() - s.min())


def spectra(trees):
    """Mean over steps and slices, by leaf, of the matrices that are not zero."""
    return {
        name: np.mean(
            [welore(x) for t in trees for x in folds.fold(name, t[name]) if x.any()], 0
        )
        for name in folds.SHAPES
    }


def ranks_at(expected, k):
    return {name: max(1, int(np.sum(s >= k))) for name, s in expected.items()}


def momentum_bytes(ranks):
    """Of a float32 sketch of the smaller side; of the leaf itself at full rank."""
    total = MOMENTUM_BYTES + 4 * sum(int(np.prod(s)) for s in DENSE.values())
    for name, rank in ranks.items():
        batch, n, m = folds.SHAPES[name][1]
        total += 4 * batch * min(rank, n, m) * max(n, m)
    return total


def all_candidates(expected):
    """Ranks of every threshold, from the largest threshold to 0."""
    ks = np.unique(np.concatenate([*expected.values()]))[::-1]
    # Their order is the same in float32.
    assert -np.diff(ks).max() > 1e-6
    return [ranks_at(expected, k) for k in ks]


def largest(candidates, budget):
    fitting = [ranks for ranks in candidates if momentum_bytes(ranks) <= budget]
    return {**max(fitting, key=momentum_bytes), **dict.fromkeys(DENSE, 1)}


@pytest.mark.full
@pytest.mark.parametrize("steps", [1, 3])
def test_equals_the_largest_of_all_thresholds_that_fits(steps):
    trees = [tree(seed) for seed in range(steps)]
    trees[-1]["stack"][1] = 0  # Slices and leaves of zeros say nothing.
    if steps > 1:
        trees[1]["wide"][:] = 0
    candidates = all_candidates(spectra(trees))
    sizes = [momentum_bytes(ranks) for ranks in candidates]
    assert len(set(sizes)) > 50
    places = (0, 1, 20, 41, -2, -1)
    for budget in [sizes[i] + more for i in places for more in (-1, 0, 3)][1:]:
        given = iter(trees) if steps > 1 else trees[0]
        ranks = fj.ranks_for_budget(given, budget, momentum, SKETCH)
        assert ranks == largest(candidates, budget)
        assert all(type(rank) is int for rank in ranks.values())


def test_steep_spectra_get_smaller_ranks():
    """By hand: s = 9, 5, 1, ... and s = 9, 8, ..., 2 at k = 0.5."""
    falls = {"steep": [9, 5] + 6 * [1], "even": list(range(9, 1, -1))}
    params = {name: jnp.diag(jnp.array(s, jnp.float32)) for name, s in falls.items()}
    # steep: 1, 0.5, 0, ...; even: 1, 6/7, 5/7, 4/7, 3/7, ...
    budget = MOMENTUM_BYTES + 4 * 8 * (2 + 4)
    ranks = fj.ranks_for_budget(params, budget, momentum, SKETCH)
    assert ranks == {"steep": 2, "even": 4}


def test_equal_singular_values_share_the_threshold_evenly():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0]
    params = {
        "flat": jnp.asarray(q, jnp.float32),  # Equal up to rounding: 1, 7/8, ... 0.
        "exact": 3 * jnp.eye(9),
        "even": jnp.diag(jnp.arange(9.0) + 2),  # The same, but not by the exception.
        "zero": jnp.zeros((9, 9)),
    }
    budget = MOMENTUM_BYTES + 4 * 9 * (5 + 5 + 5 + 1)
    ranks = fj.ranks_for_budget(params, budget, momentum, SKETCH)
    assert ranks == {"flat": 5, "exact": 5, "even": 5, "zero": 1}
    everything = fj.ranks_for_budget(params, 10**6, momentum, SKETCH)
    assert everything == dict.fromkeys(params, 9)


def stored_basis(rank):
    """A state of r(n + 2m) numbers, or of 2nm where all directions are kept."""

    def init(params):
        plans = fj.plan_leaves(params, sketched(rank))
        return [
            jnp.zeros(
                2 * x.size
                if p.dense_reason
                else p.rank * (p.width + 2 * x.size // p.width)
            )
            for x, p in zip(
                jax.tree.leaves(params), jax.tree.leaves(plans), strict=True
            )
        ]

    return optax.GradientTransformation(init, lambda u, state, params=None: (u, state))


# Each direction costs 16 + 2 * 16 numbers, the dense leaf 2 * 16 * 16.
@pytest.mark.parametrize(
    ("numbers", "rank"), [(48, 1), (240, 5), (511, 10), (512, 16), (750, 16)]
)
def test_a_state_that_shrinks_at_full_rank(numbers, rank):
    params = {"w": jnp.diag(jnp.arange(16.0) + 1)}
    ranks = fj.ranks_for_budget(params, 4 * numbers, stored_basis, SKETCH)
    assert ranks == {"w": rank}


def state_bytes(state):
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))


RECIPES = {
    "momentum": momentum,
    "flora": lambda rank: fj.flora(1e-3, sketched(rank), 0.5),
    "accumulation": lambda rank: fj.compressed_accumulation(
        optax.adam(1e-3), 4, sketched(rank), dtype=jnp.bfloat16
    ),
    "accumulator": lambda rank: fj.compressed_accumulator(sketched(rank)),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["dict", "nnx"])
def test_every_recipe_takes_the_tree(recipe, kind):
    make = RECIPES[recipe]
    leaves = tree() if kind == "dict" else {"layer": {"kernel": tree()["square"]}}
    params = jax.tree.map(jnp.asarray, leaves)
    if kind == "nnx":
        params = nnx.State(jax.tree.map(nnx.Param, params))
    ends = [state_bytes(make(rank).init(params)) for rank in (1, 15)]
    budget = sum(ends) // 2
    ranks = fj.ranks_for_budget(params, budget, make, SKETCH)
    assert jax.tree.structure(ranks) == jax.tree.structure(params)
    tx = make(ranks)
    state = tx.init(params)
    assert ends[0] < state_bytes(state) <= budget
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    abstract = jax.eval_shape(tx.init, shapes)
    for x, y in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    plans = jax.tree.leaves(fj.plan_leaves(params, sketched(ranks)))
    chosen = {p.path: p.rank for p in plans if p.dense_reason is None}
    assert max(chosen.values()) > 1
    expected = {plan.state_shape for plan in plans}
    assert expected <= {leaf.shape for leaf in jax.tree.leaves(state)}


def test_rules_decide_what_counts():
    """A fold by dimension numbers, and a mask that keeps a leaf dense."""
    spec = optax.contrib.MuonDimensionNumbers(1, (0, 2))
    leaf = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32)
    sketch = fj.Sketch(
        1,
        mask={"w": True, "wte": False},
        min_dim_size=8,
        weight_dimension_numbers={"w": spec, "wte": spec},
    )
    params = {"w": jnp.asarray(leaf), "wte": jnp.ones((3, 16, 8))}
    expected = welore(leaf.transpose(1, 0, 2).reshape(16, 24))
    budget = MOMENTUM_BYTES + 4 * (7 * 24 + leaf.size)

    def make(ranks):
        return fj.compressed_momentum(0.5, dataclasses.replace(sketch, rank=ranks))

    ranks = fj.ranks_for_budget(params, budget, make, sketch)
    assert ranks == {"w": 7, "wte": 1}
    assert np.sum(expected >= expected[6]) == 7


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_leaves(kind):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
    params = {name: tree()[name] for name in ("stack", "cut")}
    budget = MOMENTUM_BYTES + 4 * (3 * 5 * 24 + 5 * 32)
    plain = fj.ranks_for_budget(params, budget, momentum, SKETCH)
    sharding = jax.NamedSharding(mesh, jax.P(None, "x", "y"))
    sharded = jax.device_put(params, sharding)
    assert fj.ranks_for_budget(sharded, budget, momentum, SKETCH) == plain


def test_leaves_of_other_dtypes_and_trees_without_matrices():
    half = {"w": jnp.diag(jnp.arange(8.0) + 1).astype(jnp.bfloat16)}
    budget = MOMENTUM_BYTES + 4 * 8 * 3
    assert fj.ranks_for_budget(half, budget, momentum, SKETCH) == {"w": 3}
    assert fj.ranks_for_budget({}, MOMENTUM_BYTES, momentum) == {}
    bias = {"b": jnp.ones(8)}
    assert fj.ranks_for_budget(bias, MOMENTUM_BYTES + 32, momentum) == {"b": 1}


def renewed_every_step(rank):
    return fj.compressed_momentum(0.5, sketched(rank), resample_every=1)


def every_step(rank):
    return fj.compressed_accumulation(optax.identity(), 1, sketched(rank))


@pytest.mark.parametrize(
    ("make", "match"),
    [(renewed_every_step, "rho"), (every_step, "every_k")],
)
def test_warnings_of_candidates_are_not_shown(make, match):
    params = {"w": jnp.diag(jnp.arange(8.0) + 1)}
    ranks = fj.ranks_for_budget(params, MOMENTUM_BYTES + 4 * 8 * 3, make, SKETCH)
    with pytest.warns(UserWarning, match=match):
        make(ranks).init(params)


SQUARE = {"w": jnp.diag(jnp.arange(8.0) + 1), "long": jnp.ones((8, 64))}
SMALLEST = MOMENTUM_BYTES + 4 * (8 + 8 * 64)


@pytest.mark.parametrize(
    ("trees", "budget", "error", "match"),
    [
        (
            SQUARE,
            SMALLEST - 1,
            ValueError,
            f"takes {SMALLEST} bytes .*={SMALLEST - 1};",
        ),
        (SQUARE, 0, ValueError, "`budget_bytes` must be positive, got budget_bytes=0"),
        (SQUARE, 1e9, TypeError, "`budget_bytes` must be an int, got .*whole bytes"),
        (iter([]), 10**6, ValueError, "must give one tree or more"),
        (iter([{"w": SQUARE["w"]}, SQUARE]), 10**6, ValueError, "differ in .*'long'"),
        ({"w": SQUARE["w"].at[2, 3].set(jnp.nan)}, 10**6, ValueError, "leaf 'w' must"),
        (
            {"w": SQUARE["w"].at[2, 3].set(jnp.inf)},
            10**6,
            ValueError,
            "finite singular",
        ),
        (jax.eval_shape(lambda: SQUARE), 10**6, TypeError, "leaf 'w' .*with values"),
        ({"w": jnp.ones((8, 8), int)}, 10**6, TypeError, "leaf 'w' .*floating"),
    ],
)
def test_bad_input(trees, budget, error, match):
    with pytest.raises(error, match=match):
        fj.ranks_for_budget(trees, budget, momentum, SKETCH)


def test_a_decomposition_that_hides_infinity_does_not_hide_it(monkeypatch):
    svd = jnp.linalg.svd
    monkeypatch.setattr(
        jnp.linalg, "svd", lambda x, **kwargs: svd(jnp.nan_to_num(x), **kwargs)
    )
    params = {"w": SQUARE["w"].at[2, 3].set(jnp.nan)}
    with pytest.raises(ValueError, match="leaf 'w' must have finite"):
        fj.ranks_for_budget(params, 10**6, momentum, SKETCH)


def test_make_must_be_callable_and_plan_leaves_alike():
    with pytest.raises(TypeError, match="`make` must be a callable .*lambda rank"):
        fj.ranks_for_budget(SQUARE, 10**6, momentum(4), SKETCH)
    with pytest.raises(
        ValueError, match="`make` .*leaf 'long'.*aspect ratio.* 4; give"
    ):
        fj.ranks_for_budget(
            SQUARE, 10**6, lambda r: momentum(r, max_aspect_ratio=8), SKETCH
        )


def test_not_under_jit():
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda x: fj.ranks_for_budget(x, 10**6, momentum, SKETCH))(SQUARE)
