"""Moments in another basis: the rules alone, and with any inner transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from flora_jax.subspace.transports import BasisChange
from tests.common import assert_close
from tests.reference import folds
from tests.reference.transport import RULES, transported
from tests.subspace.bases import regenerated, stepped
from tests.subspace.settings import RULES as NAMES

COUNTSKETCH = fj.CountSketch(normalization="isometric")
B1, B2, T = 0.8, 0.9, 3
SHAPES = {"wide": (16, 24), "tall": (32, 16), "stack": (3, 16, 24), "cut": (16, 4, 8)}
PLANS = fj.plan_leaves(
    {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()},
    fj.Sketch(5, min_dim_size=8),
)
MOVING = {
    "reset": fj.Reset(B1, B2),
    "squared": fj.Squared(),
    "rms": fj.PreserveRMS(),
    "ldadam": fj.LDAdam(B1, B2),
}


def orthonormal(rng, *batch):
    """Two bases of five rows, of each matrix or of all."""
    return [
        np.linalg.qr(rng.normal(size=(*batch, 16, 5)))[0].swapaxes(-1, -2)
        for _ in range(2)
    ]


def stack_of(plan, x):
    matrices = np.asarray(plan.fold(jnp.asarray(x)), np.float64)
    return matrices.reshape(-1, *matrices.shape[-2:])


def test_every_rule_has_an_oracle():
    assert set(RULES) == set(NAMES.values()) == {"keep", *MOVING}


@pytest.mark.sample(4)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("rule", MOVING)
def test_moments_equal_the_oracle(rule, own):
    rng = np.random.default_rng(0)
    for name, plan in PLANS.items():
        batch = (3,) if own and name == "stack" else ()
        old, new = orthonormal(rng, *batch)
        m, r = (np.float32(rng.normal(size=plan.state_shape)) for _ in range(2))
        v = np.float32(rng.random(size=plan.state_shape))
        matrix = jnp.float32(old @ new.swapaxes(-1, -2))
        change = BasisChange(plan, matrix, jnp.asarray(r), jnp.int32(T))
        moments = {"mu": m, "nu": v, "trace": m}
        got = list(MOVING[rule].move(change, moments).values())
        assert {x.shape for x in got} == {plan.state_shape}
        bases = np.broadcast_to(
            new @ old.swapaxes(-1, -2), (len(stack_of(plan, m)), 5, 5)
        )
        pairs = [
            transported(rule, c, *args, B1, B2, T, 16, sketch, plan.axis == -2)
            for c, *args, sketch in zip(
                bases, *(stack_of(plan, x) for x in (m, v, r)), strict=True
            )
        ]
        for ours, theirs in zip(got, zip(*pairs, strict=True), strict=False):
            assert_close(stack_of(plan, ours), np.stack(theirs), "float32")
        # A sum is a first moment, but that nothing starts it anew.
        expected = np.zeros_like(m) if rule == "reset" else got[0]
        assert_close(got[2], expected)


@pytest.mark.parametrize("rule", MOVING)
def test_before_the_first_update_zeros_stay_zeros(rule):
    plan = PLANS["wide"]
    zero, fresh = jnp.zeros(plan.state_shape), jnp.ones(plan.state_shape)
    change = BasisChange(plan, jnp.eye(5), fresh, jnp.int32(0))
    for x in MOVING[rule].move(change, {"mu": zero, "nu": zero}).values():
        np.testing.assert_array_equal(x, 0.0)


@pytest.mark.parametrize("rule", ["keep", "squared", "ldadam"])
def test_equal_bases_leave_moments_where_they_are(rule):
    plan, rng = PLANS["tall"], np.random.default_rng(1)
    m = np.float32(rng.normal(size=plan.state_shape))
    v = np.float32(m**2 + rng.random(size=m.shape))
    change = BasisChange(plan, jnp.eye(5), None, jnp.int32(4))
    transport = {"keep": fj.Keep(), **MOVING}[rule]
    assert_close(transport.move(change, {"mu": m, "nu": v}), {"mu": m, "nu": v})


def test_a_direction_without_history_starts_at_zero_by_preserve_rms():
    # The last of the new rows is orthogonal to all of the old ones.
    plan, c = PLANS["wide"], jnp.eye(5).at[4, 4].set(0.0)
    v = jnp.ones(plan.state_shape)
    change = BasisChange(plan, c, None, jnp.int32(1))
    moved = fj.PreserveRMS().move(change, {"mu": v, "nu": v})
    np.testing.assert_array_equal(moved["nu"], v.at[4].set(0.0))


@pytest.mark.full
def test_moments_keep_their_dtype():
    tx = fj.scale_in_subspace(
        optax.trace(0.5, accumulator_dtype=jnp.bfloat16),
        fj.Sketch(5, min_dim_size=8),
        1,
        transport=fj.Squared(),
    )
    _, state = stepped(tx, folds.gradients(2, ("wide",)))
    assert state.inner.trace["wide"].dtype == jnp.bfloat16


class Reversed(NamedTuple):
    """Adam's state with its fields in another order."""

    nu: Any
    mu: Any
    count: Any


def reversed_adam(inner):
    """Adam whose state has its fields in another order."""

    def pack(state):
        return Reversed(state.nu, state.mu, state.count)

    def update(updates, state, params=None):
        state = optax.ScaleByAdamState(state.count, state.mu, state.nu)
        updates, state = inner.update(updates, state, params)
        return updates, pack(state)

    return optax.GradientTransformation(lambda p: pack(inner.init(p)), update)


def ldadam(inner):
    sketch = fj.Sketch(5, min_dim_size=8)
    return fj.scale_in_subspace(inner, sketch, 2, transport=fj.LDAdam(B1, B2))


def test_ldadam_pairs_moments_by_the_names_of_their_fields():
    gradients, adam = folds.gradients(5, ("wide",)), optax.scale_by_adam(B1, B2)
    expected, _ = stepped(ldadam(adam), gradients)
    updates, _ = stepped(ldadam(reversed_adam(adam)), gradients)
    assert_close(updates, expected)


@pytest.mark.full
def test_ldadam_pairs_moments_of_one_state_alone():
    # rms has no first moment of its own: that of the trace before it is not its mean.
    gradients = folds.gradients(3, ("wide",))
    chain = optax.chain(optax.ema(0.5, debias=False), optax.scale_by_rms(B2))
    _, state = stepped(ldadam(chain), gradients[:2])
    _, new = stepped(ldadam(chain), gradients)
    s = [regenerated(COUNTSKETCH, 0, "wide", 5, 16)(t) for t in (0, 1)]
    c, two = s[1] @ s[0].T, 1 - B2**2
    moved = two * np.abs(c**2 @ (np.float64(state.inner[1].nu["wide"]) / two))
    ema = c @ np.float64(state.inner[0].ema["wide"])
    ema = 0.5 * ema + 0.5 * s[1] @ gradients[2]["wide"]
    expected = B2 * moved + (1 - B2) * ema**2
    assert_close(new.inner[1].nu["wide"], expected, "float32")


def trace(m, r):
    m = r + 0.5 * m
    return m, m


def ema(m, r):
    m = 0.5 * m + 0.5 * r
    return m, m


def rms(v, r):
    v = 0.9 * v + 0.1 * r**2
    return v, r / np.sqrt(v + 1e-3)


def lion(m, r):
    return 0.5 * m + 0.5 * r, np.sign(0.8 * m + 0.2 * r)


INNER = {
    # Name: optax's, the same by hand, and what transports "squared" and "reset" do.
    "trace": (optax.trace(0.5), trace, lambda c, m: c @ m, lambda r: 0 * r),
    "ema": (optax.ema(0.5, debias=False), ema, lambda c, m: c @ m, lambda r: r),
    "rms": (
        optax.scale_by_rms(0.9, 1e-3),
        rms,
        lambda c, v: c**2 @ v,
        lambda r: r**2,
    ),
    "lion": (optax.scale_by_lion(0.8, 0.5), lion, lambda c, m: c @ m, lambda r: r),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "transport"),
    [(name, fj.Squared()) for name in INNER]
    + [("trace", fj.Reset()), ("rms", fj.Reset())],
)
def test_moments_of_other_transformations_are_found_by_their_names(name, transport):
    inner, step, move, start = INNER[name]
    tx = fj.scale_in_subspace(
        optax.chain(optax.scale(2.0), inner),
        fj.Sketch(5, min_dim_size=8, key=11),
        3,
        transport=transport,
    )
    gradients = folds.gradients(7, ("wide",))
    updates, _ = stepped(tx, gradients)
    basis = regenerated(COUNTSKETCH, 11, "wide", 5, 16)
    moment, s = np.zeros((5, 24)), basis(0)
    for t, (g, update) in enumerate(zip(gradients, updates, strict=True)):
        sketch = s @ g["wide"]
        if t and t % 3 == 0:
            s, c = basis(t // 3), basis(t // 3) @ s.T
            sketch = s @ g["wide"]
            # The sketch itself: what inner makes of it before is its own affair.
            moved = isinstance(transport, fj.Squared)
            moment = move(c, moment) if moved else start(sketch)
        moment, direction = step(moment, 2 * sketch)
        assert_close(update["wide"], s.T @ direction, "float32")


def test_keep_asks_for_no_moments():
    tx = fj.scale_in_subspace(optax.scale(3.0), fj.Sketch(5, min_dim_size=8), 3)
    (g,) = folds.gradients(1, ("wide",))
    update, state = jax.jit(tx.update)(g, tx.init(g))
    s = regenerated(COUNTSKETCH, 0, "wide", 5, 16)(0)
    assert_close(update["wide"], 3 * s.T @ s @ g["wide"], "float32")
    assert jax.tree.leaves(state.inner) == []


@pytest.mark.parametrize(
    ("inner", "match"),
    [
        (optax.scale(2.0), "needs an `inner` with moments in fields named mu, ema"),
        (optax.scale_by_rss(), "needs an `inner` with moments .*ScaleByRssState"),
        (
            fj.quantize_state(optax.scale_by_adam(), min_size=1),
            r"got an `inner` whose 'mu' is not: use Keep\(\), and quantize outside",
        ),
        (
            fj.compressed_momentum(
                0.5, fj.Sketch(2, min_dim_size=4), resample_every=None
            ),
            "got an `inner` whose 'momentum' is not",
        ),
    ],
)
def test_moments_that_are_not_kept_like_sketches(inner, match):
    sketch = fj.Sketch(5, min_dim_size=8)
    tx = fj.scale_in_subspace(inner, sketch, transport=fj.Squared())
    with pytest.raises(ValueError, match=match):
        tx.init({"wide": jnp.zeros((16, 24))})
