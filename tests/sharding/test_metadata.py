"""State of ``nnx.Optimizer`` and Linen on eight devices, by metadata alone.

Trainers such as Tunix and MaxText lay out an optimizer by what its variables say.
"""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import flora_jax as fj
from flora_jax.leaves.paths import is_masked, state_leaves
from tests.conformance.cases import every_case

P = jax.P
RANK, WIDTH = 256, 1024
SKETCH = fj.Sketch(RANK)

# Mesh, and the kernels' axes: sharded on the sketched side, on the other, on both.
LAYOUTS = {
    "fsdp": (
        {"fsdp": 8},
        {
            "in": ((1024, 4096), P("fsdp", None)),
            "out": ((4096, 1024), P(None, "fsdp")),
            "long": ((4096, 1024), P("fsdp", None)),
        },
    ),
    "tensor": (
        {"tensor": 8},
        {
            "up": ((1024, 4096), P(None, "tensor")),
            "heads": ((2048, 8, 128), P(None, "tensor", None)),
            "merge": ((8, 128, 4096), P("tensor", None, None)),
        },
    ),
    "both": (
        {"fsdp": 4, "tensor": 2},
        {
            "up": ((1024, 4096), P("fsdp", "tensor")),
            "heads": ((2048, 8, 128), P("fsdp", "tensor", None)),
            "inner": ((2048, 8, 128), P(None, "tensor", "fsdp")),
        },
    ),
    "stacked": (
        {"fsdp": 4, "tensor": 2},
        {
            "up": ((3, 1024, 4096), P(None, "fsdp", "tensor")),
            "heads": ((3, 2048, 8, 128), P(None, "fsdp", "tensor", None)),
            "merge": ((3, 8, 128, 4096), P(None, "tensor", None, "fsdp")),
        },
    ),
}
# Heads as wide as the rank, as Gemma 3's: the axis that holds it does not change.
EQUAL = (
    {"fsdp": 4, "tensor": 2},
    {
        "query": ((2560, 8, 256), P("fsdp", "tensor", None)),
        "out": ((8, 256, 2560), P("tensor", None, "fsdp")),
    },
)
DENSE = {"bias": ((4096,), P("fsdp")), "scale": ((4096,), P())}

# Each recipe, and the moments that it keeps where AdamW keeps two.
RECIPES = {
    "flora": (fj.flora, {}, 1),
    "flora_adamw": (fj.flora_adamw, {}, 2),
    "flora_muon": (fj.flora_muon, {}, 1),
    "galore": (fj.galore, {}, 2),
    "fira": (fj.fira, {}, 2),
    "apollo": (fj.apollo, {}, 2),
    "dct_adamw": (fj.dct_adamw, {}, 2),
}
INT8 = {"galore-int8": (fj.galore, {"state_dtype": "int8"}, 0.5)}


class Model(nnx.Module):
    """Parameters alone, with the metadata that flax's layers write."""

    def __init__(self, layout, names=("out_sharding",)):
        for name, (shape, spec) in layout.items():
            spec = (*spec, *(None for _ in range(len(shape) - len(spec))))
            # As trainers do it: flax itself keeps one name.
            param = nnx.Param(jnp.zeros(shape))
            param = param.copy(**dict.fromkeys(names, spec))
            setattr(self, name, param)


def on_mesh(name):
    sizes, kernels = {**LAYOUTS, "equal": EQUAL}[name]
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
    known = {
        k: (s, p if set(p) <= {*sizes, None} else P()) for k, (s, p) in DENSE.items()
    }
    return mesh, {**kernels, **known}


def device_bytes(leaf, sharding):
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def train_state(tx, leaves):
    model = Model(leaves)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def by_parameter(tx, leaves, mesh):
    """Parameter, field, array and sharding of each array of state of a parameter."""
    with jax.set_mesh(mesh):
        model, optimizer = nnx.eval_shape(lambda: train_state(tx, leaves))
    state, params = optimizer.opt_state, nnx.state(model, nnx.Param)
    return placed(state, params, nnx.get_named_sharding(state, mesh))


def placed(state, params, shardings):
    places = jax.tree.leaves(shardings, is_leaf=is_masked)
    found = zip(state_leaves(state, params), places, strict=True)
    return [
        (param, field, leaf, place)
        for (leaf, param, field), place in found
        if param is not None and not is_masked(leaf)
    ]


def total(arrays, names, fields=None):
    # A single zero stands where a tree of state does not use a leaf.
    return sum(
        device_bytes(leaf, place)
        for param, field, leaf, place in arrays
        if leaf.size > 1 and param in names and (fields is None or field in fields)
    )


@pytest.mark.sample(6)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", {**RECIPES, **INT8})
def test_a_device_holds_its_share_of_the_sketches(recipe, layout):
    factory, options, moments = {**RECIPES, **INT8}[recipe]
    mesh, leaves = on_mesh(layout)
    tx = factory(1e-3, SKETCH, **options)
    ours = by_parameter(tx, leaves, mesh)
    adamw = by_parameter(optax.adamw(1e-3), leaves, mesh)
    kernels = LAYOUTS[layout][1]
    bound = 1.15 * RANK / WIDTH * moments / 2 * total(adamw, kernels)
    stored = total(ours, kernels, {"basis"})
    # A basis is as wide as the sketched side, which is no longer than the other.
    assert stored <= 1.15 * RANK / WIDTH * total(adamw, kernels, {"mu"})
    assert 0 < total(ours, kernels) - stored <= bound
    for name in DENSE:
        # Adafactor's statistics of a vector are its squares, as Adam's are.
        assert total(ours, {name}, {"mu", "nu", "trace", "momentum", "v"}) == total(
            adamw, {name}
        )


@pytest.mark.sample(3)
@pytest.mark.parametrize("layout", ["stacked", "equal"])
@every_case
def test_metadata_says_what_state_sharding_says(case, layout):
    mesh, leaves = on_mesh(layout)
    shardings = {k: jax.NamedSharding(mesh, spec) for k, (_, spec) in leaves.items()}
    params = {
        k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, (shape, _) in leaves.items()
    }
    tx = case(SKETCH)
    given = fj.state_sharding(tx, params, shardings)
    expected = placed(jax.eval_shape(tx.init, params), params, given)
    if case.name == "accumulation-adafactor":
        # The (1,)-shaped statistics of optax's own do not take a matrix's axes.
        with pytest.raises(ValueError, match="valid for values of rank"):
            by_parameter(tx, leaves, mesh)
        return
    found = by_parameter(tx, leaves, mesh)

    def specs(arrays):
        # Unsharded axes at the end may be left out.
        return {
            (param, field, leaf.shape, (*place.spec, *4 * [None])[: leaf.ndim])
            for param, field, leaf, place in arrays
        }

    assert specs(found) == specs(expected)


@pytest.mark.parametrize("recipe", ["flora", "galore"])
def test_a_model_and_its_optimizer_in_one(recipe):
    """``nnx.ModelAndOptimizer`` shards the state as ``nnx.Optimizer`` does."""
    mesh, leaves = on_mesh("both")
    tx = RECIPES[recipe][0](1e-3, SKETCH)
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: nnx.ModelAndOptimizer(Model(leaves), tx))
    params = nnx.state(model.model, nnx.Param)
    shardings = nnx.get_named_sharding(model.opt_state, mesh)
    found = placed(model.opt_state, params, shardings)
    expected = by_parameter(tx, leaves, mesh)
    assert [x[1:] for x in found] == [x[1:] for x in expected]


def test_leaves_that_are_not_floating():
    """Other optimizers and masks take them."""
    mesh, _ = on_mesh("both")
    shapes = {
        "w": jax.ShapeDtypeStruct((512, 1024), jnp.float32),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    places = {
        "w": jax.NamedSharding(mesh, P("fsdp")),
        "step": jax.NamedSharding(mesh, P()),
    }
    tx = optax.masked(fj.flora(1e-3, SKETCH), {"w": True, "step": False})
    found = fj.state_sharding(tx, shapes, places).inner_state[2].momentum
    assert found["w"].spec == P("fsdp", None)
    assert fj.state_sharding(optax.adam(1e-3), shapes, places)[0].mu["step"].spec == P()


def test_sharded_arrays_without_metadata():
    """Layers and sides are read from the arrays that variables hold."""
    mesh, _ = on_mesh("both")
    place = jax.NamedSharding(mesh, P(None, "fsdp"))
    box = nnx.Param(jax.device_put(jnp.zeros((4, 512, 1024)), place))
    plain = fj.Sketch(254).with_metadata({"w": box[...]}).plan({"w": box[...]})
    boxed = fj.Sketch(254).with_metadata({"w": box}).plan({"w": box})
    assert plain[0].layer_shards == boxed[0].layer_shards == 1
    with pytest.warns(UserWarning, match="256"):
        fj.flora(1e-3, fj.Sketch(254)).init({"w": box})


def test_adafactor_inside_an_accumulation():
    mesh, leaves = on_mesh("both")
    tx = fj.compressed_accumulation(fj.adafactor(1e-3), 2, SKETCH)
    found, adamw = (by_parameter(x, leaves, mesh) for x in (tx, optax.scale_by_adam()))
    kernels = LAYOUTS["both"][1]
    assert total(found, kernels) <= 1.15 * RANK / WIDTH * total(adamw, kernels, {"mu"})
