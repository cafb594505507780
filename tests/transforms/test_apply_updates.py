"""Updates of bfloat16 parameters, rounded stochastically."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from flora_jax.leaves.in_place import APPLY

SKETCH = fj.Sketch(8, min_dim_size=16)
SHAPES = {"w": (64, 48), "stack": (4, 32, 64), "b": (64,)}
KEY = jax.random.key(7)


def tree(seed, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in SHAPES.items()}


def small_updates(seed=1):
    return jax.tree.map(lambda x: 1e-3 * x, tree(seed, jnp.float32))


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=2 * (kind,))


def test_small_updates_add_up():
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    updates = {"w": jnp.full((64, 64), 1e-4)}

    def step(i, both):
        nearest, stochastic = both
        key = jax.random.fold_in(KEY, i)
        return (
            optax.apply_updates(nearest, updates),
            fj.apply_updates(stochastic, updates, key),
        )

    steps = 100
    run = jax.jit(lambda both: jax.lax.fori_loop(0, steps, step, both))
    nearest, stochastic = run((params, params))
    chex.assert_trees_all_equal(nearest, params)
    # Each step moves by 2⁻⁷ with probability 1e-4·2⁷, or not at all.
    share = 1e-4 * 2**7
    error = 2**-7 * np.sqrt(share * (1 - share) * steps / 64**2)
    mean = stochastic["w"].astype(jnp.float32).mean()
    assert abs(mean - 1 - steps * 1e-4) < 5 * error


def test_sums_are_those_of_float32():
    """An update that is exact in the sum is added exactly, whatever the bits."""
    params, updates = {"w": jnp.bfloat16([1.0, -3.0])}, {"w": jnp.float32([0.5, 2.0])}
    new = fj.apply_updates(params, updates, KEY)
    np.testing.assert_array_equal(new["w"], jnp.bfloat16([1.5, -1.0]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_other_dtypes_are_as_optax_adds_them(dtype):
    params, updates = tree(0, dtype), small_updates()
    new = fj.apply_updates(params, updates, KEY)
    chex.assert_trees_all_equal(new, optax.apply_updates(params, updates))
    chex.assert_trees_all_equal_dtypes(new, params)


def test_scalars_none_and_masked_leaves_are_as_optax_has_them():
    params = {"s": 1.0, "none": None, "masked": optax.MaskedNode(), "w": jnp.ones(2)}
    updates = {"s": 0.5, "none": None, "masked": optax.MaskedNode(), "w": jnp.ones(2)}
    for none in (None, jnp.ones(2)):
        own = updates | {"none": none}
        new = fj.apply_updates(params, own, KEY)
        chex.assert_trees_all_equal(new, optax.apply_updates(params, own))
    assert fj.apply_updates({}, {}, KEY) == {}


def test_keeps_no_random_bits():
    params = {"w": jnp.ones((512, 512), jnp.bfloat16)}
    step = jax.jit(fj.apply_updates, donate_argnums=0)
    compiled = step.lower(params, params, KEY).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1000


def test_leaves_are_independent_and_named_by_path():
    params = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(4096, jnp.bfloat16)}
    updates = jax.tree.map(lambda x: jnp.full(x.shape, 2**-8), params)
    new = fj.apply_updates(params, updates, KEY)
    moved = [np.asarray(new[k] > 1, np.float64) for k in "ab"]
    assert abs(np.corrcoef(*moved)[0, 1]) < 5 / np.sqrt(4096)
    alone = fj.apply_updates({"b": params["b"]}, {"b": updates["b"]}, KEY)
    np.testing.assert_array_equal(alone["b"], new["b"])
    other = fj.apply_updates(params, updates, jax.random.fold_in(KEY, 1))
    assert (other["a"] != new["a"]).mean() > 0.4


def test_forms_of_a_key():
    params, updates = tree(0), small_updates()
    expected = fj.apply_updates(params, updates, 7)
    for key in (KEY, jax.random.key_data(KEY), np.array([0, 7], np.uint32)):
        chex.assert_trees_all_equal(fj.apply_updates(params, updates, key), expected)
    jitted = jax.jit(fj.apply_updates)
    chex.assert_trees_all_equal(jitted(params, updates, KEY), expected)


@pytest.mark.parametrize("kind", list(jax.sharding.AxisType)[:2])
def test_sharded_equals_unsharded(kind):
    params, updates = tree(0), small_updates()
    expected = fj.apply_updates(params, updates, KEY)
    specs = {"w": jax.P("x", "y"), "stack": jax.P("y", None, "x"), "b": jax.P("x")}
    mesh = mesh_of(kind)
    layout = {k: jax.NamedSharding(mesh, spec) for k, spec in specs.items()}
    with jax.set_mesh(mesh):
        params, updates = jax.device_put((params, updates), (layout, layout))
        for apply in (fj.apply_updates, jax.jit(fj.apply_updates)):
            found = apply(params, updates, KEY)
            chex.assert_trees_all_equal(jax.device_get(found), expected)
            for name, leaf in found.items():
                assert leaf.sharding.is_equivalent_to(layout[name], leaf.ndim)


@functools.partial(jax.jit, static_argnums=0)
def one(tx, params, state, grads, key):
    return fj.update_and_apply(tx, grads, state, params, key=key)


@functools.partial(jax.jit, static_argnums=0)
def two(tx, params, state, grads, key):
    updates, state = tx.update(grads, state, params)
    return fj.apply_updates(params, updates, key), state


RULES = fj.LeafRules(min_dim_size=16)
METHODS = {
    "flora": lambda: fj.flora(1e-2, SKETCH, weight_decay=0.1),
    "flora_adamw": lambda: fj.flora_adamw(1e-2, SKETCH),
    "accumulation": lambda: fj.compressed_accumulation(
        fj.adafactor(0.1, rules=RULES), 2, SKETCH
    ),
    "optax": lambda: optax.adamw(1e-2),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("name", "on_mesh", "dtype"),
    [
        ("flora", True, "bfloat16"),
        ("flora_adamw", True, "float32"),
        ("accumulation", False, "bfloat16"),
        ("optax", False, "float32"),
        ("flora", False, "float32"),
        ("flora_adamw", False, "bfloat16"),
        ("accumulation", True, "float32"),
        ("optax", True, "bfloat16"),
    ],
)
def test_one_call_equals_the_two(name, on_mesh, dtype):
    """Bit for bit; on a mesh, and by an accumulation, layer by layer."""
    tx, start = METHODS[name](), tree(0)
    ours = theirs = start, tx.init(start)
    mesh = mesh_of(jax.sharding.AxisType.Auto)
    # Called, jax.set_mesh sets the mesh at once, and without `with` for good.
    with jax.set_mesh(mesh) if on_mesh else contextlib.nullcontext():
        for i in range(4):
            key = jax.random.fold_in(KEY, i)
            grads = tree(i + 1, dtype)
            ours, theirs = one(tx, *ours, grads, key), two(tx, *theirs, grads, key)
            chex.assert_trees_all_equal(ours[0], theirs[0])
    chex.assert_trees_all_equal_dtypes(ours[0], start)
    assert all((ours[0][k] != start[k]).any() for k in start)


def test_the_key_does_not_reach_the_transformation():
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.extend(extra_args)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    fj.update_and_apply(tx, tree(1), tx.init(tree(0)), tree(0), key=0, loss=1)
    assert seen == [APPLY, "loss"]


@pytest.mark.parametrize(
    ("key", "error", "match"),
    [
        (None, TypeError, "`key` must be a seed or a PRNG key, got key=None; pass an"),
        (1.5, TypeError, "`key` must be a seed or a PRNG key, got key=1.5; pass an"),
        (-1, ValueError, r"`key` must lie in \[0, 2\*\*64\), got key=-1"),
        (np.zeros(4, np.uint32), TypeError, r"uint32 key data of shape \(2,\).*\(4,\)"),
        (jax.random.split(KEY), TypeError, r"one threefry2x32 key, got .*shape \(2,\)"),
    ],
)
def test_what_is_no_key(key, error, match):
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    with pytest.raises(error, match=match):
        fj.apply_updates(params, params, key)
    if key is not None:
        tx = optax.sgd(0.1)
        with pytest.raises(error, match=match):
            fj.update_and_apply(tx, params, tx.init(params), params, key=key)


def test_trees_that_differ():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    with pytest.raises(ValueError, match="different pytree metadata at key path"):
        fj.apply_updates(params, {"v": params["w"]}, KEY)
