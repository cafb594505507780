"""The recipes inside a subspace against the chains that they name."""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import assert_close
from tests.optimizers.test_family import (
    ADAM,
    B1,
    B2,
    DECAY,
    RECIPES,
    SKETCH,
    WEIGHTS,
)
from tests.reference import folds
from tests.subspace.bases import stepped
from tests.subspace.settings import gradients_of

# What each recipe stands for, with the papers' numbers: arguments of
# scale_in_subspace, its projection and rank, and Adam's b2 and eps.
DECAYS, LATER = {"b1": 0.9, "b2": 0.999}, {"b1": 0.9, "b2": 0.99}
CHAINS = {
    "galore": (
        fj.galore,
        {"refresh_every": 200, "scale": 0.25},
        (fj.TopSVD(), 4),
        (0.999, 1e-6),
    ),
    "fira": (
        fj.fira,
        {"refresh_every": 200, "residual": fj.Fira(1.01, **DECAYS), "scale": 0.25},
        (fj.TopSVD(), 4),
        (0.999, 1e-6),
    ),
    "apollo": (
        fj.apollo,
        {"refresh_every": 200, "residual": fj.Apollo(1.01, **DECAYS)},
        (fj.CountSketch("unbiased"), 4),
        (0.999, 1e-6),
    ),
    "apollo_mini": (
        fj.apollo_mini,
        {
            "refresh_every": 200,
            "residual": fj.Apollo(1.01, norms="tensor", **DECAYS),
            "scale": math.sqrt(128.0),
        },
        (fj.Gaussian(), 1),
        (0.999, 1e-6),
    ),
    "dct_adamw": (
        fj.dct_adamw,
        {"refresh_every": 1, "transport": fj.Squared()},
        (fj.TopDCT(), 4),
        (0.999, 1e-8),
    ),
    "flora_adamw": (
        fj.flora_adamw,
        {
            "refresh_every": 100,
            "transport": fj.Squared(),
            "residual": fj.Fira(1.01, **LATER),
        },
        (fj.CountSketch(), 4),
        (0.99, 1e-8),
    ),
}


def in_subspace(recipe, **changes):
    """The subspace part of a recipe, and the sketch that both are given."""
    _, settings, (projection, rank), (b2, eps) = CHAINS[recipe]
    sketch = dataclasses.replace(SKETCH, rank=rank, **changes)
    inner = optax.scale_by_adam(0.9, b2, eps)
    explicit = dataclasses.replace(sketch, projection=projection)
    return fj.scale_in_subspace(inner, explicit, **settings), sketch


@pytest.mark.sample(2)
@pytest.mark.parametrize("recipe", CHAINS)
def test_equals_its_chain_with_the_papers_settings(recipe):
    factory = CHAINS[recipe][0]
    params = {name: WEIGHTS[name] for name in ("wide", "square")}
    mask = {"wide": True, "square": False}
    subspace, sketch = in_subspace(recipe)
    ours = factory(0.1, sketch, weight_decay=DECAY, weight_decay_mask=mask)
    chain = optax.chain(
        subspace,
        optax.add_decayed_weights(DECAY, mask),
        optax.scale_by_learning_rate(0.1),
    )
    state = ours.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(chain.init(params))
    np.testing.assert_array_equal(state[0].spec, chain.init(params)[0].spec)
    gradients = folds.gradients(3, tuple(params))
    updates, _ = stepped(ours, gradients, params)
    expected, _ = stepped(chain, gradients, params)
    assert_close(updates, expected)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("factory", "options", "projection"),
    [
        (
            fj.fira,
            {
                "residual": fj.FiraCode(limiter=None, norms="tensor"),
                "scale": 0.5,
                "refresh_every": None,
            },
            fj.TopSVD(),
        ),
        (
            fj.flora_adamw,
            {
                "residual": fj.Apollo(limiter=1.5, norms="tensor"),
                "transport": fj.Reset(),
                "scale": 0.5,
                "refresh_every": 1,
                "stagger": True,
            },
            fj.Rademacher(),
        ),
        (
            fj.dct_adamw,
            {"error_feedback": True, "refresh_every": 2, "scale": 0.5},
            fj.TopDCT(norm="l2"),
        ),
        (
            fj.flora_adamw,
            {"residual": None, "transport": fj.LDAdam(), "refresh_every": 2},
            fj.Orthogonal(),
        ),
    ],
    ids=["fira", "flora_adamw", "dct_adamw", "flora_adamw-ldadam"],
)
def test_options_reach_the_subspace(factory, options, projection):
    # The chain has no default in common with the recipe, whose decays fill gaps.
    ours = dataclasses.replace(SKETCH, projection=projection)
    filled = {
        name: dataclasses.replace(value, b1=B1, b2=B2)
        if hasattr(value, "b1")
        else value
        for name, value in options.items()
    }
    moved = {"transport": fj.Squared()} if factory is fj.dct_adamw else {}
    chain = fj.scale_in_subspace(
        optax.scale_by_adam(**ADAM), ours, **{**moved, **filled}
    )
    gradients = gradients_of(("wide",), 3)
    updates, state = stepped(factory(1.0, ours, **options, **ADAM), gradients)
    expected, last = stepped(chain, gradients)
    assert_close(updates, jax.tree.map(jnp.negative, expected))
    np.testing.assert_array_equal(state[0].spec, last.spec)


@pytest.mark.full
def test_decays_of_ones_own_are_kept():
    own = fj.Fira(b1=0.3, b2=0.4)
    gradients = gradients_of(("wide",), 3)
    updates, _ = stepped(fj.flora_adamw(1.0, SKETCH, residual=own), gradients)
    filled, _ = stepped(fj.flora_adamw(1.0, SKETCH), gradients)
    assert np.linalg.norm(updates[2]["wide"] - filled[2]["wide"]) > 1e-3


@pytest.mark.full
def test_orthogonal_flora_adamw_is_the_chain_with_orthogonalize():
    # Only the mask says that square passes, and of stack only the dimension numbers.
    params = {name: WEIGHTS[name] for name in ("square", "cut", "stack")}
    numbers = {
        "square": optax.contrib.MuonDimensionNumbers(0, 1),
        "cut": optax.contrib.MuonDimensionNumbers((2, 0), 1),
        "stack": None,
    }
    rules = {
        "mask": {name: name != "square" for name in params},
        "min_dim_size": 4,
        "max_aspect_ratio": 40,
        "weight_dimension_numbers": numbers,
    }
    sketch = fj.Sketch(3, side="larger", key=11, **rules)
    plain = fj.flora_adamw(0.1, sketch, weight_decay=DECAY, **ADAM)
    ours = fj.flora_adamw(0.1, sketch, weight_decay=DECAY, orthogonal=True, **ADAM)
    chain = optax.chain(
        fj.scale_in_subspace(
            optax.scale_by_adam(**ADAM),
            sketch,
            100,
            transport=fj.Squared(),
            residual=fj.Fira(b1=B1, b2=B2),
        ),
        fj.orthogonalize(rules=fj.LeafRules(**rules)),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(0.1),
    )
    types = (jax.eval_shape(tx.init, params) for tx in (ours, chain))
    assert len(set(map(jax.tree.structure, types))) == 1
    gradients = folds.gradients(2, tuple(params))
    updates, _ = stepped(ours, gradients, params)
    expected, _ = stepped(chain, gradients, params)
    assert_close(updates, expected)
    # It reaches the matrices and no other leaf.
    dense, _ = stepped(plain, gradients[:1], params)
    for name in ("square", "stack"):
        assert_close(updates[0][name], dense[0][name])
    norm = np.linalg.norm(dense[0]["cut"])
    assert np.linalg.norm(updates[0]["cut"] - dense[0]["cut"]) > 0.1 * norm


def recipes():
    """Names of the recipes that have a subspace."""
    functions = {name: getattr(fj, name) for name in dir(fj)}
    return {
        name
        for name, f in functions.items()
        if inspect.isfunction(f)
        and {"refresh_every", "learning_rate"} <= set(inspect.signature(f).parameters)
    }


def test_every_recipe_is_here():
    # FLORA-Muon has a momentum and no Adam: an oracle and a chain of its own.
    for table in (RECIPES, CHAINS):
        found = {factory.__name__ for factory, *_ in table.values()}
        assert found == recipes() - {"flora_muon"}


@pytest.mark.parametrize("recipe", CHAINS)
def test_rules_reach_the_subspace(recipe):
    factory = CHAINS[recipe][0]
    # The aspect ratio leaves out tall, the mask square.
    params = {name: jnp.zeros(folds.SHAPES[name][0]) for name in folds.SHAPES}
    alone, sketch = in_subspace(
        recipe,
        side="larger",
        mask=lambda path, shape: path != "square",
        max_aspect_ratio=1.9,
    )
    tx = factory(0.1, sketch)
    ours, theirs = (jax.eval_shape(x.init, params) for x in (tx, alone))
    assert jax.tree.map(jax.typeof, ours[0]) == jax.tree.map(jax.typeof, theirs)
    shapes = {k: v.shape for k, v in ours[0].inner.mu.items()}
    sketched = {k for k in shapes if shapes[k] != params[k].shape}
    assert sketched == {"wide", "stack"}
    np.testing.assert_array_equal(tx.init({})[0].spec, alone.init({}).spec)


@pytest.mark.parametrize("state_dtype", ["int8", "float8_e4m3fn", "bfloat16"])
def test_state_dtype_is_quantize_state_of_the_moments(state_dtype):
    # Above the size from which on moments are coded: 4096 elements.
    params = {"w": jnp.zeros((128, 256)), "b": jnp.zeros(128)}
    for factory, fields in (
        (fj.dct_adamw, ("mu", "nu", "error")),
        (fj.fira, ("mu", "nu")),
    ):
        feedback = {"error_feedback": True} if "error" in fields else {}
        tx = factory(0.1, 32, state_dtype=state_dtype, **feedback)
        alone = fj.quantize_state(
            factory(1.0, 32, **feedback), state_dtype, fields=fields
        )
        ours, theirs = (jax.eval_shape(x.init, params) for x in (tx, alone))
        types = jax.tree.map(jax.typeof, (ours[0].inner, ours[0].scales))
        expected = jax.tree.map(jax.typeof, (theirs.inner[0], theirs.scales))
        assert types == expected
        codes = {ours[0].inner.inner.mu["w"].dtype, ours[0].inner.inner.mu["b"].dtype}
        assert codes == {jnp.dtype(state_dtype), jnp.dtype("float32")}


@pytest.mark.full
@pytest.mark.parametrize("factory", [fj.flora_adamw, fj.flora_muon])
def test_coded_moments_train_nearly_alike(factory):
    rng = np.random.default_rng(0)
    gradients = [{"w": np.float32(rng.normal(size=(128, 256)))} for _ in range(3)]
    exact, _ = stepped(factory(0.1, 32), gradients)
    coded, _ = stepped(factory(0.1, 32, state_dtype="int8"), gradients)
    for ours, theirs in zip(coded, exact, strict=True):
        error = np.linalg.norm(ours["w"] - theirs["w"])
        assert error < 0.05 * np.linalg.norm(theirs["w"])
    assert error > 0


@pytest.mark.full
def test_flora_muon_is_the_chain_of_the_readme():
    shapes = {"w": (16, 24), "full": (4, 8), "wte": (16, 24), "b": (16,)}
    rng = np.random.default_rng(0)
    gradients = [
        {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    # "full" is a matrix of no more columns than the rank: Muon without a sketch.
    sketch = fj.Sketch(4, mask=fj.not_embeddings, min_dim_size=4)
    rules = fj.LeafRules(mask=fj.not_embeddings, min_dim_size=4)
    momentum = fj.scale_in_subspace(
        optax.trace(0.95, nesterov=True),
        sketch,
        50,
        transport=fj.Squared(),
        residual=fj.Fira(limiter=1.01),
    )
    matrices = optax.chain(momentum, fj.orthogonalize(rules=rules))
    labels = {"w": "m", "full": "m", "wte": "a", "b": "a"}
    chain = optax.chain(
        optax.partition({"m": matrices, "a": optax.scale_by_adam()}, labels),
        optax.scale_by_learning_rate(0.1),
    )
    updates, state = stepped(fj.flora_muon(0.1, sketch), gradients)
    expected, _ = stepped(chain, gradients)
    assert_close(updates, expected)
    trace = {k: x.shape for k, x in state[0].matrices[0].inner.trace.items()}
    assert trace == {"w": (4, 24), "full": (4, 8), "wte": (1, 1), "b": (1,)}
    moments = {k: x.shape for k, x in state[0].rest.mu.items() if x.size > 1}
    assert moments.keys() == {"wte", "b"}


ALL = sorted([*recipes(), "flora"])
DECAYED = {"w": True, "b": False}


def decay_mask(tree):
    """Matrices alone: what a user gives as ``weight_decay_mask``."""
    return jax.tree.map(lambda x: x.ndim > 1, tree)


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", ALL)
def test_inject_hyperparams_needs_no_static_args(recipe):
    factory = getattr(fj, recipe)
    interval = "resample_every" if recipe == "flora" else "refresh_every"
    # A decay whose powers are far from 1: optax debiases in float32.
    decays = {"b1": 0.5} if recipe == "flora" else {"b1": 0.5, "b2": 0.9}
    rng = np.random.default_rng(0)
    params = {
        "w": np.float32(rng.normal(size=(16, 24))),
        "b": np.float32(rng.normal(size=16)),
    }
    gradients = folds.gradients(4, ("wide",))
    gradients = [{"w": g["wide"], "b": g["wide"][:, 0]} for g in gradients]
    arguments = {
        "learning_rate": optax.linear_schedule(0.1, 0.2, 4),
        "sketch": dataclasses.replace(SKETCH, rank=8),
        interval: 2,
        "weight_decay": 0.1,
        **decays,
    }
    plain = factory(**arguments, weight_decay_mask=DECAYED)
    injected = optax.inject_hyperparams(factory)(
        **arguments, weight_decay_mask=decay_mask
    )
    state = injected.init(params)
    assert {"learning_rate", interval, *decays} <= state.hyperparams.keys()
    expected, _ = stepped(plain, gradients, params)
    updates, _ = stepped(injected, gradients, params)
    assert_close(updates, expected)
    # A mask that is callable means the same without inject_hyperparams.
    masked, _ = stepped(
        factory(**arguments, weight_decay_mask=decay_mask), gradients[:1], params
    )
    assert_close(masked[0], expected[0])


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", ALL)
def test_defaults_work_under_inject_hyperparams(recipe):
    injected = optax.inject_hyperparams(getattr(fj, recipe))(
        learning_rate=0.1, sketch=fj.Sketch(8)
    )
    params = {"w": jnp.ones((128, 256))}
    state = jax.jit(injected.init)(params)
    types = [jax.tree.map(jax.typeof, state)]
    _, new = jax.eval_shape(injected.update, params, state, params)
    assert jax.tree.map(jax.typeof, new) == types[0]
