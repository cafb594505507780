"""Every error names the argument, the value and the remedy, before any tracing."""

import functools

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flora_jax as fj

PARAMS = {"w": jnp.ones((256, 512)), "b": jnp.ones(512)}
SGD = optax.sgd(0.1)
FACTORIES = {
    "compressed_momentum": functools.partial(fj.compressed_momentum, 0.9),
    "compressed_accumulation": functools.partial(fj.compressed_accumulation, SGD, 4),
    "compressed_accumulator": fj.compressed_accumulator,
    "flora": functools.partial(fj.flora, 1e-3),
    "scale_in_subspace": functools.partial(fj.scale_in_subspace, optax.scale_by_adam()),
    "fira": functools.partial(fj.fira, 1e-3),
    "flora_muon": functools.partial(fj.flora_muon, 1e-3),
    "plan_leaves": functools.partial(fj.plan_leaves, PARAMS),
    "sketched_value_and_grad": functools.partial(fj.sketched_value_and_grad, jnp.sum),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize(
    ("sketch", "error", "match"),
    [
        (0, ValueError, "`rank` must be positive, got rank=0; pass the sketch size"),
        (None, TypeError, "`rank` must be an int, got rank=None"),
        ("8", TypeError, "`rank` must be an int, got rank='8'"),
        (jnp.int32(8), TypeError, r"`sketch` must be static, .*pass fj\.Sketch\(8\)"),
    ],
)
def test_what_is_no_sketch(name, sketch, error, match):
    with pytest.raises(error, match=match):
        FACTORIES[name](sketch)


@pytest.mark.parametrize(
    ("rank", "error", "match"),
    [
        (-3, ValueError, "`rank` must be positive, got rank=-3"),
        (8.0, ValueError, r"`rank` as a fraction must lie in \(0, 1\], got rank=8\.0"),
        (0.0, ValueError, r"`rank` as a fraction must lie in \(0, 1\], got rank=0\.0"),
        (np.nan, ValueError, "`rank` as a fraction must lie in"),
        (True, TypeError, "`rank` must be an int, got rank=True"),
        (jnp.int32(8), TypeError, "`rank` must be a static Python int, got the array"),
        (lambda shape: 8, TypeError, r"`rank` must be a callable of \(path, shape\)"),
    ],
)
def test_rank(rank, error, match):
    with pytest.raises(error, match=match):
        fj.Sketch(rank)


def test_ranks_of_every_form():
    assert fj.Sketch(np.int64(8)).rank == 8
    by_pattern = fj.Sketch({"w": 1 / 4, "*": 8})
    shapes = {"w": jax.ShapeDtypeStruct((256, 512), "float32")}
    shapes["v"] = {"w": shapes["w"]}
    for sketch, ranks in (
        (fj.Sketch(1 / 4), {"w": 64, "v/w": 64}),
        (fj.Sketch(1.0), {"w": 0, "v/w": 0}),  # Dense.
        (fj.Sketch(1e-6), {"w": 1, "v/w": 1}),
        (by_pattern, {"w": 64, "v/w": 8}),
        (fj.Sketch(lambda path, shape: shape[0] // 2), {"w": 128, "v/w": 128}),
        (fj.Sketch({"w": 3, "v": {"w": 5}}), {"w": 3, "v/w": 5}),
    ):
        assert hash(sketch) is not None
        plans = jax.tree.leaves(fj.plan_leaves(shapes, sketch))
        assert {plan.path: plan.rank for plan in plans} == ranks


@pytest.mark.parametrize(
    ("argument", "value", "error", "match"),
    [
        ("side", "top", ValueError, "`side` must be one of 'smaller', .*side='top'"),
        ("side", {"*": "top"}, ValueError, "`side` must be one of 'smaller', .*'top'"),
        ("same_projection", "qkv", TypeError, "`same_projection` must hold groups"),
        ("same_projection", ["q", "k"], TypeError, "must hold groups of names, got"),
        ("same_projection", [("a/q", "k")], TypeError, "parts of paths, without slash"),
        ("same_projection", [("q", 1)], TypeError, "parts of paths, without slashes"),
        ("same_projection", None, TypeError, "`same_projection` must hold groups"),
        ("same_projection", [3], TypeError, "`same_projection` must hold groups"),
        ("same_projection", [()], ValueError, "must hold no empty group"),
        ("same_projection", [("q", "k"), ("k",)], ValueError, "hold each name once"),
        ("min_dim_size", 0, ValueError, "`min_dim_size` must be positive, got"),
        ("min_dim_size", 1.5, TypeError, "`min_dim_size` must be an int"),
        ("max_aspect_ratio", 0.5, ValueError, "`max_aspect_ratio` must be at least 1"),
        ("max_aspect_ratio", float("nan"), ValueError, "`max_aspect_ratio` must be"),
        ("max_aspect_ratio", "16", TypeError, "must be a real number, got '16'"),
        ("mask", "wte", TypeError, "`mask` must be a callable .* got mask='wte'"),
        ("mask", lambda params: params, TypeError, r"`mask` must be .*\(path, shape\)"),
    ],
)
def test_rules(argument, value, error, match):
    with pytest.raises(error, match=match):
        fj.Sketch(8, **{argument: value})
    if argument not in ("side", "same_projection"):
        with pytest.raises(error, match=match):
            fj.LeafRules(**{argument: value})


KEYED = pytest.mark.parametrize(
    "name",
    ["compressed_momentum", "compressed_accumulation", "flora", "scale_in_subspace"],
)


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
    ],
)
def test_key(key, error, match):
    with pytest.raises(error, match=match):
        fj.Sketch(8, key=key)


def test_what_is_traced_is_refused():
    @jax.jit
    def with_key(key):
        return fj.Sketch(8, key=key)

    @jax.jit
    def with_rank(rank):
        return fj.flora(1e-3, rank)

    for key in (jax.random.key(0), jnp.zeros(2, jnp.uint32), 0):
        with pytest.raises(TypeError, match="`key` must be concrete, got .* int seed"):
            with_key(key)
    with pytest.raises(TypeError, match=r"`sketch` must be static, .*fj\.Sketch\(8\)"):
        with_rank(8)


def test_key_of_another_implementation_or_shape():
    with pytest.raises(TypeError, match="one threefry2x32 key, got .*'rbg'"):
        fj.Sketch(8, key=jax.random.key(0, impl="rbg"))
    with pytest.raises(TypeError, match=r"shape \(2,\)"):
        fj.Sketch(8, key=jax.random.split(jax.random.key(0)))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_all_forms_of_a_key_mean_the_same(seed):
    typed = jax.random.key(np.uint32(seed), impl="threefry2x32")
    forms = [seed, typed, jax.random.key_data(typed), np.int64(seed), np.uint32(seed)]
    txs = [fj.compressed_momentum(0.9, fj.Sketch(8, key=key)) for key in forms]
    states = [tx.init(PARAMS) for tx in txs]
    for state in states:
        np.testing.assert_array_equal(state.key, states[0].key)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"resample_every": 0}, ValueError, "`resample_every` must be positive, got"),
        ({"resample_every": 2**31}, ValueError, "`resample_every` must be below 2..31"),
        ({"resample_every": 2.5}, TypeError, "`resample_every` must be an int"),
        ({"estimator": "best"}, ValueError, "`estimator` must be one of 'paper'"),
        (
            {"estimator": "residual", "sketch": fj.Sketch(8, fj.Gaussian())},
            ValueError,
            "orthogonal rows, got .*Gaussian",
        ),
        ({"sketch": fj.Sketch(8, fj.TopSVD())}, TypeError, "one that a key regenerat"),
        ({"dtype": jnp.int8}, TypeError, "`dtype` must be a floating dtype of 16"),
        ({"dtype": jnp.float8_e4m3fn}, TypeError, "`dtype` must be a floating dtype"),
        ({"dtype": "foo"}, TypeError, "`dtype` must be a dtype, got 'foo'"),
    ],
)
@pytest.mark.parametrize("name", ["compressed_momentum", "flora"])
def test_momentum(name, arguments, error, match):
    with pytest.raises(error, match=match):
        FACTORIES[name](**{"sketch": 8, **arguments})


@pytest.mark.parametrize("projection", ["gaussian", fj.Gaussian, 8])
def test_what_is_no_projection(projection):
    match = "`projection` must be a flora_jax .*pass an instance such as"
    with pytest.raises(TypeError, match=match):
        fj.Sketch(8, projection)


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
        fj.compressed_accumulator(8, axis_name=axis_name)


def test_every_k_of_one_warns():
    with pytest.warns(UserWarning, match="every_k=1 saves nothing"):
        fj.compressed_accumulation(SGD, 1, 8)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"decay_rate": -1.0}, "`decay_rate` must be at least 0"),
        ({"epsilon": -1e-30}, "`epsilon` must be at least 0"),
    ],
)
def test_factored_rms(arguments, match):
    with pytest.raises(ValueError, match=match):
        fj.scale_by_factored_rms(**arguments)
    with pytest.raises(ValueError, match=match):
        fj.flora(1e-3, 8, **arguments)


@pytest.mark.parametrize("rules", [None, 128, {"mask": None}], ids=repr)
def test_what_are_no_rules(rules):
    for make in (fj.scale_by_factored_rms, fj.orthogonalize):
        with pytest.raises(TypeError, match="`rules` must be LeafRules.*pass"):
            make(rules=rules)


def test_normalization():
    with pytest.raises(ValueError, match="`normalization` must be one of 'unbiased'"):
        fj.CountSketch(normalization="orthogonal")
    with pytest.raises(ValueError, match="rows are not orthogonal; use Orthogonal"):
        fj.Gaussian(normalization="isometric")


def test_an_unfiltered_equinox_module():
    model = equinox.nn.MLP(16, 8, 32, 2, key=jax.random.key(0))
    match = r"leaf 'activation' must be an array, .*equinox\.filter"
    transformations = (
        fj.flora(1e-3, 8),
        fj.compressed_accumulation(SGD, 4, 8),
        fj.flora_muon(1e-3, 8),
        fj.quantize_state(optax.adam(1e-3)),
    )
    for tx in transformations:
        with pytest.raises(TypeError, match=match):
            tx.init(model)
    with pytest.raises(TypeError, match=match):
        fj.plan_leaves(model, 8)
    sketch = fj.Sketch(4, min_dim_size=8)
    arrays = equinox.filter(model, equinox.is_inexact_array)
    fj.flora(1e-3, sketch).init(arrays)


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
        fj.compressed_momentum(0.9, fj.Sketch(**rules)).init(PARAMS)


def test_rank_at_least_the_side_stays_dense_and_says_so():
    tx = fj.compressed_momentum(0.9, 256)
    with pytest.warns(
        UserWarning, match="sketches only 0 of 2 leaves .0% of 131,584 .*'w'"
    ):
        state = tx.init(PARAMS)
    assert state.momentum["w"].shape == (256, 512)
    plan = fj.plan_leaves(PARAMS, 256)["w"]
    assert "rank=256 is not below the sketched side of its 256x512" in plan.dense_reason


TRANSFORMATIONS = {
    "compressed_momentum": lambda: fj.compressed_momentum(0.9, 8),
    "compressed_accumulation": lambda: fj.compressed_accumulation(SGD, 4, 8),
    "scale_by_factored_rms": fj.scale_by_factored_rms,
    "flora": lambda: fj.flora(1e-3, 8),
    "scale_in_subspace": lambda: fj.apollo(1e-3, 8),
    "flora_muon": lambda: fj.flora_muon(1e-3, 8),
}


@pytest.mark.parametrize("name", [x for x in TRANSFORMATIONS if x != "flora_muon"])
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


@pytest.mark.parametrize("change", [{"b": jnp.ones(511)}, {"w": jnp.ones((256, 640))}])
def test_gradients_that_do_not_match_the_state_of_flora_muon(change):
    # optax.partition compares the trees, and its parts the leaves.
    tx = fj.flora_muon(1e-3, 8)
    state = tx.init(PARAMS)
    (name,) = change
    with pytest.raises(ValueError, match=f"leaf '{name}' of `updates` has shape"):
        jax.eval_shape(tx.update, {**PARAMS, **change}, state, PARAMS)


def test_missing_params():
    for arguments in ({}, {"weight_decay": 0.1, "multiply_by_parameter_scale": False}):
        tx = fj.flora(1e-3, 8, **arguments)
        with pytest.raises(ValueError, match=r"`params` must be given .* params=None"):
            tx.update(PARAMS, tx.init(PARAMS))


def test_params_are_not_asked_for_where_they_are_not_needed():
    tx = fj.flora(1e-3, 8, multiply_by_parameter_scale=False)
    updates, _ = jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS))
    assert updates["w"].shape == (256, 512)


@KEYED
def test_state_whose_key_was_cast(name):
    tx = TRANSFORMATIONS[name]()
    state = optax.tree.cast(tx.init(PARAMS), jnp.bfloat16)
    with pytest.raises(TypeError, match=r"`state.key` of .*bfloat16.*optax.tree.cast"):
        tx.update(PARAMS, state, PARAMS)


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
        fj.compressed_accumulator(8, step=2.7)


def test_accumulator_given_gradients_of_another_tree():
    accumulator = fj.compressed_accumulator(8)
    carry = accumulator.init(PARAMS)
    with pytest.raises(ValueError, match="has leaf 'b' of shape .* has none"):
        accumulator.update(carry, {"w": PARAMS["w"]}, 0)


def test_skip_function_that_returns_no_bool():
    tx = fj.compressed_accumulation(
        SGD, 4, 8, should_skip_update_fn=lambda u, step, p: (jnp.zeros(2), ())
    )
    with pytest.raises(ValueError, match=r"`should_skip_update_fn` must return a bool"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_has_updated_of_an_nnx_optimizer():
    model = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
    tx = fj.compressed_accumulation(SGD, 2, fj.Sketch(4, min_dim_size=8))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    ended = []
    for _ in range(2):
        optimizer.update(model, nnx.state(model, nnx.Param))
        ended.append(bool(fj.has_updated(optimizer.opt_state)))
    assert ended == [False, True]


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
    sketch = fj.Sketch(8, fj.CountSketch("isometric"))
    fj.compressed_momentum(0.9, sketch, resample_every=2).init(PARAMS)


@pytest.mark.parametrize("make", [fj.flora, fj.flora_adamw, fj.flora_muon, fj.apollo])
@pytest.mark.parametrize("rate", [None, "1e-3", np.nan])
def test_learning_rate(make, rate):
    match = "`learning_rate` must be .* got .*; pass a float or a schedule"
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
    gradient = fj.sketched_value_and_grad(lambda w: jnp.sum(w), 8, argnums=1)
    match = (
        "`argnums` must name positional arguments after the state, got argnums=1 for 1"
    )
    with pytest.raises(ValueError, match=match):
        gradient(fj.Sketch(8).cycle(0), PARAMS["w"])
