"""The plan's bytes are those of the state that init makes, leaf by leaf and in all."""

import functools
import importlib.util
import math
import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

import flora_jax as fj
from experiments.models import build
from experiments.models.config import GPT2Config, T5Config
from tests.common import SKETCHED, every_fold
from tests.conformance.cases import DISTINCT, FOLDS, each_of, every_case, layer

SIZES = {"width": 16, "heads": 2, "vocab_size": 300}
MODELS = {
    "gpt2": lambda: build.create(GPT2Config(layers=1, context=8, **SIZES), 0)[1],
    "t5": lambda: build.create(
        T5Config(layers=1, decoder_layers=1, head_width=8, hidden=32, **SIZES), 0
    )[1],
    "folds": every_fold,
}


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def allocated(make, params, ranks):
    """Bytes of the states at these ranks; some of them sketch nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        states = [jax.eval_shape(make(rank).init, params) for rank in ranks]
    return [
        sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
        for state in states
    ]


@functools.cache
def model(name):
    return MODELS[name]()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "name", ["folds", "gpt2", pytest.param("t5", marks=pytest.mark.slow)]
)
@every_case
def test_totals_are_the_allocated_bytes(case, name):
    params = model(name)
    plan = fj.memory_plan(case(), params, compare={})
    assert plan.state_bytes == nbytes(jax.jit(case().init)(params))
    assert plan.parameter_bytes == nbytes(params)
    shapes = jax.eval_shape(lambda: params)
    assert fj.memory_plan(case(), shapes, compare={}) == plan


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx, optax.scale(-1.0)),
    "masked": lambda tx: optax.masked(tx, lambda p: {k: k == "wide" for k in p}),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.adam(1.0)},
        lambda p: {k: "b" if k == "bias" else "a" for k in p},
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject": lambda tx: optax.inject_hyperparams(lambda x: tx)(1.0),
    "accumulation": lambda tx: fj.compressed_accumulation(tx, 2, FOLDS),
    "quantized": lambda tx: fj.quantize_state(tx, min_size=1),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(name):
    params = every_fold()
    tx = WRAPPERS[name](fj.flora(1.0, FOLDS))
    plan = fj.memory_plan(tx, params, sketch=FOLDS, compare={})
    assert plan.state_bytes == nbytes(jax.jit(tx.init)(params))
    sketched = {leaf.path for leaf in plan.leaves if leaf.dense_reason is None}
    assert sketched == ({"wide"} if name == "masked" else SKETCHED)
    (wide,) = [leaf for leaf in plan.leaves if leaf.path == "wide"]
    assert wide.sketches == ((4, 24),)
    assert 0 < wide.state_bytes < plan.state_bytes


def test_bytes_stand_at_their_parameters():
    params = {"w": jnp.zeros((16, 24)), "b": jnp.zeros(24)}
    tx = fj.compressed_momentum(0.5, FOLDS, estimator="paper")
    plan = fj.memory_plan(tx, params, sketch=FOLDS, compare={})
    b, w = plan.leaves
    assert (w.path, w.shape, w.parameter_bytes) == ("w", (16, 24), 4 * 16 * 24)
    assert w.state_bytes == 4 * 4 * 24
    assert (b.state_bytes, b.sketches) == (4 * 24, ())
    assert b.dense_reason == "it has fewer than two axes"
    assert plan.other_bytes == nbytes(tx.init(params)) - 4 * 4 * 24 - 4 * 24
    outer = fj.compressed_accumulation(tx, 2, fj.Sketch(2, min_dim_size=8))
    two = fj.memory_plan(outer, params, compare={})
    assert sorted(two.leaves[1].sketches) == [(2, 24), (4, 24)]
    assert two.leaves[0].dense_reason == "not sketched"
    assert two.leaves[1].state_bytes == w.state_bytes + 4 * 2 * 24


def test_a_sketch_of_other_rules_explains_nothing():
    """The state says what is sketched; the sketch only why something is not."""
    params = {"w": jnp.zeros((16, 24)), "b": jnp.zeros(24)}
    tx = fj.compressed_momentum(0.5, FOLDS, estimator="paper")
    b, w = fj.memory_plan(tx, params, sketch=4, compare={}).leaves
    assert (b.dense_reason, w.dense_reason) == ("it has fewer than two axes", None)
    adam = fj.memory_plan(optax.adam(1.0), params, sketch=FOLDS, compare={})
    assert adam.leaves[1].dense_reason == "not sketched"
    masked = fj.Sketch(4, min_dim_size=8, mask={"w": False, "b": True})
    adam = fj.memory_plan(optax.adam(1.0), params, sketch=masked, compare={})
    assert adam.leaves[1].dense_reason == "the mask leaves it out"


@pytest.mark.parametrize("shape", [(16, 24), (4096,)])
def test_a_single_array(shape):
    """Its path is empty, and below it lies the whole state."""
    tx = fj.compressed_momentum(0.5, FOLDS, estimator="paper")
    params = jnp.zeros(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = nbytes(tx.init(params))
    plan = fj.memory_plan(tx, params, compare={})
    (leaf,) = plan.leaves
    assert plan.state_bytes == size
    assert leaf.sketches == (((4, 24),) if len(shape) == 2 else ())
    assert plan.other_bytes == 4 * 64 + 4 * 2


@pytest.mark.parametrize(
    "tx",
    [optax.adamw(1.0), optax.contrib.muon(1.0), optax.adafactor(1.0, momentum=0.9)],
    ids=["adamw", "muon", "adafactor"],
)
def test_transformations_of_others(tx):
    params = every_fold()
    plan = fj.memory_plan(tx, params, compare={"same": tx, "none": optax.sgd(1.0)})
    assert plan.state_bytes == nbytes(tx.init(params))
    assert plan.peers == {"same": plan.state_bytes, "none": 0}
    assert {leaf.dense_reason for leaf in plan.leaves} == {"not sketched"}


def test_peers_by_default():
    params = every_fold()
    plan = fj.memory_plan(fj.flora(1.0, FOLDS), params)
    adamw, adafactor, momentum, multi_steps = plan.peers.values()
    assert list(plan.peers)[0] == "optax.adamw"
    assert adamw == nbytes(optax.adamw(1.0).init(params))
    assert adafactor == nbytes(optax.adafactor(1.0).init(params))
    assert momentum == nbytes(optax.adafactor(1.0, momentum=0.9).init(params))
    steps = optax.MultiSteps(optax.adafactor(1.0), 2)
    assert multi_steps == nbytes(steps.init(params))


class Boxed(linen.Module):
    @linen.compact
    def __call__(self, x):
        init = linen.with_partitioning(linen.initializers.ones, ("in", "out"))
        return linen.Dense(24, kernel_init=init)(x)


def test_boxes_and_variables():
    boxed = Boxed().init(jax.random.key(0), jnp.ones((1, 16)))["params"]
    state = nnx.state(nnx.Linear(16, 24, rngs=nnx.Rngs(0)), nnx.Param)
    tx = fj.flora(1.0, FOLDS)
    for params in (boxed, state):
        plan = fj.memory_plan(tx, params, compare={})
        assert plan.state_bytes == nbytes(tx.init(params))
        kernel = next(x for x in plan.leaves if x.path.endswith("kernel"))
        assert kernel.sketches == ((4, 24),)


def test_masks_may_have_the_structure_of_variables():
    state = nnx.state(nnx.Linear(16, 24, rngs=nnx.Rngs(0)), nnx.Param)
    tree = jax.tree.map(lambda x: x.ndim > 1, state)

    def by_variable(params):
        return jax.tree.map(
            lambda x: x.get_value().ndim > 1,
            params,
            is_leaf=lambda x: isinstance(x, nnx.Param),
        )

    for mask in (tree, by_variable):
        tx = optax.masked(fj.flora(1.0, FOLDS), mask)
        plan = fj.memory_plan(tx, state, compare={})
        bias, kernel = plan.leaves
        assert plan.state_bytes == nbytes(tx.init(state))
        assert (bias.state_bytes, bool(kernel.sketches)) == (0, True)


def test_a_parameter_of_the_name_of_a_setting():
    params = {"w1": jnp.zeros((16, 24)), "b1": jnp.zeros(24)}
    tx = optax.inject_hyperparams(optax.adam)(1.0)
    b1, w1 = fj.memory_plan(tx, params, compare={}).leaves
    assert (b1.state_bytes, w1.state_bytes) == (2 * 4 * 24, 2 * 4 * 16 * 24)


@pytest.mark.sample(1)
@each_of(DISTINCT[::4])
def test_bytes_of_one_device(case):
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(auto, auto))
    specs = {"tall": jax.P("d"), "wide": jax.P("d", "m"), "stack": jax.P(None, "m")}
    params = every_fold()
    layout = {k: jax.NamedSharding(mesh, specs.get(k, jax.P())) for k in params}
    tx = case()
    states = fj.state_sharding(tx, params, layout)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, layout)
        state = jax.jit(tx.init, out_shardings=states)(placed)
        by_spec = fj.memory_plan(
            tx, params, shardings={k: x.spec for k, x in layout.items()}
        )
    first = jax.devices()[0]

    def on_first(tree):
        shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards)
        return sum(s.data.nbytes for s in shards if s.device == first)

    plan = fj.memory_plan(tx, params, shardings=layout)
    assert plan.per_device
    assert plan.state_bytes == on_first(state) < nbytes(state)
    assert plan.parameter_bytes == on_first(placed) < nbytes(placed)
    assert plan == by_spec
    everywhere = fj.memory_plan(tx, params)
    assert plan.peers["optax.adamw"] < everywhere.peers["optax.adamw"]
    assert "state on a device" in str(plan)


def test_plain_text_and_rich(capsys, monkeypatch):
    plan = fj.memory_plan(fj.flora(1.0, FOLDS), every_fold())
    lines = str(plan).splitlines()
    assert len(lines) == 1 + len(every_fold()) + 1 + 1 + 1 + 2 + 4
    stack = next(line for line in lines if line.startswith("stack"))
    assert stack.split("  ")[-1] == "3x16x24 -> 3x4x24"
    plan.print()
    shown = capsys.readouterr().out
    assert "┃" in shown
    assert "optax.adamw" in shown
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plan.print()
    assert capsys.readouterr().out == f"{plan}\n"


def test_equal_layers_are_one_row():
    matrix, other = jnp.zeros((16, 24)), jnp.zeros((16, 16))
    params = {
        "h": [{"w": matrix, "s": jnp.zeros(())} for _ in range(11)] + [{"w": other}],
        "Dense_0": matrix,
        "Dense_1": matrix,
        "b1": jnp.zeros(3),
        "b2": jnp.zeros(3),
    }
    tx = fj.compressed_momentum(0.5, FOLDS, estimator="paper")
    plan = fj.memory_plan(tx, params, sketch=FOLDS, compare={})
    rows = [re.split(r"  +", line.strip()) for line in str(plan).splitlines()[1:7]]
    assert len(plan.leaves) == 27
    why = "it has fewer than two axes"
    assert [[row[0], row[1], row[2], row[-1]] for row in rows] == [
        ["Dense_*", "2 of 16x24", "768 B", "16x24 -> 4x24"],
        ["b1", "3", "12 B", why],
        ["b2", "3", "12 B", why],
        ["h/*/s", "11 scalars", "44 B", why],
        ["h/*/w", "11 of 16x24", "4.12 KiB", "16x24 -> 4x24"],
        ["h/11/w", "16x16", "256 B", "16x16 -> 16x4"],
    ]


def test_bad_input():
    with pytest.raises(TypeError, match="`tx` must be an optax transformation"):
        fj.memory_plan(fj.flora, layer())
    tx = fj.flora(1.0, FOLDS)
    for order in ((layer(), tx), (tx.init(layer()), tx)):
        with pytest.raises(TypeError, match="`tx` must .*in the other order[?]$"):
            fj.memory_plan(*order)
    with pytest.raises(TypeError, match="`mine` must be an optax transformation"):
        fj.memory_plan(fj.flora(1.0, 4), layer(), compare={"mine": optax.adam})
    with pytest.raises(ValueError, match="`shardings` must have one entry for each"):
        fj.memory_plan(fj.flora(1.0, 4), layer(), shardings={})
    with pytest.raises(ValueError, match="need the mesh of jax.set_mesh, got none"):
        fj.memory_plan(fj.flora(1.0, 4), {"w": jnp.ones(4)}, shardings={"w": jax.P()})


def test_the_largest_rank_that_fits():
    params = every_fold()

    def make(rank):
        return fj.flora(1.0, fj.Sketch(rank, min_dim_size=8))

    sizes = allocated(make, params, range(1, 18))
    for budget in (sizes[0], sizes[3], sizes[3] + 1, sizes[15] - 1):
        rank = fj.rank_for_budget(make, params, budget)
        assert sizes[rank - 1] <= budget < sizes[rank]
    assert fj.rank_for_budget(make, params, sizes[-1]) == 16  # All of them are dense.
    with pytest.raises(ValueError, match=f"takes {sizes[0]} bytes, got budget_bytes="):
        fj.rank_for_budget(make, params, sizes[0] - 1)


def test_the_largest_rank_where_a_state_shrinks():
    params = {"a": jnp.zeros((11, 11)), "b": jnp.zeros((20, 20))}

    def make(rank):
        return fj.galore(1.0, fj.Sketch(rank, min_dim_size=8))

    sizes = allocated(make, params, range(1, 21))
    assert sizes[9] > sizes[10]  # The basis of a is no longer stored, at 20 b's.
    assert sizes[18] > sizes[19]
    for budget in {*sizes, sizes[0] + 1}:
        largest = max(i for i, size in enumerate(sizes, 1) if size <= budget)
        assert fj.rank_for_budget(make, params, budget) == largest


def test_bad_input_of_the_rank():
    with pytest.raises(TypeError, match="`make` must be a callable"):
        fj.rank_for_budget(fj.flora(1.0, 4), layer(), 100)
    with pytest.raises(ValueError, match="`budget_bytes` must be positive"):
        fj.rank_for_budget(lambda rank: fj.flora(1.0, rank), layer(), 0)
    with pytest.raises(ValueError, match="`make` must sketch some leaf"):
        fj.rank_for_budget(lambda rank: fj.flora(1.0, rank), layer(), 100)
