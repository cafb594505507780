"""Shardings of whole states, on a mesh of eight devices."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import flora_jax as fj
from tests.common import assert_close
from tests.conformance.cases import (
    CASES,
    FOLDS,
    STEPS,
    every_case,
    layer,
    named,
    run_layer,
)
from tests.conformance.states import own_trees

P = jax.P
SPECS = {"layer": {"kernel": P("data", "model"), "bias": P("model")}}


def mesh(kind=jax.sharding.AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def on(where, specs=None):
    """NamedShardings of the small tree."""
    specs = SPECS if specs is None else specs
    return jax.tree.map(lambda spec: jax.NamedSharding(where, spec), specs)


def expected(shape):
    """By hand: an axis of the (8, 16) kernel is sharded if 4, or 2, divide it."""
    return tuple(
        name if n % size == 0 else None
        for n, name, size in zip(shape, ("data", "model"), (4, 2), strict=True)
    )


@pytest.mark.sample(1)
@every_case
def test_every_array_follows_its_parameter(case):
    tx, params = case(), jax.eval_shape(layer)
    shardings = fj.state_sharding(tx, params, on(mesh()))
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    trees = own_trees(state)
    for (name, tree), (_, given) in zip(trees, own_trees(shardings), strict=True):
        kernel, sharding = named(tree)["layer/kernel"], named(given)["layer/kernel"]
        assert tuple(sharding.spec) == expected(kernel.shape), name
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
    ):
        sharding.shard_shape(leaf.shape)  # Raises if it does not divide.
        if leaf.dtype == jnp.uint32 or leaf.ndim == 0:
            assert sharding.is_fully_replicated


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in {"galore", "quantized"}],
    ids=lambda c: c.name,
)
def test_init_and_step_stay_on_the_mesh(case):
    reference, where = run_layer(case), on(mesh())
    tx = reference.tx
    params = jax.tree.map(jax.device_put, reference.params, where)
    shardings = fj.state_sharding(tx, params, where)
    state = jax.jit(tx.init, out_shardings=shardings)(params)

    def update(grads, state, params):  # Programs of tx.update are shared by all tests.
        return tx.update(grads, state, params)

    step = jax.jit(update, out_shardings=(where, shardings))
    for i in range(STEPS):
        grads = jax.tree.map(jax.device_put, reference.grads[i], where)
        updates, state = step(grads, state, params)
    assert_close(updates, reference.updates[-1], "float32")
    assert step._cache_size() == 1
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    # No device holds all of what is sharded.
    kernel = named(own_trees(state)[0][1])["layer/kernel"]
    assert kernel.addressable_shards[0].data.size * 2 <= kernel.size


def wrapped():
    """Chains and wrappers, and the path of the trees that they leave out."""
    galore = fj.galore(0.1, FOLDS)
    kernels = {"layer": {"kernel": True, "bias": False}}
    labels = {"layer": {"kernel": "ours", "bias": "theirs"}}
    parts = {"ours": galore, "theirs": optax.adam(0.1)}
    return {
        "chain": optax.chain(optax.clip_by_global_norm(1.0), galore),
        "masked": optax.masked(galore, kernels),
        "partition": optax.partition(parts, labels),
        "multi_steps": optax.MultiSteps(galore, 2).gradient_transformation(),
        "finite": optax.apply_if_finite(galore, 3),
        "inject": optax.inject_hyperparams(fj.galore)(learning_rate=0.1, sketch=FOLDS),
    }


@pytest.mark.parametrize("name", wrapped())
def test_in_wrappers(name):
    tx, params = wrapped()[name], jax.eval_shape(layer)
    shardings = fj.state_sharding(tx, params, on(mesh()))
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    found = jax.tree_util.tree_flatten_with_path(state)[0]
    specs = {
        jax.tree_util.keystr(path): (leaf.shape, tuple(sharding.spec))
        for (path, leaf), sharding in zip(
            found, jax.tree.leaves(shardings), strict=True
        )
    }
    kernels = {k: v for k, v in specs.items() if k.endswith("['kernel']")}
    assert len([k for k in kernels if ".mu" in k or ".nu" in k or ".basis" in k]) == 3
    for path, (shape, spec) in kernels.items():
        assert spec == expected(shape), path


def test_partition_specs_take_the_mesh_of_the_context():
    tx, params = fj.galore(0.1, fj.Sketch(3, min_dim_size=8)), jax.eval_shape(layer)
    with jax.set_mesh(mesh()):
        shardings = fj.state_sharding(tx, params, SPECS)
    # Four devices do not divide the rank of 3; two devices divide the 16 columns.
    assert shardings[0].inner.mu["layer"]["kernel"] == P(None, "model")
    assert shardings[0].basis["layer"]["kernel"] == P("data", None)
    assert shardings[0].count == P()


def test_factored_moments_of_optax_are_replicated():
    params = {"w": jax.ShapeDtypeStruct((16, 32), jnp.float32)}
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=8)
    where = on(mesh(), {"w": P("data", "model")})
    shardings = fj.state_sharding(tx, params, where)
    assert shardings.v_row["w"].spec == P()


class Model(nnx.Module):
    def __init__(self):
        init = nnx.with_partitioning(nnx.initializers.ones, ("data", "model"))
        self.layer = nnx.Linear(8, 16, rngs=nnx.Rngs(0), kernel_init=init)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit]
)
def test_nnx_with_sharding_metadata(kind):
    tx, where = fj.galore(0.1, FOLDS), mesh(kind)
    with jax.set_mesh(where):
        params = nnx.state(Model(), nnx.Param)
        shardings = nnx.get_named_sharding(params, where)
        found = fj.state_sharding(tx, params, shardings)
        state = jax.jit(tx.init, out_shardings=found)(params)
    (kernel,) = jax.tree.leaves(state[0].inner.mu["layer"]["kernel"])
    assert kernel.shape == (4, 16)
    assert kernel.sharding.spec == P("data", "model")


def test_linen_boxes():
    tx, where = fj.galore(0.1, FOLDS), mesh()
    init = linen.with_partitioning(linen.initializers.ones, ("data", "model"))
    model = linen.Dense(16, kernel_init=init, use_bias=False)
    params = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 8), np.float32))
    specs = linen.get_partition_spec(params)
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(where, spec), specs)
    found = fj.state_sharding(tx, params, shardings)
    (kernel,) = jax.tree.leaves(found[0].inner.mu["params"]["kernel"])
    assert kernel.spec == P("data", "model")


def test_masks_may_have_the_structure_of_variables():
    params, where = nnx.state(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.Param), mesh()
    shardings = jax.tree.map(lambda x: jax.NamedSharding(where, P()), params)
    shardings["kernel"].set_value(jax.NamedSharding(where, P("data", "model")))

    def matrices(params):
        return jax.tree.map(
            lambda x: x.get_value().ndim > 1,
            params,
            is_leaf=lambda x: isinstance(x, nnx.Param),
        )

    tx = optax.masked(fj.galore(0.1, FOLDS), matrices)
    found = fj.state_sharding(tx, params, shardings)
    assert jax.tree.structure(found) == jax.tree.structure(
        jax.eval_shape(tx.init, params)
    )
    (kernel,) = jax.tree.leaves(found.inner_state[0].inner.mu)
    assert kernel.spec == P("data", "model")


@pytest.mark.parametrize("name", ["key", "spec", "count"])
def test_parameters_may_have_the_names_of_settings(name):
    """A mesh axis that would divide the key, the spec and a single array's state."""
    where = on(mesh(), {name: P("data", "model"), "bias": P("model")})
    params = {
        name: jax.ShapeDtypeStruct((8, 16), jnp.float32),
        "bias": jax.ShapeDtypeStruct((64,), jnp.float32),
    }
    tx = fj.compressed_momentum(0.5, FOLDS)
    found = fj.state_sharding(tx, params, where)
    assert found.momentum[name].spec == P("data", "model")
    assert found.key.spec == found.spec.spec == found.count.spec == P()
    single = fj.state_sharding(
        optax.chain(tx), params["bias"], jax.NamedSharding(mesh(), P("model"))
    )
    assert single[0].momentum.spec == P("model")
    assert single[0].key.spec == single[0].spec.spec == P()


def test_shardings_belong_to_paths():
    params = collections.OrderedDict(
        w=jax.ShapeDtypeStruct((256, 512), jnp.float32),
        b=jax.ShapeDtypeStruct((512,), jnp.float32),
    )
    where = on(mesh(), {"w": P("data", None), "b": P("model")})
    found = fj.state_sharding(optax.sgd(0.1, momentum=0.9), params, where)
    assert found[0].trace["w"].spec == P("data", None)
    assert found[0].trace["b"].spec == P("model")


def test_masks_see_the_parameters_themselves():
    def matrices(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: path[-1].key == "kernel" and x.ndim == 2, params
        )

    tx, params = optax.masked(fj.galore(0.1, FOLDS), matrices), jax.eval_shape(layer)
    found = fj.state_sharding(tx, params, on(mesh()))
    kernel = found.inner_state[0].inner.mu["layer"]["kernel"]
    assert kernel.spec == P("data", "model")


def test_refuses_what_does_not_fit():
    tx, params = fj.galore(0.1, FOLDS), jax.eval_shape(layer)
    with pytest.raises(TypeError, match="`tx` must be .*in the other order[?]$"):
        fj.state_sharding(params, tx, on(mesh()))
    with pytest.raises(ValueError, match=r"`shardings` must have one entry.*bias"):
        fj.state_sharding(tx, params, {"layer": {"kernel": P()}})
    wrong = {"layer": {"kernel": "data", "bias": P()}}
    with pytest.raises(TypeError, match="`shardings` must hold NamedShardings or"):
        fj.state_sharding(tx, params, wrong)
    other = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    two = on(mesh())
    two["layer"]["bias"] = jax.NamedSharding(other, P())
    with pytest.raises(ValueError, match="`shardings` must live on one mesh, got"):
        fj.state_sharding(tx, params, two)
