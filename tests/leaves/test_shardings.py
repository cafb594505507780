"""The rule by which an array of state is sharded, and where the sizes come from."""

import contextlib

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

import flora_jax as fj
from flora_jax.leaves.boxes import unboxed
from flora_jax.leaves.mesh import fit_sharding, mesh_axes
from flora_jax.sketching.sketch import Sketch

P = jax.P


def mesh(**sizes):
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


@pytest.mark.parametrize(
    ("place", "old", "new", "expected"),
    [
        # A rank that the axes divide, one that they do not, one that some do.
        (("a", None), (64, 96), (8, 96), ("a", None)),
        (("a", None), (64, 96), (6, 96), (None, None)),
        ((("a", "b"), None), (64, 96), (12, 96), ("a", None)),
        ((None, "b"), (64, 96), (6, 96), (None, "b")),
        # Heads are folded: what shards them moves to the rank, wherever it stands.
        ((None, "b", None), (768, 12, 64), (768, 1, 16), (None, None, "b")),
        (("a", "b", None), (768, 12, 64), (768, 1, 16), ("a", None, "b")),
        ((None, "b", "a"), (768, 12, 64), (768, 1, 16), (None, None, ("b", "a"))),
        ((None, "b", "a"), (768, 12, 64), (768, 1, 6), (None, None, "b")),
        ((None, "b", "a"), (768, 64, 12), (768, 16, 1), (None, ("b", "a"), None)),
        (("b", None, "a"), (12, 64, 768), (1, 16, 768), (None, "b", "a")),
        (
            ("b", None, None, "a"),
            (12, 3, 64, 768),
            (1, 3, 16, 768),
            (None, None, "b", "a"),
        ),
        # A basis keeps the heads, a factored moment one side, a limiter none.
        (("a", "b", None), (768, 12, 64), (16, 12, 64), ("a", "b", None)),
        (("a", "b", None), (768, 12, 64), (1, 12, 64), (None, "b", None)),
        (("a", "b", None), (768, 12, 64), (1, 1, 1), (None, None, None)),
        # Resized axes that a mesh may not divide; a spec that leaves out its end.
        (("a", "b"), (64, 96), (64, 2), ("a", "b")),
        (("a", "b"), (64, 96), (64, 3), ("a", None)),
        (("a", "b", None), (768, 12, 64), (4, 1, 16), ("a", None, "b")),
        (("a",), (64, 96), (8, 96), ("a", None)),
    ],
)
def test_the_rule(place, old, new, expected):
    sizes = mesh_axes(mesh(a=4, b=2))
    assert fit_sharding(place, old, new, sizes) == expected
    spec = fit_sharding(P(*place), old, new, sizes)
    assert spec == P(*expected)
    named = jax.NamedSharding(mesh(a=4, b=2), P(*place))
    assert fit_sharding(named, old, new).spec == P(*expected)


def test_a_rank_as_long_as_a_head():
    """Only the fold tells that the last axis of (768, 1, 64) is a rank."""
    sizes = mesh_axes(mesh(a=4, b=2))
    groups = (0,), (1, 2)
    spec = fit_sharding(("a", "b", None), (768, 12, 64), (768, 1, 64), sizes, groups)
    assert spec == ("a", None, "b")
    params = stacked(("a", "b", None), (768, 12, 64))
    with jax.set_mesh(mesh(a=4, b=2)):
        state = jax.eval_shape(fj.compressed_momentum(0.9, fj.Sketch(64)).init, params)
    momentum = state.momentum["w"].get_metadata("out_sharding")
    assert momentum == ("a", None, "b")


def test_an_unconstrained_axis_is_unsharded_where_it_is_resized():
    free = P.UNCONSTRAINED
    where = jax.NamedSharding(mesh(a=4, b=2), P(free, "b"))
    assert fit_sharding(where, (64, 96), (8, 96)).spec == P(None, "b")
    assert fit_sharding(where, (64, 96), (64, 96)).spec == P(free, "b")


@pytest.mark.parametrize(
    ("place", "new", "expected"),
    [
        ((None, "heads", "kv"), (768, 1, 16), (None, None, "heads")),
        (("embed", "heads", "kv"), (768, 1, 6), ("embed", None, "heads")),
        (("embed", "heads", "kv"), (768, 1, 5), ("embed", None, "kv")),
        (("embed", "heads", "kv"), (16, 12, 64), ("embed", "heads", "kv")),
        (("embed", "heads", "kv"), (6, 12, 64), (None, "heads", "kv")),
        (("other", "heads", "kv"), (16, 12, 64), (None, "heads", "kv")),
    ],
)
def test_logical_names_are_sized_by_rules(place, new, expected):
    """One name for an axis: rules map no tuples of them."""
    rules = [("embed", ("a",)), ("heads", "b"), ("kv", None), ("other", "absent")]
    sizes = mesh_axes(mesh(a=4, b=2), rules)
    assert fit_sharding(place, (768, 12, 64), new, sizes) == expected


def test_a_rule_comes_before_a_mesh_axis_of_its_name():
    sizes = mesh_axes(mesh(a=4, b=2), [("a", ("a", "b"))])
    assert fit_sharding(("a", None), (64, 96), (20, 96), sizes) == (None, None)
    assert fit_sharding(("a", None), (64, 96), (24, 96), sizes) == ("a", None)


def test_of_several_rules_all_divide():
    rules = [("embed", ("a", "b")), ("embed", ("b", "c"))]
    sizes = mesh_axes(mesh(a=1, b=2, c=4), rules)
    assert sizes.shards("embed") == 8


def kernel(**metadata):
    """A Variable as trainers leave it: flax's constructor renames some metadata."""
    return nnx.Param(jnp.zeros((256, 512))).copy(**metadata)


def moved(params, sketch):
    """The box of the momentum of the one parameter."""
    state = fj.compressed_momentum(0.9, sketch).init(params)
    (box,) = jax.tree.leaves(state.momentum, is_leaf=lambda x: hasattr(x, "copy"))
    return box


SKETCH = fj.Sketch(16)
NAMES = ["out_sharding", "optimizer_sharding", "sharding", "sharding_names"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_metadata_follows(name):
    params = nnx.State({"w": kernel(**{name: ("a", "b")})})
    for a, expected in ((4, ("a", "b")), (3, (None, "b"))):
        tx = fj.compressed_momentum(0.9, SKETCH)
        warns = contextlib.nullcontext() if a == 4 else pytest.warns(match="rank 18")
        with jax.set_mesh(mesh(a=a, b=2)), warns:
            state = jax.eval_shape(tx.init, params)
        assert state.momentum["w"].get_metadata()[name] == expected


def test_sizes_come_from_metadata_and_from_arrays():
    where = mesh(a=4, b=2)
    named = nnx.State({"w": kernel(out_sharding=("a", "b"), mesh=where)})
    assert moved(named, SKETCH).get_metadata("out_sharding") == ("a", "b")
    sharding = jax.NamedSharding(where, P("a", "b"))
    array = jax.device_put(jnp.zeros((256, 512)), sharding)
    box = kernel(out_sharding=("a", "b")).copy(array)
    momentum = moved(nnx.State({"w": box}), SKETCH)
    assert momentum.get_metadata("out_sharding") == ("a", "b")
    assert momentum.get_value().sharding.spec == P("a", "b")


def test_active_rules_of_flax_count():
    params = nnx.State({"w": kernel(out_sharding=("embed", "mlp"))})
    rules = (("embed", "a"), ("mlp", "b"))
    with jax.set_mesh(mesh(a=4, b=2)):
        assert moved(params, SKETCH).get_metadata("out_sharding") == (None, "mlp")
        with linen.logical_axis_rules(rules):
            assert moved(params, SKETCH).get_metadata("out_sharding") == (
                "embed",
                "mlp",
            )
        own = nnx.State({"w": params["w"].copy(sharding_rules=rules)})
        assert moved(own, SKETCH).get_metadata("out_sharding") == ("embed", "mlp")


def test_logical_names_without_rules():
    init = linen.with_logical_partitioning(linen.initializers.zeros, ("embed", "mlp"))
    model = linen.Dense(512, kernel_init=init, use_bias=False)
    params = model.init(jax.random.key(0), jnp.ones((1, 256)))

    def names(sketch):
        state = fj.compressed_momentum(0.9, sketch).init(params)
        return state.momentum["params"]["kernel"].names

    assert names(SKETCH) == (None, "mlp")
    assert names(Sketch(16, keep_logical_axes=True)) == ("embed", "mlp")


@pytest.mark.parametrize("make", [fj.flora, fj.galore, fj.compressed_momentum])
def test_a_rank_that_the_shards_do_not_divide(make):
    where = mesh(fsdp=8)
    params = {
        "w": jax.device_put(
            jnp.zeros((256, 512)), jax.NamedSharding(where, P("fsdp", None))
        )
    }
    with pytest.warns(UserWarning, match="'w'.*rank 20 is not .* 8 shards.*rank 24 is"):
        make(0.1, fj.Sketch(20)).init(params)
    make(0.1, fj.Sketch(24)).init(params)


def test_the_last_rank_below_the_width():
    where = mesh(fsdp=8)
    sharding = jax.NamedSharding(where, P("fsdp", None))
    params = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=sharding)}
    with pytest.warns(
        UserWarning, match="rank 250 is not .* holds all .*; rank 248 is"
    ):
        fj.flora(0.1, fj.Sketch(250)).init(params)


def test_the_plan_of_memory_names_the_next_rank():
    where = mesh(fsdp=4, tensor=2)
    params = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
    places = {"w": jax.NamedSharding(where, P(("fsdp", "tensor"), None))}

    def plan(rank):
        sketch = fj.Sketch(rank)
        tx = fj.flora(1e-3, sketch)
        return fj.memory_plan(tx, params, sketch=sketch, shardings=places, compare={})

    text = str(plan(20))
    assert "256x512 -> 20x512; rank 20 is not divisible by the 8 shards" in text
    assert "1/4 of its sketch; rank 24 is" in text
    assert plan(24).leaves[0].replicated is None
    assert plan(20).leaves[0].state_bytes > 1.4 * plan(24).leaves[0].state_bytes


def test_ranks_for_a_budget_divide():
    where = mesh(fsdp=8)
    sharding = jax.NamedSharding(where, P("fsdp", None))

    def rank(**options):
        params = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32, **options)}
        return fj.rank_for_budget(lambda r: fj.flora(1e-3, r), params, 100_000)

    assert rank() == 47
    assert rank(sharding=sharding) == 40


def stacked(names, shape, **metadata):
    box = nnx.Param(jnp.zeros(shape)).copy(out_sharding=names, **metadata)
    return nnx.State({"w": box})


@pytest.mark.parametrize(
    ("names", "shape", "metadata", "expected"),
    [
        (("embed", "layers", "mlp"), (128, 4, 512), {}, ((1,), (0,), (2,))),
        (
            ("embed", "layers", "q_heads", "kv"),
            (256, 4, 2, 128),
            {},
            ((1,), (0,), (2, 3)),
        ),
        (
            ("q_heads", "layers", "kv", "embed"),
            (2, 4, 128, 256),
            {},
            ((1,), (0, 2), (3,)),
        ),
        (("heads", "kv", "embed"), (4, 128, 1024), {}, ((), (0, 1), (2,))),
        (("exp", "layers", "embed", "mlp"), (8, 4, 128, 512), {}, ((0, 1), (2,), (3,))),
        (
            (None, None, None),
            (128, 4, 512),
            {"param_scan_axis": 1, "partition_name": "blocks"},
            ((1,), (0,), (2,)),
        ),
        (
            ("embed", "blocks", "mlp"),
            (128, 4, 512),
            {"partition_name": "blocks"},
            ((1,), (0,), (2,)),
        ),
    ],
)
def test_folds_that_metadata_tell(names, shape, metadata, expected):
    params = stacked(names, shape, **metadata)
    sketch = fj.Sketch(16).with_metadata(params)
    for tree in (params, {"w": jnp.zeros(shape)}):  # As nnx.Optimizer's updates are.
        (plan,) = sketch.plan(tree)
        assert (plan.batch_axes, plan.row_axes, plan.column_axes) == expected


@pytest.mark.parametrize(
    "name",
    ["layer", "layers", "dense_layers", "stack", "stage", "circular_repeats"]
    + ["exp", "expert", "experts"],
)
def test_names_of_stacks(name):
    """Those that docs/trainers.md lists."""
    params = stacked(("embed", name, "mlp"), (128, 4, 512))
    (plan,) = fj.Sketch(16).with_metadata(params).plan(params)
    assert plan.batch_axes == (1,)


@pytest.mark.parametrize(
    ("names", "known", "shards"),
    [
        (("layers", "embed", "mlp"), True, 1),  # As no rule shards them.
        (("experts", "embed", "mlp"), True, 2),
        (("layers", "embed", "mlp"), False, 0),
        ((None, "embed", "mlp"), False, 1),
        ((("a", "layers"), "embed", "mlp"), False, 0),  # Half of it is known.
    ],
)
def test_metadata_tell_whether_layers_are_sharded(names, known, shards):
    params = stacked(names, (4, 128, 512))
    rules = (("layers", None), ("experts", "b"), ("embed", "a"), ("mlp", "b"))
    active = linen.logical_axis_rules(rules) if known else contextlib.nullcontext()
    with jax.set_mesh(mesh(a=4, b=2)), active:
        sketch = fj.Sketch(16).with_metadata(params)
    (plan,) = sketch.plan(params)
    assert (plan.batch_axes, plan.layer_shards) == ((0,), shards)


@pytest.mark.parametrize("shards", [1, len])
def test_numbers_of_shards_are_by_leaf(shards):
    with pytest.raises(TypeError, match="`layer_shards` must be a tree of ints, got"):
        fj.Sketch(16, layer_shards=shards)


@pytest.mark.parametrize("shards", [-1, "x", 1.5])
def test_numbers_of_shards_are_numbers(shards):
    with pytest.raises(ValueError, match="`layer_shards` must be numbers of shards"):
        fj.Sketch(16, layer_shards={"w": shards})


@pytest.mark.parametrize(("spec", "shards"), [(P(), 1), (P("a"), 4), (P(None, "a"), 1)])
def test_arrays_tell_whether_layers_are_sharded(spec, shards):
    shape = jax.ShapeDtypeStruct(
        (4, 128, 512), jnp.float32, sharding=jax.NamedSharding(mesh(a=4, b=2), spec)
    )
    placed = jax.device_put(jnp.zeros(shape.shape), shape.sharding)
    for leaf in (shape, placed):
        (plan,) = fj.Sketch(16).with_metadata({"w": leaf}).plan({"w": leaf})
        assert plan.layer_shards == shards
    (plan,) = (
        fj.Sketch(16).with_metadata({"w": jnp.zeros(shape.shape)}).plan({"w": placed})
    )
    assert plan.layer_shards == 0


def test_dense_leaves_keep_their_reasons():
    params = nnx.State(
        {
            "table": nnx.Param(jnp.zeros((4096, 128))),
            "small": nnx.Param(jnp.zeros((64, 512))),
            "norm": nnx.Param(jnp.zeros((512, 4))).copy(
                out_sharding=("norm", "layers")
            ),
            "bias": nnx.Param(jnp.zeros(512)),
        }
    )
    sketch = fj.Sketch(16)
    before = {plan.path: plan.dense_reason for plan in sketch.plan(params)}
    after = {p.path: p.dense_reason for p in sketch.with_metadata(params).plan(params)}
    assert "aspect ratio" in after["table"]
    assert {k: v for k, v in before.items() if k != "norm"} == {
        k: v for k, v in after.items() if k != "norm"
    }
    assert after["norm"] == "weight_dimension_numbers leave it out"


@pytest.mark.parametrize(
    "make",
    [
        lambda sketch: fj.flora(0.1, sketch),
        lambda sketch: fj.galore(0.1, sketch),
        lambda sketch: fj.flora_muon(0.1, sketch),
        lambda sketch: fj.compressed_accumulation(optax.sgd(0.1), 2, sketch),
        lambda sketch: fj.scale_by_factored_rms(rules=sketch.rules),
        lambda sketch: fj.orthogonalize(rules=sketch.rules),
    ],
)
def test_a_fold_that_merges_layers_is_refused(make):
    # Three layers of gate projections: 128 x 1536 would be a matrix too.
    params = stacked(("embed", "layers", "mlp"), (128, 3, 512))
    with pytest.raises(ValueError, match="'w'.*stacked along axis 1.*with_metadata"):
        make(fj.Sketch(16)).init(params)
    make(fj.Sketch(16).with_metadata(params)).init(params)
    make(fj.Sketch(16)).init(unboxed(params))


@pytest.mark.parametrize("names", [P("expert", None), ("expert", None)])
def test_a_matrix_is_no_stack(names):
    """Its axis may be named after a mesh that is not known yet."""
    params = stacked(names, (256, 512))
    jax.eval_shape(fj.compressed_momentum(0.9, SKETCH).init, params)


def test_metadata_that_names_no_axes():
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = nnx.State({"w": kernel(sharding=single)})
    assert moved(params, SKETCH).get_metadata("sharding") == single
    box = linen.LogicallyPartitioned(jnp.zeros((256, 512)), names=None)
    state = fj.compressed_momentum(0.9, SKETCH).init({"w": box})
    assert state.momentum["w"].names is None


def test_optimizer_sharding_decides():
    """ZeRO-1: flax gives it to the state, whose parameters are replicated."""
    where = {"out_sharding": (None, None), "optimizer_sharding": ("a", "b")}
    params = nnx.State({"w": kernel(**where)})
    with (
        jax.set_mesh(mesh(a=4, b=2)),
        pytest.warns(UserWarning, match="rank 18 is not .*rank 20 is"),
    ):
        jax.eval_shape(fj.compressed_momentum(0.9, fj.Sketch(18)).init, params)


def test_two_sharded_logical_names_on_one_side():
    """A rank's axis can have one of them: the warning asks for no more."""
    rules = (("embed", None), ("heads", "b"), ("kv", "a"))
    params = stacked(("embed", "heads", "kv"), (1024, 8, 64))
    with jax.set_mesh(mesh(a=4, b=2)), linen.logical_axis_rules(rules):
        state = jax.eval_shape(fj.compressed_momentum(0.9, fj.Sketch(24)).init, params)
    momentum = state.momentum["w"].get_metadata("out_sharding")
    assert momentum == ("embed", None, "kv")


def test_equal_layers_warn_once():
    sharding = jax.NamedSharding(mesh(fsdp=8), P("fsdp", None))
    leaf = jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=sharding)
    with pytest.warns(UserWarning, match="rank 20 is not") as caught:
        fj.compressed_momentum(0.9, fj.Sketch(20)).init([leaf] * 4)
    assert len(caught) == 1


def test_shapes_on_an_abstract_mesh():
    """As ``nnx.as_abstract`` gives them; there is no device to put zeros on."""
    where = jax.NamedSharding(mesh(a=4, b=2).abstract_mesh, P("a", "b"))
    params = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=where)}
    state = fj.compressed_momentum(0.9, SKETCH).init(params)
    assert state.momentum["w"].shape == (16, 512)


def test_the_layout_is_no_part_of_what_a_state_means():
    params = {"w": jnp.zeros((256, 512))}
    state = fj.compressed_momentum(0.9, SKETCH).init(params)
    kept = fj.compressed_momentum(0.9, fj.Sketch(16, keep_logical_axes=True))
    fj.verify_state(kept, state)
    with pytest.raises(TypeError, match="`keep_logical_axes` must be"):
        fj.Sketch(16, keep_logical_axes="embed")


def test_plans_of_a_recipe_in_two_parts():
    """The single zeros that stand for Adam's leaves in Muon's state are no sketches."""
    shapes = {"w": (512, 1024), "wte": (5000, 512), "b": (1024,)}
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    sketch = fj.Sketch(64, mask=fj.not_embeddings)
    plan = fj.memory_plan(fj.flora_muon(1e-3, sketch), params, sketch=sketch)
    sketches = {leaf.path: leaf.sketches for leaf in plan.leaves}
    assert sketches == {"b": (), "w": ((64, 1024),), "wte": ()}
    assert plan.leaves[2].dense_reason == "the mask leaves it out"

    def make(rank):
        return fj.flora_muon(1e-3, fj.Sketch(rank, mask=fj.not_embeddings))

    assert fj.rank_for_budget(make, params, 10**9) == 512


def test_rules_are_asked_about_leaves_alone():
    """Not about the zeros, of which a rank by shape would be 0."""
    params = {"w": jnp.zeros((256, 512)), "wte": jnp.zeros((2048, 256))}
    sketch = fj.Sketch(
        lambda path, shape: shape[-1] // 4,
        min_dim_size=1,
        mask=lambda path, shape: shape[0] < 2000,
    )
    state = fj.flora_muon(0.1, sketch).init(params)
    assert state[0].matrices[0].inner.trace["wte"].shape == (1, 1)


def test_an_axis_of_the_mesh_is_no_stack():
    params = stacked(("expert", None), (256, 512))
    with jax.set_mesh(mesh(expert=8)):
        state = jax.eval_shape(fj.compressed_momentum(0.9, SKETCH).init, params)
    assert state.momentum["w"].get_metadata("out_sharding") == ("expert", None)


def test_rules_without_a_mesh():
    """As MaxText creates its state: a rank keeps its names, a row's axis loses them."""
    rules = (
        ("embed", ("fsdp",)),
        ("heads", ("tensor",)),
        ("kv", ()),
        ("mlp", "tensor"),
    )

    def names(tx, axes, shape, field):
        params = stacked(axes, shape)
        with linen.logical_axis_rules(rules):
            state = jax.eval_shape(tx.init, params)
        (box,) = jax.tree.leaves(
            optax.tree.get(state, field), is_leaf=lambda x: hasattr(x, "get_metadata")
        )
        return box.get_metadata("out_sharding")

    momentum = fj.compressed_momentum(0.9, SKETCH)
    heads = ("embed", "heads", "kv"), (512, 4, 64)
    assert names(momentum, *heads, "momentum") == ("embed", None, "heads")
    factored = fj.scale_by_factored_rms()
    assert names(factored, *heads, "v_row") == (None, "heads", "kv")
    assert names(factored, *heads, "v_col") == ("embed", None, None)
    coded = fj.quantize_state(optax.scale_by_adam())
    matrix = ("embed", "mlp"), (512, 1024)
    assert names(coded, *matrix, "mu") == ("embed", "mlp")
    with linen.logical_axis_rules(rules):
        state = jax.eval_shape(coded.init, stacked(*matrix))
    assert state.scales[0]["w"].get_metadata("out_sharding") == ("embed", None)


def test_metadata_beside_dimension_numbers():
    params = stacked(("embed", "layers", "mlp"), (128, 3, 512))
    sketch = fj.Sketch(16, weight_dimension_numbers=lambda tree: None)
    with pytest.raises(ValueError, match="`weight_dimension_numbers` must be None for"):
        sketch.with_metadata(params)
