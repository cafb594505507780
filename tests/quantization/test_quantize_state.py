"""Moments in codes: tracks float32, exact bytes, what it wraps, what it refuses."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from flora_jax.quantization import codes
from flora_jax.quantization.codes import decode
from flora_jax.quantization.quantize_state import quantize_state
from tests.common import assert_close
from tests.conformance.cases import assert_identical

DTYPES = ("int8", "float8_e4m3fn", "bfloat16")
SHAPES = {"w": (64, 128), "stack": (3, 16, 100), "small": (16, 16), "bias": (5000,)}
quantize = functools.partial(quantize_state, min_size=1024)


def params(dtype=jnp.float32):
    return {name: jnp.ones(shape, dtype) for name, shape in SHAPES.items()}


def gradients(step, dtype=jnp.float32):
    rng = np.random.default_rng(step)
    return {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in SHAPES.items()}


def run(tx, steps, dtype=jnp.float32):
    step, state = jax.jit(tx.update), tx.init(params(dtype))
    states = [state]
    for i in range(steps):
        updates, state = step(gradients(i, dtype), state, params(dtype))
        states.append(state)
    return updates, states


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@functools.cache
def adam(dtype="int8"):
    tx = quantize(optax.adam(0.1), dtype)
    return tx, *run(tx, 3)


def test_shapes_dtypes_and_bytes_of_the_state():
    tx = quantize_state(optax.adam(1e-3), min_size=1024)
    shape = {"w": jax.ShapeDtypeStruct((64, 512), jnp.float32)}
    state = jax.eval_shape(tx.init, shape)
    moments = state.inner[0]
    assert (moments.mu["w"].dtype, moments.nu["w"].dtype) == (jnp.int8, jnp.uint8)
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
    numbers = 64 * 512
    # Two moments with scales; two counters and the spec.
    assert sum(sizes) == 2 * (numbers + 4 * 64) + 4 + 4 + 4 * 64
    assert types(tx.init(shape)) == types(state)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_and_one_dimensional_leaves_are_exact(dtype):
    _, updates, states = adam(dtype)
    expected, theirs = run(optax.adam(0.1), 3)
    for name in ("small", "bias"):
        assert_close(updates[name], expected[name])
        for field in ("mu", "nu"):
            kept = getattr(states[-1].inner[0], field)[name]
            assert_close(kept, getattr(theirs[-1][0], field)[name])
        for tree in states[-1].scales:
            assert tree[name].shape == (1,) * len(SHAPES[name])
    assert states[-1].inner[0].mu["stack"].dtype == jnp.dtype(dtype)


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_step_is_that_of_the_inner_transformation(dtype):
    """Encoding comes last: the first update is exact, the next reads the codes."""
    tx, _, states = adam(dtype)
    plain = optax.adam(0.1)
    expected, _ = plain.update(gradients(0), plain.init(params()))
    updates, _ = tx.update(gradients(0), states[0])
    assert_close(updates, expected)
    state, moments = states[1], []
    for field, scales in zip(("mu", "nu"), state.scales, strict=True):
        tree = dict(getattr(state.inner[0], field))
        for name in ("w", "stack"):
            tree[name] = decode(tree[name], scales[name], dtype, field == "mu")
        moments.append(tree)
    inner = state.inner[0]._replace(mu=moments[0], nu=moments[1])
    expected, new = plain.update(gradients(1), (inner, *state.inner[1:]))
    updates, ours = tx.update(gradients(1), state)
    assert_close(updates, expected)
    back = decode(ours.inner[0].mu["w"], ours.scales[0]["w"], dtype, True)
    worst = {"int8": 1.6 / 127, "float8_e4m3fn": 1 / 16, "bfloat16": 1 / 256}[dtype]
    error = np.abs(np.asarray(back) - np.asarray(new[0].mu["w"])).max()
    assert 0 < error <= worst * np.abs(np.asarray(new[0].mu["w"])).max()


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_shapes_never_change(dtype):
    _, _, states = adam(dtype)
    assert len({str(types(state)) for state in states}) == 1
    assert [int(state.count) for state in states] == [0, 1, 2, 3]


def quadratic(tx, curvature, steps):
    """Parameters after each step on sum(h x^2)/2 from ones."""

    @jax.jit
    def descend(x):
        def body(carry, _):
            x, state = carry
            updates, state = tx.update({"x": curvature * x["x"]}, state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), x["x"]

        return jax.lax.scan(body, (x, tx.init(x)), length=steps)[1]

    return np.asarray(descend({"x": jnp.ones_like(curvature)}))


@functools.cache
def curvature():
    """Condition number 1000, without order: gradients of a row differ as much."""
    rng = np.random.default_rng(0)
    return jnp.asarray(10 ** rng.uniform(-1.5, 1.5, (64, 64)), jnp.float32)


@functools.cache
def exact_descent():
    return quadratic(optax.adam(0.02), curvature(), 200)


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_tracks_float32_on_an_ill_scaled_quadratic(dtype):
    tx = quantize_state(optax.adam(0.02), dtype)
    exact, coded = exact_descent(), quadratic(tx, curvature(), 200)
    # Each entry has gone a way of 0.4 in 20 steps. A gradient 1000 times smaller than
    # the largest of its row has a root of its second moment at the code 8 of 255.
    error = np.abs(coded[19] - exact[19])
    assert error.mean() <= 0.05 * 0.4
    assert error.max() <= 0.5 * 0.4
    loss = [np.sum(curvature() * x**2) / 2 for x in (exact[0], exact[-1], coded[-1])]
    assert loss[1] <= 1e-8 * loss[0]
    assert loss[2] <= 1e-8 * loss[0]


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_an_unchanged_state_does_not_drift(dtype):
    """An accumulator runs its inner transformation once per cycle."""
    sketch = fj.Sketch(4, min_dim_size=8, max_aspect_ratio=32)
    inner = fj.compressed_accumulation(optax.adam(0.1), 8, sketch)
    tx = quantize(inner, dtype, fields=("mu", "nu"))
    _, states = run(tx, 12)
    assert int(states[8].inner.gradient_step) == 1
    assert np.any(np.asarray(states[8].inner.inner_opt_state[0].mu["w"]) != 0)
    for state in states[9:]:
        assert_identical(
            state.inner.inner_opt_state[0], states[8].inner.inner_opt_state[0]
        )
        assert_identical(state.scales, states[8].scales)
    assert states[9].inner.acc_grads["w"].dtype == jnp.float32


KINDS = ("plain", "heavy-tailed", "sparse rows", "column scales", "row scales")


def held_out(kind, steps=200, shape=(256, 512)):
    """Gradients of one kind, (n, m) at each step."""
    rng = np.random.default_rng(1)
    mean = 0.3 * rng.standard_normal(shape)
    decades = {"column scales": (1, shape[1]), "row scales": (shape[0], 1)}
    for _ in range(steps):
        noise = (
            rng.standard_t(3, shape)
            if kind == "heavy-tailed"
            else rng.standard_normal(shape)
        )
        grads = mean + noise
        if kind == "sparse rows":
            grads = grads * (rng.random((shape[0], 1)) < 0.1)
        if kind in decades:
            scales = np.random.default_rng(2).uniform(-3, 0, decades[kind])
            grads = grads * 10**scales
        yield grads


def parameters(tx, grads):
    step, params = jax.jit(tx.update), {"w": jnp.zeros((256, 512))}
    state = tx.init(params)
    for each in grads:
        updates, state = step({"w": jnp.float32(each)}, state)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["w"], np.float64)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_int8_stays_near_float32(kind):
    tx = optax.adam(1e-3)
    exact = parameters(tx, held_out(kind))
    coded = parameters(fj.quantize_state(tx), held_out(kind))
    error = np.linalg.norm(coded - exact) / np.linalg.norm(exact)
    # Scales are per row: columns that differ by three decades lose accuracy.
    assert 0.005 < error < (0.1 if kind == "column scales" else 0.02)


@pytest.mark.full
def test_linear_codes_fail_where_ours_do_not(monkeypatch):
    """Where entries differ by two orders of magnitude within each row and column."""
    spread = 10 ** np.random.default_rng(3).uniform(-2, 0, (256, 512))
    grads = [spread * each for each in held_out("plain", steps=50)]
    exact = parameters(optax.adam(1e-3), grads)

    def error():
        coded = parameters(fj.quantize_state(optax.adam(1e-3)), grads)
        return np.linalg.norm(coded - exact) / np.linalg.norm(exact)

    ours, linear = error(), dict(codes._GRIDS)
    for signed, power in ((True, 1), (False, 2)):  # Linear in the root of a second one.
        grid = linear["int8", signed]
        linear["int8", signed] = grid._replace(curve=1, power=power)
    monkeypatch.setattr(codes, "_GRIDS", linear)
    assert ours < 0.05
    assert error() > 0.2


@pytest.mark.full
def test_second_moments_keep_what_the_nearest_code_loses():
    """A second moment that falls by 0.05% an update beside one that does not."""
    steps, shape = 100, (64, 64)
    # One entry of each row stays, its scale.
    stays = np.arange(64) == 0
    grads = {"w": jnp.broadcast_to(jnp.where(stays, 1.0, 0.5**0.5), shape)}
    tx = quantize(optax.scale_by_rms(decay=0.999, initial_scale=1.0))

    def body(state, _):
        return tx.update(grads, state)[1], None

    run = jax.jit(lambda state: jax.lax.scan(body, state, length=steps)[0])
    state = run(tx.init({"w": jnp.zeros(shape)}))
    back = np.asarray(decode(state.inner.nu["w"], state.scales[0]["w"], "int8", False))
    falling = back[~np.broadcast_to(stays, shape)]
    expected = 0.5 + 0.5 * 0.999**steps
    # Half of the step between two codes; to the nearest it would have stayed 1.
    np.testing.assert_allclose(falling, expected, rtol=0.5 * 4 / 255)


def test_verify_state_refuses_other_settings():
    _, _, states = adam()
    fj.verify_state(adam()[0], states[-1])
    other = quantize_state(optax.adam(0.1), min_size=64)
    with pytest.raises(ValueError, match="min_size 1024 in the state, 64 in tx"):
        fj.verify_state(other, states[-1])


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "`dtype` must be one of", {"dtype": "int4"}),
        (ValueError, "`dtype` must be one of", {"dtype": "float8"}),
        (ValueError, "`min_size` must be positive", {"min_size": 0}),
        (TypeError, "`min_size` must be an int", {"min_size": 2.0}),
        (TypeError, "`fields` must be a collection", {"fields": "mu"}),
        (TypeError, "`fields` must be a collection", {"fields": 1}),
        (ValueError, "`fields` must name some of", {"fields": ()}),
        (ValueError, "`fields` must name some of", {"fields": ("m",)}),
        (TypeError, "`inner` must be an optax", {"inner": optax.adam}),
    ],
)
def test_bad_arguments(error, match, arguments):
    with pytest.raises(error, match=match):
        quantize_state(**{"inner": optax.adam(0.1), **arguments})


def test_a_state_without_moments():
    with pytest.raises(ValueError, match="must have moments to code, got none in"):
        quantize_state(optax.sgd(0.1)).init(params())
    with pytest.raises(ValueError, match="fields named ema; use"):
        quantize_state(optax.adam(0.1), fields=("ema", "mu")).init(params())


def test_complex_moments_stay_as_they_are():
    tree = {"w": jnp.ones((64, 128)), "z": jnp.ones((64, 128), jnp.complex64)}
    tx = quantize_state(optax.trace(0.9))
    state = tx.init(tree)
    assert state.inner.trace["w"].dtype == jnp.int8
    updates, _ = tx.update(tree, state)
    assert updates["z"].dtype == jnp.complex64


def test_states_of_other_settings():
    tx, _, states = adam()
    state = states[0]
    with pytest.raises(ValueError, match="must have scales for each array of"):
        tx.update(params(), state._replace(scales=state.scales[:1]))
    other = quantize(optax.adam(0.1), "float8_e4m3fn")
    with pytest.raises(ValueError, match="codes of dtype float8_e4m3fn and scales"):
        other.update(params(), state)
    mu, nu = state.scales
    blocks = state._replace(scales=({**mu, "w": jnp.ones((64, 2))}, nu))
    with pytest.raises(ValueError, match=r"scales of shape \(64, 1\) at '0/mu/w'"):
        tx.update(params(), blocks)
    other = quantize_state(optax.adam(0.1), min_size=1)
    with pytest.raises(ValueError, match=r"codes of dtype int8 .* at '0/mu/small'"):
        other.update(params(), state)


@pytest.mark.full
def test_dtypes_may_be_given_as_such():
    assert_identical(
        quantize_state(optax.adam(0.1), jnp.float8_e4m3fn).init(params()),
        quantize_state(optax.adam(0.1), "float8_e4m3fn").init(params()),
    )


def test_init_compiles_soon_and_holds_no_moment():
    # XLA would fold the maxima of constant zeros, for more than a minute.
    shape = {"w": jax.ShapeDtypeStruct((32768, 512), jnp.float32)}
    tx = quantize_state(optax.adam(0.1))
    start = time.process_time()
    init = jax.jit(lambda: tx.init(jax.tree.map(jnp.zeros_like, shape))).lower()
    assert init.compile().memory_analysis().temp_size_in_bytes < 4 * 32768 + 1024
    assert time.process_time() - start < 10
