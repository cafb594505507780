"""Every error names the argument, the value and the remedy, before any tracing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj

PARAMS = {"w": jnp.ones((256, 512)), "b": jnp.ones(512)}
SGD = optax.sgd(0.1)
FACTORIES = {
    "compressed_momentum": functools.partial(fj.compressed_momentum, 0.9),
    "compressed_accumulation": functools.partial(fj.compressed_accumulation, SGD, 4),
    "compressed_accumulator": functools.partial(fj.compressed_accumulator, key=0),
    "flora": functools.partial(fj.flora, 1e-3),
    "scale_in_subspace": functools.partial(
        fj.scale_in_subspace, optax.scale_by_adam(), fj.TopSVD()
    ),
    "fira": functools.partial(fj.fira, 1e-3),
    "plan_leaves": functools.partial(fj.plan_leaves, PARAMS),
}


@pytest.fixture(params=FACTORIES)
def factory(request):
    return FACTORIES[request.param]


@pytest.mark.parametrize(
    ("rank", "error", "match"),
    [
        (0, ValueError, "`rank` must be positive, got rank=0; pass the sketch size"),
        (-3, ValueError, "`rank` must be positive, got rank=-3"),
        (8.0, TypeError, r"`rank` must be an int, got rank=8\.0"),
        (True, TypeError, "`rank` must be an int, got rank=True"),
        (None, TypeError, "`rank` must be an int, got rank=None"),
        ("8", TypeError, "`rank` must be an int, got rank='8'"),
        (jnp.int32(8), TypeError, r"static Python number.*static_args\(factory\)"),
    ],
)
def test_rank(factory, rank, error, match):
    with pytest.raises(error, match=match):
        factory(rank=rank)


@pytest.mark.parametrize(
    ("argument", "value", "error", "match"),
    [
        ("side", "top", ValueError, "`side` must be one of 'smaller', .*side='top'"),
        ("min_dim_size", 0, ValueError, "`min_dim_size` must be positive, got"),
        ("min_dim_size", 1.5, TypeError, "`min_dim_size` must be an int"),
        ("max_aspect_ratio", 0.5, ValueError, "`max_aspect_ratio` must be at least 1"),
        ("max_aspect_ratio", float("nan"), ValueError, "`max_aspect_ratio` must be"),
        ("max_aspect_ratio", "16", TypeError, "must be a real number, got '16'"),
        ("mask", "wte", TypeError, "`mask` must be a callable .* got mask='wte'"),
        ("mask", lambda params: params, TypeError, r"`mask` must be .*\(path, shape\)"),
    ],
)
def test_rules(factory, argument, value, error, match):
    with pytest.raises(error, match=match):
        factory(rank=8, **{argument: value})


KEYED = pytest.mark.parametrize(
    "name",
    ["compressed_momentum", "compressed_accumulation", "flora", "scale_in_subspace"],
)


@KEYED
@pytest.mark.parametrize(
    ("key", "error", "match"),
    [
        (1.5, TypeError, "`key` must be a seed or a PRNG key, got key=1.5; pass an"),
        (True, TypeError, "`key` must be a seed or a PRNG key, got key=True"),
        ("0", TypeError, "`key` must be a seed or a PRNG key"),
        (-1, ValueError, r"`key` must lie in \[0, 2\*\*64\), got key=-1"),
        (2**64, ValueError, "`key` must lie in"),
        (np.zeros(2, np.float32), TypeError, "uint32 key data of shape .*float32"),
        (np.zeros(4, np.uint32), TypeError, r"uint32 key data of shape \(2,\).*\(4,\)"),
        (jnp.int32(0), TypeError, "static_args"),
    ],
)
def test_key(name, key, error, match):
    with pytest.raises(error, match=match):
        FACTORIES[name](rank=8, key=key)


def test_key_of_another_implementation_or_shape():
    with pytest.raises(TypeError, match="one threefry2x32 key, got .*'rbg'"):
        fj.flora(1e-3, 8, key=jax.random.key(0, impl="rbg"))
    with pytest.raises(TypeError, match=r"shape \(2,\)"):
        fj.flora(1e-3, 8, key=jax.random.split(jax.random.key(0)))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_all_forms_of_a_key_mean_the_same(seed):
    typed = jax.random.key(np.uint32(seed), impl="threefry2x32")
    forms = [seed, typed, jax.random.key_data(typed)]
    states = [fj.compressed_momentum(0.9, 8, key=key).init(PARAMS) for key in forms]
    for state in states:
        np.testing.assert_array_equal(state.key, states[0].key)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"resample_every": 0}, ValueError, "`resample_every` must be positive, got"),
        ({"resample_every": 2**31}, ValueError, "`resample_every` must be below 2..31"),
        ({"resample_every": 2.5}, TypeError, "`resample_every` must be an int"),
        ({"reading": "nesterov"}, ValueError, "`reading` must be one of 'paper'"),
        (
            {"reading": "residual", "projection": fj.Gaussian()},
            ValueError,
            "orthogonal rows, got .*Gaussian",
        ),
        ({"projection": "gaussian"}, TypeError, "`projection` must be a flora_jax"),
        ({"projection": fj.Gaussian}, TypeError, "pass an instance such as"),
        ({"dtype": jnp.int8}, TypeError, "`dtype` must be a floating dtype of 16"),
        ({"dtype": jnp.float8_e4m3fn}, TypeError, "`dtype` must be a floating dtype"),
        ({"dtype": "foo"}, TypeError, "`dtype` must be a dtype, got 'foo'"),
    ],
)
@pytest.mark.parametrize("name", ["compressed_momentum", "flora"])
def test_momentum(name, arguments, error, match):
    with pytest.raises(error, match=match):
        FACTORIES[name](rank=8, **arguments)


@pytest.mark.parametrize(
    ("decay", "error"),
    [(1.0, ValueError), (-0.1, ValueError), ("0.9", TypeError), (True, TypeError)],
)
def test_decay(decay, error):
    with pytest.raises(error, match="`decay` must"):
        fj.compressed_momentum(decay, 8)
    with pytest.raises(error, match="`b1` must"):
        fj.flora(1e-3, 8, b1=decay)
    if error is ValueError:  # A hyperparameter of inject_hyperparams is an array.
        with pytest.raises(error, match="`decay` must"):
            fj.compressed_momentum(jnp.float32(decay), 8)


def test_decay_of_a_wrong_shape():
    with pytest.raises(TypeError, match=r"`decay` must be a real number.*\(2,\)"):
        fj.compressed_momentum(jnp.ones(2), 8)


@pytest.mark.parametrize(
    ("every_k", "error", "match"),
    [
        (0, ValueError, "`every_k` must be positive, got every_k=0"),
        (-1, ValueError, "`every_k` must be positive"),
        (4.0, TypeError, "`every_k` must be an int"),
        (True, TypeError, "`every_k` must be an int"),
    ],
)
def test_every_k(every_k, error, match):
    with pytest.raises(error, match=match):
        fj.compressed_accumulation(SGD, every_k, 8)


@pytest.mark.parametrize("axis_name", [3, ("data", 0)])
def test_axis_name(axis_name):
    match = "`axis_name` must be the name of a mesh axis"
    with pytest.raises(TypeError, match=match):
        fj.compressed_accumulation(SGD, 4, 8, axis_name=axis_name)
    with pytest.raises(TypeError, match=match):
        fj.compressed_accumulator(8, key=0, axis_name=axis_name)


def test_every_k_of_one_warns():
    with pytest.warns(UserWarning, match="every_k=1 saves nothing"):
        fj.compressed_accumulation(SGD, 1, 8)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"decay_rate": -1.0}, "`decay_rate` must be at least 0"),
        ({"epsilon": -1e-30}, "`epsilon` must be at least 0"),
        ({"min_dim_size_to_factor": 0}, "`min_dim_size_to_factor` must be positive"),
    ],
)
def test_factored_rms(arguments, match):
    with pytest.raises(ValueError, match=match):
        fj.scale_by_factored_rms(**arguments)
    with pytest.raises(ValueError, match=match):
        fj.flora(1e-3, 8, **arguments)


def test_accumulator_has_no_default_key():
    with pytest.raises(TypeError, match="key"):
        fj.compressed_accumulator(8)


def test_projection_scale():
    with pytest.raises(ValueError, match="`scale` must be one of 'unbiased'"):
        fj.CountSketch(scale="orthogonal")
    with pytest.raises(ValueError, match="rows are not orthogonal; use Orthogonal"):
        fj.Gaussian(scale="isometric")


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
@pytest.mark.parametrize(
    "make", [lambda: fj.flora(1e-3, 8), lambda: fj.compressed_accumulation(SGD, 4, 8)]
)
def test_leaf_dtypes_are_refused_by_name(make, dtype):
    params = {"w": PARAMS["w"], "odd": jnp.ones((256, 256), dtype)}
    with pytest.raises(TypeError, match=f"leaf 'odd' must .*{jnp.dtype(dtype)}"):
        make().init(params)


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ({"mask": {"w": True}}, "`mask` has no entry for leaf 'b'"),
        ({"rank": {"b": 8}}, "`rank` has no entry for leaf 'w'"),
        ({"rank": lambda path, shape: 0}, "positive.*for leaf 'w'"),
        (
            {"weight_dimension_numbers": optax.contrib.MuonDimensionNumbers(0, 0)},
            "of leaf 'w' must name disjoint",
        ),
        (
            {"weight_dimension_numbers": optax.contrib.MuonDimensionNumbers((0, 0), 1)},
            "of leaf 'w' must name disjoint",
        ),
        (
            {"weight_dimension_numbers": optax.contrib.MuonDimensionNumbers(0, 5)},
            "of leaf 'w' name axes",
        ),
    ],
)
def test_rules_that_do_not_fit_a_leaf(rules, match):
    rules = {"rank": 8, **rules}
    with pytest.raises(ValueError, match=match):
        fj.compressed_momentum(0.9, **rules).init(PARAMS)


def test_rank_at_least_the_side_stays_dense_and_says_so():
    tx = fj.compressed_momentum(0.9, 256)
    assert tx.init(PARAMS).momentum["w"].shape == (256, 512)
    plan = fj.plan_leaves(PARAMS, 256)["w"]
    assert "rank=256 is not below the sketched side of its 256x512" in plan.dense_reason


TRANSFORMATIONS = {
    "compressed_momentum": lambda: fj.compressed_momentum(0.9, 8),
    "compressed_accumulation": lambda: fj.compressed_accumulation(SGD, 4, 8),
    "scale_by_factored_rms": fj.scale_by_factored_rms,
    "flora": lambda: fj.flora(1e-3, 8),
    "scale_in_subspace": lambda: fj.apollo(1e-3, 8),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda g: {**g, "new": jnp.ones(3)}, "has leaf 'new' of shape .* has none"),
        (lambda g: {"w": g["w"]}, "has leaf 'b' of shape .* `updates` has none"),
        (lambda g: {**g, "b": jnp.ones(511)}, "leaf 'b' of `updates` has shape"),
        (lambda g: {**g, "w": jnp.ones((256, 640))}, "leaf 'w' of `updates` has shape"),
    ],
)
def test_gradients_that_do_not_match_the_state(name, change, match):
    tx = TRANSFORMATIONS[name]()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=match):
        jax.jit(tx.update)(change(PARAMS), state, PARAMS)


def test_missing_params():
    for arguments in ({}, {"weight_decay": 0.1, "multiply_by_parameter_scale": False}):
        tx = fj.flora(1e-3, 8, **arguments)
        with pytest.raises(ValueError, match=r"`params` must be given .* params=None"):
            tx.update(PARAMS, tx.init(PARAMS))


def test_params_are_not_asked_for_where_they_are_not_needed():
    tx = fj.flora(1e-3, 8, multiply_by_parameter_scale=False)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    assert updates["w"].shape == (256, 512)


@KEYED
def test_state_whose_key_was_cast(name):
    tx = TRANSFORMATIONS[name]()
    state = optax.tree.cast(tx.init(PARAMS), jnp.bfloat16)
    with pytest.raises(TypeError, match=r"`state.key` of .*bfloat16.*optax.tree.cast"):
        tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize(
    "factory",
    [
        functools.partial(fj.flora, learning_rate=1e-3, rank=8),
        functools.partial(fj.compressed_momentum, decay=0.9, rank=8),
        functools.partial(fj.compressed_accumulation, inner=SGD, every_k=4, rank=8),
        functools.partial(fj.apollo, learning_rate=1e-3, rank=8),
    ],
)
def test_inject_hyperparams_without_static_args_names_the_remedy(factory):
    make = optax.inject_hyperparams(factory.func)
    with pytest.raises(TypeError, match=r"static_args\(factory\)"):
        make(**factory.keywords).init(PARAMS)
    static = fj.static_args(factory.func)
    assert {"rank", "key", "min_dim_size"} <= set(static)
    optax.inject_hyperparams(factory.func, static)(**factory.keywords).init(PARAMS)


def test_nan_gradient_under_apply_if_finite_leaves_the_state_unchanged():
    for name in TRANSFORMATIONS:
        tx = optax.apply_if_finite(TRANSFORMATIONS[name](), 10)
        step, state = jax.jit(tx.update), tx.init(PARAMS)
        _, state = step(PARAMS, state, PARAMS)
        bad = {**PARAMS, "w": PARAMS["w"].at[3, 4].set(jnp.nan)}
        updates, after = step(bad, state, PARAMS)
        assert int(after.total_notfinite) == 1
        jax.tree.map(
            np.testing.assert_array_equal, after.inner_state, state.inner_state
        )
        assert all(not u.any() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            {"clipping_threshold": 0},
            ValueError,
            "`clipping_threshold` must be at least",
        ),
        ({"clipping_threshold": "1"}, TypeError, "`clipping_threshold` must be a real"),
        ({"weight_decay": -0.1}, ValueError, "`weight_decay` must be at least 0"),
        ({"b1": None, "key": "x"}, TypeError, "`key` must be a seed"),
    ],
)
def test_flora(arguments, error, match):
    with pytest.raises(error, match=match):
        fj.flora(1e-3, 8, **arguments)


def test_inner_that_is_no_transformation():
    with pytest.raises(TypeError, match="`inner` must be an optax .* call the factory"):
        fj.compressed_accumulation(optax.adam, 4, 8)


def test_step_that_is_no_integer():
    with pytest.raises(TypeError, match="`step` must be an integer, got step=2.7"):
        fj.compressed_accumulator(8, key=0, step=2.7)


def test_accumulator_given_gradients_of_another_tree():
    accumulator = fj.compressed_accumulator(8, key=0)
    carry = accumulator.init(PARAMS)
    with pytest.raises(ValueError, match="has leaf 'b' of shape .* has none"):
        accumulator.update(carry, {"w": PARAMS["w"]}, 0)


def test_skip_function_that_returns_no_bool():
    tx = fj.compressed_accumulation(
        SGD, 4, 8, should_skip_update_fn=lambda u, step, p: (jnp.zeros(2), ())
    )
    with pytest.raises(ValueError, match=r"`should_skip_update_fn` must return a bool"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_has_updated_of_a_state_without_accumulation():
    with pytest.raises(ValueError, match="must hold one CompressedAccumulationState"):
        fj.has_updated(fj.flora(1e-3, 8).init(PARAMS))


def test_unstable_resampling_warns_with_the_number_and_the_leaf():
    # rho = 0.99**(2*100) * 256/8 = 4.29; ln(32/0.5) / (2 ln(1/0.99)) = 206.9.
    tx = fj.compressed_momentum(0.99, 8, resample_every=100)
    with pytest.warns(UserWarning, match="leaf 'w' .* is 4.29.*diverges.* >= 207"):
        tx.init(PARAMS)
    with pytest.warns(UserWarning, match="has 2.0 times the noise"):
        fj.compressed_momentum(0.99, 8, resample_every=206).init(PARAMS)
    fj.compressed_momentum(0.99, 8, resample_every=207).init(PARAMS)
    fj.compressed_momentum(0.99, 8, resample_every=None).init(PARAMS)


def test_isometric_transfers_shrink_and_do_not_warn():
    projection = fj.CountSketch(scale="isometric")
    tx = fj.compressed_momentum(0.9, 8, resample_every=2, projection=projection)
    tx.init(PARAMS)


@pytest.mark.parametrize("make", [fj.flora, fj.flora_adamw, fj.galore, fj.apollo])
@pytest.mark.parametrize("rate", [None, "1e-3", np.nan])
def test_learning_rate(make, rate):
    match = "`learning_rate` must be .* got .*; pass one, or a schedule"
    with pytest.raises((TypeError, ValueError), match=match):
        make(rate, 8)


@pytest.mark.parametrize("wrong", [PARAMS, None], ids=["gradients", "nothing"])
def test_what_is_no_state(wrong):
    tx = fj.flora(1e-3, 8)
    match = "`state` must be what tx.init returned, got .*call tx.update"
    with pytest.raises(TypeError, match=match):
        tx.update(PARAMS, wrong, PARAMS)
    with pytest.raises(TypeError, match=match):
        fj.diagnostics(tx, wrong, PARAMS, PARAMS)


def test_verify_state_the_other_way_round_and_of_another_optimizer():
    tx = fj.flora(1e-3, 8)
    state = tx.init(PARAMS)
    with pytest.raises(TypeError, match="`tx` must be an optax transformation"):
        fj.verify_state(state, tx)
    with pytest.raises(ValueError, match="`state` must have the structure that `tx`"):
        fj.verify_state(optax.adam(1e-3), state)


def test_a_make_that_makes_no_transformation():
    match = r"`make\(rank\)` must be an optax transformation, got 1; call"
    with pytest.raises(TypeError, match=match):
        fj.rank_for_budget(lambda rank: rank, PARAMS, 10**9)


def test_argnums_beyond_the_arguments():
    gradient = fj.sketched_value_and_grad(lambda w: jnp.sum(w), 8, key=0, argnums=1)
    match = "`argnums` must name positional arguments, got argnums=1 for 1 of them"
    with pytest.raises(ValueError, match=match):
        gradient(PARAMS["w"])
