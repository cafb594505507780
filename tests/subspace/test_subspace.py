"""Adam inside a subspace against the oracle, under every option."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import assert_close
from tests.reference import dct, folds
from tests.subspace.bases import stepped
from tests.subspace.settings import (
    ALL,
    B1,
    B2,
    COUNTSKETCH,
    DECAYS,
    EPS,
    EVERY,
    Setting,
    gradients_of,
)

SETTINGS = [
    Setting(fj.TopSVD(method="exact"), scale=0.25),
    Setting(
        fj.TopSVD(method="exact"),
        ("tall", "cut"),
        side="larger",
        transport=fj.LDAdam(**DECAYS),
        residual=fj.Fira(norms="tensor", **DECAYS),
    ),
    Setting(
        fj.TopSVD(method="exact"),
        ("tall", "stack"),
        side="left",
        transport=fj.Squared(),
        residual=fj.Plain(),
        scale=0.5,
    ),
    Setting(
        fj.TopSVD(),
        ("tall", "wide", "stack"),
        residual=fj.FiraCode(norms="tensor", **DECAYS),
        scale=0.5,
    ),
    Setting(
        fj.TopDCT(norm="l2"),
        ("wide", "square", "cut"),
        side="larger",
        transport=fj.Reset(**DECAYS),
        residual=fj.Fira(limiter=None, **DECAYS),
    ),
    Setting(fj.TopDCT(), ("tall", "stack"), transport=fj.LDAdam(**DECAYS), every=2),
    Setting(
        COUNTSKETCH,
        ("cut", "stack"),
        transport=fj.PreserveRMS(),
        residual=fj.Fira(**DECAYS),
        scale=0.5,
    ),
    Setting(
        fj.Orthogonal(normalization="isometric"),
        ("wide", "cut"),
        side="right",
        transport=fj.LDAdam(**DECAYS),
        residual=fj.FiraCode(limiter=1.2, **DECAYS),
        scale=0.5,
    ),
    Setting(
        COUNTSKETCH,
        ("stack", "square"),
        transport=fj.Squared(),
        residual=fj.Apollo(norms="tensor"),
        scale=2.0,
    ),
    Setting(
        fj.Gaussian(),
        ("tall", "stack"),
        side="larger",
        transport=fj.Reset(**DECAYS),
        residual=fj.Apollo(limiter=1.05, **DECAYS),
    ),
    Setting(fj.Gaussian(), ("wide", "square"), every=None),
    Setting(
        fj.TopSVD(method="exact"),
        ("tall", "wide", "square"),
        transport=fj.Squared(),
        stagger=True,
    ),
    Setting(
        COUNTSKETCH,
        ("tall", "wide"),
        transport=fj.Squared(),
        residual=fj.Plain(),
        stagger=True,
    ),
]


def check_oracle(setting, gradients):
    updates, state = stepped(setting.make(), gradients)
    assert int(state.count) == len(gradients)
    for name in setting.names:
        expected = setting.expected(name, gradients)
        ours = [folds.fold(name, u[name]) for u in updates]
        # Debiasing in float32 costs some digits; singular vectors of near values, more.
        rtol = 1e-4 if isinstance(setting.projection, fj.TopSVD) else 2e-5
        atol = rtol * np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=atol, err_msg=name)
    return updates


@pytest.mark.sample(1)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_equals_the_oracle(setting):
    check_oracle(setting, gradients_of(setting.names))


def test_the_limiter_matters_in_these_runs():
    # Else the comparisons above would say nothing about it.
    names = ("wide",)
    limited = Setting(COUNTSKETCH, names, residual=fj.Fira(**DECAYS))
    free = dataclasses.replace(limited, residual=fj.Fira(limiter=None, **DECAYS))
    grads = gradients_of(names)
    ours, others = limited.expected("wide", grads), free.expected("wide", grads)
    ratio = np.abs(np.subtract(ours, others)).max((1, 2, 3)) / np.abs(others).max()
    assert (ratio > 0.01).sum() >= 3


@pytest.mark.full
def test_a_leaf_that_begins_with_zero_gradients_is_not_limited_then():
    setting = Setting(COUNTSKETCH, ("wide",), residual=fj.Fira(**DECAYS))
    grads = gradients_of(setting.names, 7)
    for g in grads[:3]:
        g["wide"] = np.zeros_like(g["wide"])
    updates = check_oracle(setting, grads)
    assert not any(np.any(u["wide"]) for u in updates[:3])
    free = fj.Fira(limiter=None, **DECAYS)
    unlimited, _ = stepped(setting.make(residual=free), grads[:4])
    assert_close(updates[3], unlimited[3])


@pytest.mark.sample(1)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_error_feedback_equals_the_oracle(norm):
    grads = gradients_of(ALL)
    setting = Setting(fj.TopDCT(norm=norm), transport=fj.Squared())
    updates, state = stepped(setting.make(error_feedback=True), grads)
    for name in ALL:
        expected = dct.dct_adamw(
            folds.fold(name, np.zeros(folds.SHAPES[name][0])),
            [folds.fold(name, g[name]) for g in grads],
            lambda t: -1.0,
            folds.RANKS[name],
            EVERY,
            B1,
            B2,
            EPS,
            left=folds.left(name, "smaller"),
            norm=norm,
            error_feedback=True,
        )
        ours = [folds.fold(name, u[name]) for u in updates]
        atol = 2e-5 * np.abs(expected).max()
        np.testing.assert_allclose(np.stack(ours), expected, rtol=0, atol=atol)
        assert state.error[name].shape == folds.SHAPES[name][0]


def test_what_is_sent_and_what_is_kept_is_the_gradient():
    # R S + E of every step is the gradient and what was kept before it.
    grads = gradients_of(("wide",), 3)
    inner = optax.identity()
    sketch = fj.Sketch(5, min_dim_size=8)
    tx = fj.scale_in_subspace(inner, sketch, 2, error_feedback=True)
    step, state, kept = jax.jit(tx.update), tx.init(grads[0]), 0.0
    for g in grads:
        update, state = step(g, state)
        assert_close(update["wide"] + state.error["wide"], g["wide"] + kept)
        kept = state.error["wide"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("shape", [(16, 24), (24, 16)], ids=["wide", "tall"])
def test_equals_optax_galore(shape):
    rng = np.random.default_rng(3)
    grads = [{"w": np.float32(rng.normal(size=shape))} for _ in range(9)]
    # It projects the larger side, with Adam's own eps and without a scale.
    sketch = fj.Sketch(4, fj.TopSVD(method="exact"), side="larger", min_dim_size=8)
    ours = fj.scale_in_subspace(optax.scale_by_adam(), sketch, 3)
    theirs = optax.contrib.galore(1.0, rank=4, update_proj_gap=3)
    params = {"w": jnp.zeros(shape)}
    updates, _ = stepped(ours, grads)
    step, state = jax.jit(theirs.update), theirs.init(params)
    for ours, g in zip(updates, grads, strict=True):
        expected, state = step(g, state, params)
        np.testing.assert_allclose(ours["w"], -expected["w"], rtol=0, atol=1e-6)


def test_every_leaf_is_due_at_another_step_when_staggered():
    names = ("wide", "square", "cut")
    setting = Setting(fj.TopDCT(), names, stagger=True)
    tx, grads = setting.make(), folds.gradients(9, names)
    step, state, changes = jax.jit(tx.update), tx.init(grads[0]), []
    for g in grads:
        _, new = step(g, state)
        changes.append({k for k in names if np.any(new.basis[k] != state.basis[k])})
        state = new
    # All at first; in an interval of 4, cut is three steps ahead of wide, square two.
    due = [{"cut"}, {"square"}, set(), {"wide"}]
    assert changes == [set(names), *due, *due]


@pytest.mark.full
@pytest.mark.parametrize("stagger", [False, True])
def test_a_traced_interval_is_that_interval(stagger):
    names = ("wide", "cut")
    setting = Setting(
        COUNTSKETCH, names, transport=fj.Squared(), every=2, stagger=stagger
    )
    inner, sketch = optax.scale_by_adam(), fj.Sketch(4, min_dim_size=8)
    options = {"transport": setting.transport, "stagger": stagger}

    @jax.jit
    def step(gradient, state, every):
        tx = fj.scale_in_subspace(inner, sketch, every, **options)
        return tx.update(gradient, state)

    gradients = folds.gradients(5, names)
    tx = fj.scale_in_subspace(inner, sketch, 2, **options)
    expected, _ = stepped(tx, gradients)
    state = tx.init(gradients[0])
    for gradient, theirs in zip(gradients, expected, strict=True):
        ours, state = step(gradient, state, jnp.int32(2))
        assert_close(ours, theirs)


def test_bfloat16_gradients():
    names = ("wide",)
    setting = Setting(
        COUNTSKETCH, names, transport=fj.Squared(), residual=fj.Fira(**DECAYS)
    )
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), gradients_of(names, 6))
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    updates, state = stepped(setting.make(), half)
    expected = setting.expected("wide", rounded)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    kept = [state.inner.mu, state.inner.nu, state.limiter]
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype("float32")}
    assert_close([folds.fold("wide", u["wide"]) for u in updates], expected, "bfloat16")


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, value):
        assert params is None
        return optax.tree.scale(value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = fj.scale_in_subspace(inner, fj.Sketch(4, min_dim_size=8))
    g = {"w": jnp.ones((16, 24)), "b": jnp.ones(16)}
    step = jax.jit(tx.update)
    twice, _ = step(g, tx.init(g), value=2.0)
    once, _ = step(g, tx.init(g), value=1.0)
    assert_close(twice, optax.tree.scale(2.0, once))
    assert_close(twice["b"], 2 * g["b"])


def test_a_residual_of_roundings_does_not_hold_back_what_follows():
    rng = np.random.default_rng(0)
    inside = rng.normal(size=(16, 2)) @ rng.normal(size=(2, 24))
    grads = [{"w": np.float32(inside)}] * 3
    grads += [{"w": np.float32(rng.normal(size=(16, 24)))}]
    tx = fj.scale_in_subspace(
        optax.scale_by_adam(),
        fj.Sketch(4, fj.TopSVD(method="exact"), min_dim_size=8),
        residual=fj.Fira(b1=0.9, b2=0.999),
    )
    step, state = jax.jit(tx.update), tx.init(grads[0])
    for g in grads[:3]:
        _, state = step(g, state)
        assert float(state.limiter["w"].squeeze()) == 0
    limited, state = step(grads[3], state)
    # The first residual there is: as large as without a limiter.
    assert float(state.limiter["w"].squeeze()) > 1
    basis = np.asarray(state.basis["w"], np.float64)
    outside = grads[3]["w"] - basis @ (basis.T @ grads[3]["w"])
    assert np.linalg.norm(outside) > 1
    assert np.linalg.norm(limited["w"]) > np.linalg.norm(outside) / 10


@pytest.mark.full
@pytest.mark.parametrize(
    "factory", [fj.galore, fj.fira, fj.apollo, fj.dct_adamw, fj.flora_adamw]
)
@pytest.mark.parametrize("x64", [False, True])
def test_injected_numbers_leave_the_state_as_it_is(factory, x64):
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.bfloat16
        make = optax.inject_hyperparams(
            factory, hyperparam_dtype=jnp.float64 if x64 else jnp.float32
        )
        tx = make(
            optax.linear_schedule(0.1, 0.0, 10),
            fj.Sketch(4, min_dim_size=8),
            b1=optax.constant_schedule(0.9),
            b2=0.999,
            scale=optax.constant_schedule(0.5),
        )
        params = {"w": jnp.ones((16, 24), dtype)}
        state = tx.init(params)
        updates, new = jax.eval_shape(tx.update, params, state, params)
        types = [
            jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, new)
        ]
        assert types[0] == types[1]
        assert updates["w"].dtype == dtype
        if not x64:  # 0.999 would be 1 in bfloat16.
            updates, _ = tx.update(params, state, params)
            assert np.isfinite(np.asarray(updates["w"], np.float32)).all()


def test_a_row_that_cancels_in_its_sketch_stays_bounded():
    # Two columns of one bucket: their sum is seen or their difference, not the other.
    tx = fj.flora_adamw(
        1.0,
        fj.Sketch(1, min_dim_size=2, key=3),
        residual=fj.Fira(limiter=None),
        refresh_every=None,
    )
    step, state = jax.jit(tx.update), tx.init({"w": jnp.zeros((2, 2))})
    largest = []
    for sign in (1.0, -1.0, 1.0):
        for scale in (1.0, 1e-3):
            g = jnp.array([[1.0, sign], [scale, scale * sign]])
            updates, state = step({"w": g}, state)
            largest.append(float(jnp.abs(updates["w"]).max()))
    # What cancels follows what does not: the moments are not zero, the sketch is.
    assert max(largest) < 120
