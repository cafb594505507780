"""The recipes inside a subspace against the chains that they name."""

import inspect

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
    COMMON,
    DECAY,
    ISOMETRY,
    RECIPES,
    WEIGHTS,
)
from tests.reference import folds
from tests.transforms.bases import stepped
from tests.transforms.settings import gradients_of

# What each recipe stands for, with the papers' numbers: of scale_in_subspace.
CHAINS = {
    "galore": (fj.galore, {"scale": 0.25}, (fj.TopSVD(), 4, 200), (0.999, 1e-6)),
    "fira": (
        fj.fira,
        {"residual": "fira", "limiter": 1.01, "scale": 0.25},
        (fj.TopSVD(), 4, 200),
        (0.999, 1e-6),
    ),
    "apollo": (
        fj.apollo,
        {"residual": "apollo", "limiter": 1.01},
        (fj.Gaussian(), 4, 200),
        (0.999, 1e-6),
    ),
    "apollo_mini": (
        fj.apollo_mini,
        {
            "residual": "apollo",
            "norms": "tensor",
            "limiter": 1.01,
            "scale": np.sqrt(128.0),
        },
        (fj.Gaussian(), 1, 200),
        (0.999, 1e-6),
    ),
    "dct_adamw": (
        fj.dct_adamw,
        {"transport": "squared"},
        (fj.TopDCT(), 4, 1),
        (0.999, 1e-8),
    ),
    "flora_adamw": (
        fj.flora_adamw,
        {"transport": "squared", "residual": "fira", "limiter": 1.01},
        (ISOMETRY, 4, 100),
        (0.99, 1e-8),
    ),
}


def last(factory):
    """What comes after the subspace in a recipe."""
    sizes = {name: value for name, value in COMMON.items() if name != "key"}
    return [fj.orthogonalize(**sizes)] if factory is fj.flora_adamw else []


@pytest.mark.parametrize("recipe", CHAINS)
def test_equals_its_chain_with_the_papers_settings(recipe):
    factory, settings, arguments, (b2, eps) = CHAINS[recipe]
    params = {name: WEIGHTS[name] for name in ("wide", "square")}
    mask = {"wide": True, "square": False}
    ours = factory(
        0.1, arguments[1], weight_decay=DECAY, weight_decay_mask=mask, **COMMON
    )
    chain = optax.chain(
        fj.scale_in_subspace(
            optax.scale_by_adam(0.9, b2, eps),
            *arguments,
            betas=(0.9, b2),
            **settings,
            **COMMON,
        ),
        *last(factory),
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


@pytest.mark.parametrize(
    ("factory", "options", "projection"),
    [
        (
            fj.fira,
            {
                "residual": "fira_code",
                "norms": "tensor",
                "limiter": None,
                "scale": 0.5,
                "refresh_every": None,
            },
            fj.TopSVD(method="randomized"),
        ),
        (
            fj.flora_adamw,
            {
                "residual": "apollo",
                "norms": "tensor",
                "transport": "reset",
                "limiter": 1.5,
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
    ],
    ids=["fira", "flora_adamw", "dct_adamw"],
)
def test_options_reach_the_subspace(factory, options, projection):
    # The chain has no default in common with the recipe.
    moved = {"transport": "squared"} if factory is fj.dct_adamw else {}
    plain = {"orthogonal": False} if factory is fj.flora_adamw else {}
    ours = factory(1.0, 4, projection=projection, **options, **plain, **ADAM, **COMMON)
    chain = fj.scale_in_subspace(
        optax.scale_by_adam(**ADAM),
        projection,
        4,
        betas=(B1, B2),
        **options,
        **moved,
        **COMMON,
    )
    gradients = gradients_of(("wide",), 3)
    updates, state = stepped(ours, gradients)
    expected, last = stepped(chain, gradients)
    assert_close(updates, jax.tree.map(jnp.negative, expected))
    np.testing.assert_array_equal(state[0].spec, last.spec)


def test_flora_adamw_is_the_chain_with_orthogonalize():
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
    adam = {"side": "larger", "key": 11, **rules}
    ours = fj.flora_adamw(0.1, 3, weight_decay=DECAY, **ADAM, **adam)
    chain = optax.chain(
        fj.scale_in_subspace(
            optax.scale_by_adam(**ADAM),
            ISOMETRY,
            3,
            100,
            betas=(B1, B2),
            transport="squared",
            residual="fira",
            limiter=1.01,
            **adam,
        ),
        fj.orthogonalize(**rules),
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
    plain = {**ADAM, **adam, "weight_decay": DECAY, "orthogonal": False}
    dense, _ = stepped(fj.flora_adamw(0.1, 3, **plain), gradients[:1], params)
    for name in ("square", "stack"):
        assert_close(updates[0][name], dense[0][name])
    norm = np.linalg.norm(dense[0]["cut"])
    assert np.linalg.norm(updates[0]["cut"] - dense[0]["cut"]) > 0.1 * norm


def test_every_recipe_is_here():
    named = {name for name in fj.__all__ if inspect.isfunction(getattr(fj, name))}
    ours = {
        name
        for name in named
        if {"refresh_every", "learning_rate"}
        <= set(inspect.signature(getattr(fj, name)).parameters)
    }
    for table in (RECIPES, CHAINS):
        assert {factory.__name__ for factory, *_ in table.values()} == ours


OPTIONS = {
    "side": "larger",
    "mask": lambda path, shape: path != "square",
    "max_aspect_ratio": 1.9,
    "stagger": True,
    "weight_dimension_numbers": None,
}


@pytest.mark.parametrize("recipe", CHAINS)
def test_rules_reach_the_subspace(recipe):
    factory, settings, arguments, (b2, eps) = CHAINS[recipe]
    # The aspect ratio leaves out tall, the mask square.
    params = {name: jnp.zeros(folds.SHAPES[name][0]) for name in folds.SHAPES}
    tx = factory(0.1, arguments[1], **OPTIONS, **COMMON)
    alone = fj.scale_in_subspace(
        optax.scale_by_adam(0.9, b2, eps),
        *arguments,
        betas=(0.9, b2),
        **settings,
        **OPTIONS,
        **COMMON,
    )
    ours, theirs = (jax.eval_shape(x.init, params) for x in (tx, alone))
    assert jax.tree.map(jax.typeof, ours[0]) == jax.tree.map(jax.typeof, theirs)
    shapes = {k: v.shape for k, v in ours[0].inner.mu.items()}
    sketched = {k for k in shapes if shapes[k] != params[k].shape}
    assert sketched == {"wide", "stack"}
    np.testing.assert_array_equal(tx.init({})[0].spec, alone.init({}).spec)


@pytest.mark.parametrize("state_dtype", ["int8", "float8_e4m3fn", "bfloat16"])
def test_state_dtype_is_quantize_state_of_the_moments(state_dtype):
    # Above the size from which on moments are coded: 4096 numbers.
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


def test_coded_moments_train_nearly_alike():
    rng = np.random.default_rng(0)
    gradients = [{"w": np.float32(rng.normal(size=(128, 256)))} for _ in range(3)]
    exact, _ = stepped(fj.flora_adamw(0.1, 32), gradients)
    coded, _ = stepped(fj.flora_adamw(0.1, 32, state_dtype="int8"), gradients)
    for ours, theirs in zip(coded, exact, strict=True):
        error = np.linalg.norm(ours["w"] - theirs["w"])
        assert error < 0.05 * np.linalg.norm(theirs["w"])
    assert error > 0
