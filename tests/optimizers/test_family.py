"""The recipes inside a subspace against their oracles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import assert_close, step_temporaries
from tests.reference import folds
from tests.reference.apollo import apollo
from tests.reference.dct import dct_adamw
from tests.reference.fira import direction, fira, flora_adamw
from tests.reference.galore import galore
from tests.reference.muon import orthogonalized
from tests.subspace.bases import regenerated, singular_vectors, stepped
from tests.subspace.settings import gradients_of

B1, B2, EPS, DECAY, EVERY, STEPS = 0.8, 0.9, 1e-3, 0.2, 4, 10
ADAM = {"b1": B1, "b2": B2, "eps": EPS}
RATES = jnp.float32([0.1 / (t + 1) for t in range(STEPS)])
WEIGHTS = {
    name: (0.3 * leaf).astype(np.float32)
    for name, leaf in folds.gradients(1, seed=9)[0].items()
}
BIAS = np.random.default_rng(5).normal(size=(STEPS + 1, 16)).astype(np.float32)
SKETCH = fj.Sketch(4, min_dim_size=8, key=11)
EXACT = fj.TopSVD(method="exact")


def schedule(count):
    return RATES[count]


def rate(t):
    return float(RATES[t])


def sampled(projection, name, rank=None):
    """epoch -> S of a leaf's smaller side."""
    width = folds.width(name, "smaller")
    return regenerated(projection, 11, name, rank or folds.RANKS[name], width)


def left(name):
    return folds.left(name, "smaller")


ALGORITHM = {"weight_decay": DECAY, **ADAM}
ISOMETRY = fj.CountSketch(normalization="isometric")

# Recipe, its arguments, leaves, and the oracle of one leaf: (name, w, g) -> updates.
RECIPES = {
    "galore": (
        fj.galore,
        {"refresh_every": EVERY, "projection": EXACT},
        ("tall", "cut", "stack"),
        lambda k, w, g: galore(
            w, g, singular_vectors, rate, folds.RANKS[k], EVERY, left=left(k),
            **ALGORITHM,
        ),
    ),
    "fira": (
        fj.fira,
        {"refresh_every": EVERY, "projection": EXACT},
        ("wide", "stack"),
        lambda k, w, g: fira(
            w, g, singular_vectors, rate, folds.RANKS[k], EVERY, left=left(k),
            **ALGORITHM,
        ),
    ),
    "apollo": (
        fj.apollo,
        {"refresh_every": EVERY, "scale": 2.0},
        ("wide", "stack"),
        lambda k, w, g: apollo(
            w, g, sampled(fj.CountSketch("unbiased"), k), rate, EVERY, scale=2.0,
            left=left(k), **ALGORITHM,
        ),
    ),
    "apollo_mini": (
        fj.apollo_mini,
        {"refresh_every": EVERY, "sketch": dataclasses.replace(SKETCH, rank=1)},
        ("tall",),
        lambda k, w, g: apollo(
            w, g, sampled(fj.Gaussian(), k, 1), rate, EVERY, scale=128.0, left=left(k),
            whole=True, **ALGORITHM,
        ),
    ),
    "dct_adamw": (
        fj.dct_adamw,
        {},
        ("tall", "stack"),
        lambda k, w, g: dct_adamw(
            w, g, rate, folds.RANKS[k], 1, left=left(k), **ALGORITHM
        ),
    ),
    "flora_adamw": (
        fj.flora_adamw,
        {"refresh_every": EVERY},
        ("wide", "cut"),
        lambda k, w, g: flora_adamw(
            w, g, sampled(ISOMETRY, k), rate, EVERY, "squared", left=left(k),
            **ALGORITHM,
        ),
    ),
    # The oracle runs on transposes where it sketches columns; so may its last step.
    "flora_adamw-orthogonal": (
        fj.flora_adamw,
        {"refresh_every": EVERY, "orthogonal": True},
        ("tall", "wide", "cut", "stack"),
        lambda k, w, g: flora_adamw(
            w, g, sampled(ISOMETRY, k), rate, EVERY, "squared", left=left(k),
            last=orthogonalized, **ALGORITHM,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_equals_the_oracle_and_adamw_on_dense_leaves(recipe):
    factory, arguments, names, oracle = RECIPES[recipe]
    gradients = [
        {**g, "bias": bias}
        for g, bias in zip(gradients_of(names, STEPS), BIAS, strict=False)
    ]
    params = {**{k: WEIGHTS[k] for k in names}, "bias": BIAS[-1]}
    ranks = {name: folds.RANKS[name] for name in names}
    projection = arguments.get("projection")
    sketch = dataclasses.replace(SKETCH, rank={**ranks, "*": 4}, projection=projection)
    arguments = {"sketch": sketch, **arguments, **ALGORITHM}
    arguments.pop("projection", None)
    updates, _ = stepped(factory(schedule, **arguments), gradients, params)
    for name in names:
        expected = np.stack(
            oracle(
                name,
                folds.fold(name, params[name]),
                [folds.fold(name, g[name]) for g in gradients],
            )
        )
        ours = [folds.fold(name, u[name]) for u in updates]
        atol = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=atol, err_msg=name)
    adamw = optax.adamw(schedule, weight_decay=DECAY, **ADAM)
    dense, _ = stepped(
        adamw, [{"bias": g["bias"]} for g in gradients], {"bias": params["bias"]}
    )
    assert_close([u["bias"] for u in updates], [u["bias"] for u in dense])


def test_flora_muon_is_orthogonalized_momentum_on_matrices():
    """With the momentum's transport and residual by hand; AdamW on the rest."""
    momentum, gradients = 0.8, gradients_of(("wide",), STEPS)
    gradients = [{**g, "bias": bias} for g, bias in zip(gradients, BIAS, strict=False)]
    params = {"wide": WEIGHTS["wide"], "bias": BIAS[-1]}
    tx = fj.flora_muon(
        schedule, SKETCH, refresh_every=EVERY, momentum=momentum, **ALGORITHM
    )
    updates, _ = stepped(tx, gradients, params)
    basis = sampled(ISOMETRY, "wide", 4)
    w, m, previous = np.float64(params["wide"]), np.zeros((4, 24)), 0.0
    residual = direction(1.0, least=1 / 8)
    for t, (gradient, update) in enumerate(zip(gradients, updates, strict=True)):
        g, s = np.float64(gradient["wide"]), basis(t // EVERY)
        if t and t % EVERY == 0:
            m = s @ basis(t // EVERY - 1).T @ m
        m = momentum * m + s @ g
        nesterov = momentum * m + s @ g
        full, previous = residual(g, s, s @ g, nesterov, 1.0, previous)
        expected = -rate(t) * (orthogonalized(full) + DECAY * w)
        atol = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(update["wide"], expected, rtol=0, atol=atol)
        w = w + expected
    adamw = optax.adamw(schedule, weight_decay=DECAY, **ADAM)
    biases = [{"bias": g["bias"]} for g in gradients]
    dense, _ = stepped(adamw, biases, {"bias": params["bias"]})
    assert_close([u["bias"] for u in updates], [u["bias"] for u in dense])


@pytest.mark.parametrize("make", [fj.apollo, fj.apollo_mini])
def test_a_step_writes_no_second_copy_of_a_gradient(make):
    """Nor of its squares, whose sums scale and limit the update."""
    params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    tx = make(1e-3) if make is fj.apollo_mini else make(1e-3, 32)
    assert step_temporaries(tx, params) < 0.5 * 4 * 512 * 1024
