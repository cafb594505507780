"""Diagnostics against NumPy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flora_jax as fj
from flora_jax.random.keys import leaf_keys

RANK, SEED, DECAY, EVERY = 4, 3, 0.5, 3
SKETCH = fj.Sketch(RANK, key=SEED, min_dim_size=8)
PLAIN = fj.Sketch(RANK, min_dim_size=8)
SHAPES = {"tall": (24, 16), "wide": (16, 24), "stack": (2, 16, 24), "bias": (24,)}
STEPS = 5  # Past a transfer, a cycle's end and a refresh.


def gradients(step):
    rng = np.random.default_rng(step)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def matrix(projection, name, path, epoch):
    """S of one leaf, whose sketched side has size 16."""
    root = jnp.array([0, SEED], jnp.uint32)
    (key,) = leaf_keys(root, name, [path], epoch)
    return np.asarray(projection.matrix(key, RANK, 16), np.float64)


def sketch(path, s, x):
    """S acts on the rows, but of a tall matrix on its columns."""
    x = np.asarray(x, np.float64)
    return x @ s.T if path == "tall" else s @ x


def estimate(path, s, c):
    return c @ s if path == "tall" else s.T @ c


def effective_rank(c):
    squares = np.linalg.svd(c, compute_uv=False) ** 2
    return np.mean(squares.sum(-1) ** 2 / (squares**2).sum(-1))


def numbers(path, s, g, memory):
    """Relative error, cosine and effective rank."""
    back = estimate(path, s, sketch(path, s, g))
    norm = np.linalg.norm(g)
    cosine = np.sum(back * g) / (norm * np.linalg.norm(back))
    return np.linalg.norm(back - g) / norm, cosine, effective_rank(memory)


def run(tx):
    """Diagnostics at every step of a run of its own."""

    @jax.jit
    def step(grads, state, params):
        found = fj.diagnostics(tx, state, grads, params)
        return found, tx.update(grads, state, params)[1]

    params = jax.tree.map(jnp.ones_like, gradients(0))
    state, rows = tx.init(params), []
    for i in range(STEPS):
        found, state = step(gradients(i), state, params)
        rows.append(found)
    return rows


@pytest.mark.full
@pytest.mark.parametrize(
    "projection", [fj.CountSketch("unbiased"), fj.Gaussian()], ids=str
)
def test_accumulation(projection):
    outer = dataclasses.replace(SKETCH, projection=projection)
    tx = fj.compressed_accumulation(fj.flora(0.1, PLAIN), EVERY, outer)
    total = dict.fromkeys(SHAPES, 0.0)
    for i, row in enumerate(run(tx)):
        assert set(row) == {"compressed_accumulation"}  # The inner one is out of sight.
        (leaves,) = row.values()
        assert set(leaves) == {"tall", "wide", "stack"}
        for path, found in leaves.items():
            s = matrix(projection, "compressed_accumulation", path, i // EVERY)
            g = gradients(i)[path].astype(np.float64)
            old = total[path] if i % EVERY else 0.0
            total[path] = old + (sketch(path, s, g) - old) / (i % EVERY + 1)
            expected = numbers(path, s, g, total[path])
            np.testing.assert_allclose(found[:3], expected, rtol=2e-5)
            assert np.isnan(found.momentum_ratio)


@pytest.mark.full
@pytest.mark.parametrize("normalization", ["unbiased", "isometric"])
@pytest.mark.filterwarnings("ignore:compressed_momentum with resample_every")
def test_momentum_after_another_transformation(normalization):
    """It is given the scaled gradient, and measured by that."""
    projection = fj.CountSketch(normalization)
    tx = optax.chain(
        optax.scale(2.0),
        fj.compressed_momentum(
            DECAY,
            dataclasses.replace(SKETCH, projection=projection),
            resample_every=EVERY,
        ),
    )
    q, back = 16 / RANK, DECAY**EVERY
    bound = max(1, q**0.5 * (1 - back) / (1 - back * q**0.5))
    bound, spread = (bound, 1) if normalization == "unbiased" else (1, q**0.5)
    momentum = dict.fromkeys(SHAPES, 0.0)
    for i, row in enumerate(run(tx)):
        for path, found in row["compressed_momentum"].items():
            epoch = i // EVERY
            s = matrix(projection, "compressed_momentum", path, epoch)
            if i and i % EVERY == 0:
                old = matrix(projection, "compressed_momentum", path, epoch - 1)
                momentum[path] = sketch(path, s, estimate(path, old, momentum[path]))
            g = 2 * gradients(i)[path].astype(np.float64)
            new = DECAY * momentum[path] + (1 - DECAY) * sketch(path, s, g)
            momentum[path] = new
            ratio = spread * np.linalg.norm(new) / (bound * np.linalg.norm(g))
            expected = (*numbers(path, s, g, new), ratio)
            np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.full
def test_a_bound_that_is_reached_and_one_that_is_none():
    """One gradient for ever: the ratio stays below 1; past the limit it is 0."""

    def ratios(every, steps):
        sketch = dataclasses.replace(SKETCH, rank=8)
        tx = fj.compressed_momentum(
            0.9, sketch, resample_every=every, estimator="paper"
        )
        grads = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(256, 64)))}
        state, found = tx.init(grads), []
        step = jax.jit(
            lambda state: (
                fj.diagnostics(tx, state, grads),
                tx.update(grads, state)[1],
            )
        )
        for _ in range(steps):
            row, state = step(state)
            found.append(float(row["compressed_momentum"]["w"].momentum_ratio))
        return found

    kept = ratios(None, 60)
    assert 0.9 < kept[-1] < 1.1  # ‖C‖ is a random number around ‖G‖.
    assert max(ratios(20, 60)) < 1.1
    with pytest.warns(UserWarning, match="diverges"):
        assert ratios(5, 2) == [0, 0]


@pytest.mark.full
def test_a_regenerated_subspace_past_refreshes():
    """Pythagoras: an isometric estimate is the gradient's part in the subspace."""
    tx = fj.flora_adamw(0.1, SKETCH, refresh_every=2)
    projection = fj.CountSketch("isometric")
    for i, row in enumerate(run(tx)):
        for path, found in row["scale_in_subspace"].items():
            s = matrix(projection, "scale_in_subspace", path, i // 2)
            g = gradients(i)[path].astype(np.float64)
            expected = numbers(path, s, g, sketch(path, s, g))
            np.testing.assert_allclose(found[:3], expected, rtol=2e-5)
            np.testing.assert_allclose(
                found.relative_error, np.sqrt(1 - expected[1] ** 2), rtol=1e-4
            )


def test_best_direction_of_a_svd():
    tx = fj.galore(0.1, PLAIN, refresh_every=1)
    for i, row in enumerate(run(tx)):
        s = np.linalg.svd(gradients(i)["wide"], compute_uv=False)
        share = np.sqrt(np.sum(s[:RANK] ** 2) / np.sum(s**2))
        found = row["scale_in_subspace"]["wide"]
        np.testing.assert_allclose(found.cosine, share, rtol=1e-4)
        expected = np.sum(s[:RANK] ** 2) ** 2 / np.sum(s[:RANK] ** 4)
        np.testing.assert_allclose(found.effective_rank, expected, rtol=1e-4)


def test_cosines_are_what_theory_says():
    """Over 200 keys, within five standard errors of the root of the mean square."""
    g = {"w": gradients(0)["wide"]}

    def one(key):
        own = fj.Sketch(RANK, fj.Orthogonal(), min_dim_size=8)
        tx = fj.compressed_accumulation(optax.sgd(0.1), 2, own)
        state = tx.init(g)._replace(key=key)
        return fj.diagnostics(tx, state, g)["compressed_accumulation"]["w"].cosine

    keys = jax.random.key_data(jax.random.split(jax.random.key(1), 200))
    found = (
        np.asarray(jax.jit(functools.partial(jax.lax.map, one))(keys), np.float64) ** 2
    )
    error = found.std(ddof=1) / np.sqrt(len(found))
    assert abs(found.mean() - RANK / 16) < 5 * error


@pytest.mark.full
def test_every_so_many_steps():
    tx = fj.flora(0.1, PLAIN)
    params = gradients(9)
    state = tx.init(params)
    traced = []

    @jax.jit
    def sampled(grads, i):
        traced.append(1)
        return fj.diagnostics(tx, state, grads, params, every=3, step=i)

    every = jax.jit(functools.partial(fj.diagnostics, tx))(state, gradients(0), params)
    for i in range(5):
        found = sampled(gradients(0), i)
        assert jax.tree.structure(found) == jax.tree.structure(every)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(every), strict=True):
            if i % 3:
                assert np.isnan(x)
            else:
                np.testing.assert_allclose(x, y, rtol=1e-6)
    assert len(traced) == 1


def test_two_of_a_kind_and_masks():
    tx = optax.chain(
        fj.compressed_momentum(0.5, PLAIN),
        optax.masked(
            fj.compressed_momentum(0.5, fj.Sketch(2, key=1, min_dim_size=8)),
            lambda p: {"wide": True},
        ),
    )
    params = {"wide": gradients(0)["wide"]}
    found = jax.jit(functools.partial(fj.diagnostics, tx))(tx.init(params), params)
    assert {name: list(leaves) for name, leaves in found.items()} == {
        "compressed_momentum": ["wide"],
        "compressed_momentum_2": ["wide"],
    }


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx),
    "masked": lambda tx: optax.masked(tx, matrices),
    "inject": lambda tx: optax.inject_hyperparams(lambda x: tx)(1.0),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["masked", "alone", "chain", "inject"])
def test_the_state_of_an_nnx_optimizer(name):
    """It has a Variable around each counter, key and spec as well."""
    model = nnx.Linear(16, 24, rngs=nnx.Rngs(0))
    tx = WRAPPERS[name](fj.flora(0.1, PLAIN))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 16))) ** 2))(model)
    params = nnx.state(model, nnx.Param)
    measure = jax.jit(functools.partial(fj.diagnostics, tx))
    found = measure(optimizer.opt_state, grads, params)
    plain, plain_grads = nnx.to_pure_dict(params), nnx.to_pure_dict(grads)
    expected = measure(tx.init(plain), plain_grads, plain)
    assert list(found["compressed_momentum"]) == ["kernel"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.full
def test_the_update_is_not_computed_twice():
    """If both are compiled together; the rest is an estimate and its norms."""
    tx = fj.flora(0.1, PLAIN)
    params = gradients(0)
    state = tx.init(params)

    def flops(function):
        compiled = jax.jit(function).lower(params, state, params).compile()
        return compiled.cost_analysis()["flops"]

    def both(grads, state, params):
        found = fj.diagnostics(tx, state, grads, params)
        return found, tx.update(grads, state, params)

    assert flops(both) < 1.8 * flops(tx.update)


@pytest.mark.parametrize(
    ("tx", "arguments", "error", "match"),
    [
        (optax.adam(0.1), {}, ValueError, "`tx` must sketch some leaf of `grads`"),
        (fj.flora, {}, TypeError, "`tx` must be an optax transformation"),
        (fj.flora(0.1, PLAIN), {"every": 0}, ValueError, "`every` must be posit"),
        (fj.flora(0.1, PLAIN), {"every": 2}, ValueError, "`step` is missing"),
        (
            optax.apply_if_finite(fj.flora(0.1, PLAIN), 3),
            {},
            ValueError,
            "`tx` must sketch outside of lax.cond, .* give its inner",
        ),
    ],
)
def test_bad_input(tx, arguments, error, match):
    params = {"wide": gradients(0)["wide"]}
    state = tx.init(params) if hasattr(tx, "init") else None
    with pytest.raises(error, match=match):
        fj.diagnostics(tx, state, params, params, **arguments)


def test_sketches_are_refused():
    tx = fj.compressed_accumulation(optax.sgd(0.1), 2, PLAIN)
    loss = fj.sketched_value_and_grad(lambda w: jnp.sum(jnp.ones((2, 16)) @ w), PLAIN)
    w = jnp.ones((16, 24))
    state = tx.init(w)
    with pytest.raises(TypeError, match="`grads` of diagnostics are Sketched"):
        fj.diagnostics(tx, state, loss(state, w)[1])


def test_the_arguments_in_another_order():
    tx, params = fj.flora(0.1, PLAIN), gradients(0)
    with pytest.raises(TypeError, match="`tx` must be .*in the other order[?]$"):
        fj.diagnostics(tx.init(params), tx, params, params)
