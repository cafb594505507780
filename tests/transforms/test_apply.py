"""One call for an update and its application, against the two calls of optax."""

import dataclasses
import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from flora_jax.leaves.in_place import APPLY, InPlace

SKETCH = fj.Sketch(8, min_dim_size=16)
SHAPES = {"w": (64, 48), "stack": (3, 32, 64), "b": (64,)}


def accumulation(inner=None, every_k=3, **settings):
    inner = fj.adafactor(1e-1) if inner is None else inner
    return fj.compressed_accumulation(inner, every_k, SKETCH, **settings)


def tree(seed):
    rng = np.random.default_rng(seed)
    return {k: jnp.float32(rng.normal(size=shape)) for k, shape in SHAPES.items()}


def both(tx, steps=7, **extra_args):
    """Parameters and states after steps of either interface."""

    @jax.jit
    def one(params, state, grads):
        return fj.update_and_apply(tx, grads, state, params, **extra_args)

    @jax.jit
    def two(params, state, grads):
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    ours = theirs = tree(0), tx.init(tree(0))
    for i in range(steps):
        grads = tree(i + 1)
        ours, theirs = one(*ours, grads), two(*theirs, grads)
        yield ours, theirs


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    "tx",
    [
        accumulation(),
        accumulation(optax.adam(1e-2), lambda cycle: cycle + 1),
        accumulation(should_skip_update_fn=optax.skip_not_finite),
        optax.chain(optax.clip(1.0), accumulation()),
        optax.inject_hyperparams(lambda rate: accumulation(optax.sgd(rate)))(0.1),
        fj.flora(1e-2, SKETCH, weight_decay=0.1),
        fj.flora(optax.linear_schedule(1e-2, 0, 9), SKETCH, estimator="residual"),
        fj.flora_adamw(
            optax.linear_schedule(1e-2, 0, 9),
            SKETCH,
            weight_decay=optax.linear_schedule(0.1, 0, 9),
            weight_decay_mask={"w": True, "stack": False, "b": True},
        ),
        optax.inject_hyperparams(fj.galore)(
            1e-2,
            SKETCH,
            weight_decay=0.1,
            weight_decay_mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
            state_dtype="int8",
        ),
        fj.flora_adamw(1e-2, SKETCH, orthogonal=True),
        fj.flora_muon(1e-2, SKETCH, weight_decay=0.1),
        accumulation(fj.apollo(1e-2, SKETCH)),
        fj.flora_adamw(1e-2, SKETCH, weight_decay=0.0),
        fj.apollo(1e-2, SKETCH, weight_decay=0.1, weight_decay_mask=False),
        # What changes a recipe's updates, or runs it in a branch, gets these.
        optax.chain(
            fj.scale_in_subspace(optax.scale_by_adam(), SKETCH), optax.scale(-1)
        ),
        optax.chain(fj.flora(1e-2, SKETCH), optax.scale(0.5)),
        optax.masked(fj.flora(1e-2, SKETCH), {"w": True, "stack": True, "b": False}),
        optax.MultiSteps(fj.flora(1e-2, SKETCH), 2).gradient_transformation(),
        optax.adamw(1e-3),
    ],
    ids=[
        "leafwise",
        "growing",
        "skip",
        "chain",
        "injected",
        "flora",
        "flora-schedule",
        "flora-adamw",
        "galore-injected",
        "orthogonal",
        "flora-muon",
        "apollo-accumulated",
        "no-decay",
        "no-mask",
        "subspace-chain",
        "flora-chain",
        "flora-masked",
        "flora-multisteps",
        "optax",
    ],
)
def test_equals_the_two_calls(tx):
    start = tree(0)
    for ours, theirs in both(tx):
        chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    assert np.abs(ours[0]["w"] - start["w"]).max() > 1e-3


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, factor, **extra_args):
        return jax.tree.map(lambda x: -factor * x, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    *_, (ours, theirs) = both(accumulation(inner), factor=0.5)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_takes_sketched_gradients():
    tx, params = accumulation(), {"w": tree(0)["w"]}
    x = jnp.float32(np.random.default_rng(1).normal(size=(7, 4, 64)))

    def loss(params, x):
        return jnp.mean((x @ params["w"]) ** 2)

    @jax.jit
    def step(params, state, x):
        gradient = fj.sketched_value_and_grad(loss, SKETCH)
        return fj.update_and_apply(tx, gradient(state, params, x)[1], state, params)

    @jax.jit
    def full(params, state, x):
        return fj.update_and_apply(tx, jax.grad(loss)(params, x), state, params)

    ours = theirs = params, tx.init(params)
    for each in x:
        ours, theirs = step(*ours, each), full(*theirs, each)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert np.abs(ours[0]["w"] - params["w"]).max() > 1e-3


def zeroed(tx):
    """A wrapper that does not look at the updates it replaces."""

    def update(updates, state, params=None, **extra_args):
        _, state = tx.update(updates, state, params, **extra_args)
        return jax.tree.map(jnp.zeros_like, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(tx, optax.scale(0.5)),
        lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1)),
        lambda tx: optax.masked(tx, {"w": True, "stack": True, "b": False}),
        lambda tx: optax.apply_if_finite(tx, 3),
        zeroed,
    ],
    ids=["scale", "decay", "masked", "finite", "zeroed"],
)
def test_what_would_go_on_to_change_updates_raises(wrap):
    tx, params = wrap(accumulation()), tree(0)
    message = "`tx` of update_and_apply goes on after compressed_accumulation"
    with pytest.raises(TypeError, match=message):
        fj.update_and_apply(tx, params, tx.init(params), params)


def test_refuses_a_jitted_update():
    tx, params = accumulation(), tree(0)
    jitted = optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))
    with pytest.raises(TypeError, match="`tx` of update_and_apply must not be jitted"):
        fj.update_and_apply(jitted, params, tx.init(params), params)


def test_is_not_differentiable_in_reverse_mode():
    tx, params = accumulation(), tree(0)

    @jax.jit
    def loss(params, state):
        new, _ = fj.update_and_apply(tx, params, state, params)
        return jnp.sum(new["w"])

    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(loss)(params, tx.init(params))


def test_updates_that_resample_are_differentiable_in_forward_mode():
    params = tree(0)

    def loss(scale, resample_every):
        tx = fj.compressed_momentum(0.0, SKETCH, resample_every=resample_every)
        state = tx.init(params)
        for _ in range(3):
            grads = jax.tree.map(lambda x: scale * x, params)
            updates, state = tx.update(grads, state)
        return optax.tree.sum(updates)

    slope = jax.grad(loss)(1.0, None)
    np.testing.assert_allclose(jax.jacfwd(loss)(1.0, None), slope, rtol=1e-5)
    resampling = functools.partial(loss, resample_every=2)
    slope = jax.jit(jax.jacfwd(resampling))(1.0)
    np.testing.assert_allclose(slope, resampling(2.0) - resampling(1.0), rtol=1e-3)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.jit(jax.grad(resampling))(1.0)


def test_other_errors_are_their_own():
    tx, params = accumulation(), tree(0)
    with pytest.raises(ValueError, match="`updates` has leaf 'b'"):
        fj.update_and_apply(tx, params, tx.init({"w": params["w"]}), params)


RECIPES = [fj.flora, fj.flora_adamw, fj.galore, fj.fira, fj.apollo, fj.dct_adamw]


@pytest.mark.sample(2)
@pytest.mark.parametrize("make", RECIPES)
def test_recipes_apply_their_updates_themselves(make):
    tx, params = make(1e-2, SKETCH, weight_decay=0.1), tree(0)
    state, asked = tx.init(params), InPlace(params)
    updates, _ = tx.update(tree(1), state, params, **{APPLY: asked})
    assert updates is asked
    expected = optax.apply_updates(params, tx.update(tree(1), state, params)[0])
    chex.assert_trees_all_close(asked.params, expected, rtol=1e-5, atol=1e-6)


def test_copies_of_the_parameters_are_not_the_result():
    inner = fj.flora(1e-2, SKETCH)

    def update(updates, state, params, **extra_args):
        wide = optax.tree.cast(params, jnp.float32)
        return inner.update(updates, state, wide, **extra_args)

    tx = optax.GradientTransformationExtraArgs(inner.init, update)
    params = optax.tree.cast(tree(0), jnp.bfloat16)
    new, _ = fj.update_and_apply(tx, tree(1), tx.init(params), params)
    updates, _ = tx.update(tree(1), tx.init(params), params)
    expected = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, params)
    chex.assert_trees_all_close(new, expected, rtol=2**-7)


def test_replaced_updates_of_a_recipe_are_applied():
    tx, params = zeroed(fj.flora(1e-2, SKETCH)), tree(0)
    new, _ = fj.update_and_apply(tx, tree(1), tx.init(params), params)
    chex.assert_trees_all_equal(new, params)


def test_sketches_are_told_once():
    tx, params, told = optax.chain(fj.flora(1e-2, SKETCH), optax.scale(2)), tree(0), []
    fj.update_and_apply(tx, tree(1), tx.init(params), params, on_sketch=told.append)
    assert sorted(event.plan.path for event in told) == ["stack", "w"]


def test_a_jitted_inner_transformation():
    inner = fj.flora_adamw(1e-2, SKETCH)
    jitted = optax.GradientTransformationExtraArgs(inner.init, jax.jit(inner.update))
    *_, (ours, theirs) = both(accumulation(jitted))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_python_floats_are_parameters():
    tx, params, grads = fj.flora_adamw(0.1, SKETCH), {"s": 1.0}, {"s": jnp.ones(())}
    new, _ = fj.update_and_apply(tx, grads, tx.init(params), params)
    np.testing.assert_allclose(new["s"], 0.9, rtol=1e-6)


class CallableTree(dict):
    """A tree whose root is callable, as a module is."""

    def __call__(self):
        raise AssertionError("a mask that is a tree is not called")


jax.tree_util.register_pytree_node(
    CallableTree,
    lambda x: (tuple(x[k] for k in sorted(x)), tuple(sorted(x))),
    lambda keys, leaves: CallableTree(zip(keys, leaves, strict=True)),
)


def test_a_mask_may_have_a_callable_root():
    params, grads = CallableTree(tree(0)), CallableTree(tree(1))
    mask = CallableTree({k: k == "w" for k in params})
    tx = fj.flora(1e-2, SKETCH, weight_decay=0.1, weight_decay_mask=mask)
    new, _ = fj.update_and_apply(tx, grads, tx.init(params), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(dict(new), dict(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [fj.flora, fj.flora_adamw, fj.galore])
@pytest.mark.parametrize("wide", [False, True])
def test_rounds_as_the_two_calls(make, wide):
    tx = make(1e-2, SKETCH, weight_decay=0.1)
    params, grads = (optax.tree.cast(tree(i), jnp.bfloat16) for i in range(2))
    params = tree(0) if wide else params
    state = tx.init(params)
    new, _ = fj.update_and_apply(tx, grads, state, params)
    updates, _ = tx.update(grads, state, params)
    expected = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(new, expected, rtol=2**-20 if wide else 2**-7, atol=0)


@pytest.mark.parametrize("agree", [True, False])
def test_stacked_layers_are_expanded_one_by_one(agree):
    """Also where the second moment folds the axis along which layers are stacked."""
    shape = (32, 3, 64)
    spec = optax.contrib.MuonDimensionNumbers((0,), (2,))
    sketch = dataclasses.replace(SKETCH, weight_dimension_numbers=spec)
    rules = fj.LeafRules(min_dim_size=16, max_aspect_ratio=99)
    if agree:
        rules = dataclasses.replace(rules, weight_dimension_numbers=spec)
    inner = fj.adafactor(1e-1, rules=rules)
    tx = fj.compressed_accumulation(inner, 2, sketch)
    grads = {"w": jax.random.normal(jax.random.key(0), shape)}
    params = {"w": jax.random.normal(jax.random.key(1), shape)}
    ours = theirs = params, tx.init(params)
    for _ in range(4):
        ours = jax.jit(functools.partial(fj.update_and_apply, tx))(grads, *ours[::-1])
        updates, state = jax.jit(tx.update)(grads, theirs[1], theirs[0])
        theirs = optax.apply_updates(theirs[0], updates), state
        chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)
    text = str(
        jax.make_jaxpr(functools.partial(fj.update_and_apply, tx))(
            grads, ours[1], ours[0]
        )
    )
    # Four loops without any over layers: of the cycle's end, and of random bits.
    loops = text.count("while[") + text.count("scan[")
    assert loops == (7 if agree else 6)


def test_keeps_no_tree_of_updates():
    params = {str(i): jnp.zeros((256, 256)) for i in range(8)}
    tx = accumulation(optax.sgd(0.1))
    shapes = jax.eval_shape(lambda: (params, tx.init(params), params))

    def temporaries(step):
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def two(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    one = functools.partial(fj.update_and_apply, tx)
    nbytes = sum(map(operator.attrgetter("nbytes"), params.values()))
    assert temporaries(lambda p, s, g: one(g, s, p)) < 0.5 * nbytes
    assert temporaries(two) >= nbytes


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_parameters_stay_where_they_are_on_a_mesh(kind):
    where = jax.make_mesh(
        (2, 2), ("x", "y"), axis_types=2 * (jax.sharding.AxisType[kind],)
    )
    specs = {"w": jax.P("x", "y"), "stack": jax.P(None, "x", "y"), "b": jax.P("x")}
    layout = {k: jax.NamedSharding(where, spec) for k, spec in specs.items()}
    tx, params = accumulation(), tree(0)
    states = fj.state_sharding(tx, params, layout)

    def step(params, state, grads):
        return fj.update_and_apply(tx, grads, state, params)

    expected = params, tx.init(params)
    with jax.set_mesh(where):
        found = jax.device_put((params, tx.init(params)), (layout, states))
        on_mesh = jax.jit(step, out_shardings=(layout, states))
        for i in range(4):
            found = on_mesh(*found, jax.device_put(tree(i + 1), layout))
    for i in range(4):
        expected = jax.jit(step)(*expected, tree(i + 1))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    for name, leaf in found[0].items():
        assert leaf.sharding.is_equivalent_to(layout[name], leaf.ndim)


@pytest.mark.parametrize("projection", [fj.CountSketch(), fj.Gaussian()])
def test_an_inner_momentum_on_a_mesh(projection):
    """It sketches the mean gradient, which has been expanded from sketches."""
    sketch = fj.Sketch(16, projection)
    tx = fj.compressed_accumulation(fj.flora(1e-2, sketch), 2, sketch)
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.P(None, "a"))
    start, grads = (
        {"w": jax.random.normal(jax.random.key(i), (4, 256, 512))} for i in range(2)
    )
    with jax.set_mesh(mesh):
        ours = theirs = jax.device_put(start, place), tx.init(start)
        for _ in range(4):
            ours = jax.jit(functools.partial(fj.update_and_apply, tx))(
                grads, *ours[::-1]
            )
            updates, state = jax.jit(tx.update)(grads, theirs[1], theirs[0])
            theirs = optax.apply_updates(theirs[0], updates), state
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_varies_over_manual_axes_is_applied():
    where = jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=2 * (jax.sharding.AxisType.Auto,)
    )
    tx, params = fj.flora(1e-2, SKETCH), {"stack": tree(0)["stack"]}
    rng = np.random.default_rng(1)
    grads = {"stack": jnp.float32(rng.normal(size=(4, 3, 32, 64)))}

    def step(grads):
        own = jax.tree.map(lambda x: x[0], grads)
        new, _ = fj.update_and_apply(tx, own, tx.init(params), params)
        return jax.tree.map(lambda x: x[None], new)

    with jax.set_mesh(where):
        each = jax.shard_map(
            step, in_specs=jax.P("x"), out_specs=jax.P("x"), axis_names={"x"}
        )
        found = jax.jit(each)(grads)
    for i in range(4):
        expected = step({"stack": grads["stack"][i : i + 1]})
        ours = found["stack"][i : i + 1]
        chex.assert_trees_all_close(ours, expected["stack"], rtol=1e-5, atol=1e-6)


# Over the other axis the compiler may shard: there a stack is gone through in a loop.
@pytest.mark.parametrize("shape", [(4, 1), (4, 2)])
def test_each_device_accumulates_its_own(shape):
    where = jax.make_mesh(
        shape, ("x", "y"), axis_types=2 * (jax.sharding.AxisType.Auto,)
    )
    tx = accumulation(every_k=2, axis_name="x")
    alone = accumulation(every_k=2)
    params = {"w": tree(0)["w"], "stack": tree(0)["stack"]}
    rng = np.random.default_rng(1)
    grads = {
        k: jnp.float32(rng.normal(size=(2, 4, *x.shape))) for k, x in params.items()
    }

    def part(grads, *index):
        return jax.tree.map(lambda x: x[index], grads)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=where,
        in_specs=(jax.P(), jax.P(None, "x")),
        out_specs=jax.P(),
        axis_names={"x"},
    )
    def cycle(params, grads):
        state = tx.init(params)
        own = jax.lax.pcast(state.acc_grads, "x", to="varying")
        state = state._replace(acc_grads=own)
        for i in range(2):
            params, state = fj.update_and_apply(tx, part(grads, i, 0), state, params)
        return params

    with jax.set_mesh(where):
        found = cycle(params, grads)
    state = alone.init(params)
    for i in range(2):
        mean = jax.tree.map(lambda x, i=i: x[i].mean(0), grads)
        params, state = fj.update_and_apply(alone, mean, state, params)
    chex.assert_trees_all_close(found, params, rtol=1e-5, atol=1e-6)
