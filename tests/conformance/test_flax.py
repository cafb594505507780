"""nnx.Optimizer and Linen's TrainState, with and without sharding metadata."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import flora_jax as fj
from tests.common import assert_close, cached
from tests.conformance.cases import (
    EVERY_K,
    FOLDS,
    every_case,
    every_sketching_case,
    layer,
    named,
    run_layer,
)
from tests.conformance.states import own_trees

P = jax.P
NAMES = {"kernel": ("data", "model"), "bias": ("model",)}


def initializers(partitioning=None):
    """Initializers that give layer(), with sharding metadata if wanted."""
    inits = {
        name: functools.partial(lambda value, *_: value, value)
        for name, value in layer()["layer"].items()
    }
    if partitioning is not None:
        inits = {name: partitioning(init, NAMES[name]) for name, init in inits.items()}
    return {f"{name}_init": init for name, init in inits.items()}


class Model(nnx.Module):
    def __init__(self, partitioning=None):
        self.layer = nnx.Linear(8, 16, rngs=nnx.Rngs(0), **initializers(partitioning))

    def __call__(self, x):
        return self.layer(x)


class LinenModel(linen.Module):
    partitioning: bool = False

    @linen.compact
    def __call__(self, x):
        boxes = linen.with_partitioning if self.partitioning else None
        return linen.Dense(16, name="layer", **initializers(boxes))(x)


def like(tree, values):
    """The values in the structure of another tree of the same leaves."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(values))


def train(tx, step, grads):
    """Parameters and state after one cycle, from plain dicts."""
    params, state = layer(), tx.init(layer())
    for grad in grads:
        updates, state = step(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@cached
def trained(case):
    reference = run_layer(case)
    return train(reference.tx, reference.step, reference.grads[:EVERY_K])


def train_nnx(tx, model, grads, mesh=None):
    """Updates the model; returns the optimizer."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    if mesh is not None:
        # Counters go there too, or the second step would compile again.
        everywhere = jax.NamedSharding(mesh, P())
        state = jax.tree.map(
            lambda x: x if len(x.devices()) > 1 else jax.device_put(x, everywhere),
            state,
        )

    @jax.jit
    def step(state, grads):
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer))

    for grad in grads:
        state = step(state, like(nnx.state(model, nnx.Param), grad))
    nnx.update((model, optimizer), state)
    return optimizer


def is_variable(x):
    return isinstance(x, nnx.Variable)


def arrays(tree):
    return jax.tree.map(lambda x: x.get_value(), tree, is_leaf=is_variable)


@pytest.mark.sample(1)
@every_case
def test_nnx_optimizer(case):
    params, state = trained(case)
    model = Model()
    optimizer = train_nnx(case(), model, run_layer(case).grads[:EVERY_K])
    assert_close(nnx.state(model, nnx.Param), params)
    assert_close(arrays(optimizer.opt_state), state, "float32")
    fj.verify_state(case(), optimizer.opt_state)


def on_a_mesh(case):
    """The case, without what fails there by itself.

    optax.adafactor keeps vectors and single zeros in parameter-shaped trees, which
    cannot take the parameter's sharding: flora without momentum is in its place.
    """
    if case.name != "accumulation-adafactor":
        return case()
    return case(inner=fj.adafactor(0.1, rules=FOLDS.rules))


def make_mesh(kind):
    return jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(kind,) * 2)


SIZES = {"data": 4, "model": 2}


def fitting(name, shape, sizes):
    """The parameter's sharding, without mesh axes that do not divide another size."""
    own = layer()["layer"][name].shape
    axes = zip(NAMES[name], shape, own, strict=True)
    return P(
        *(
            axis if size == n or size % sizes.get(axis, size + 1) == 0 else None
            for axis, size, n in axes
        )
    )


def assert_sharded_as_fits(optimizer, mesh, but=()):
    for name, tree in own_trees(arrays(optimizer.opt_state)):
        if name in but:
            continue
        for part in NAMES:
            leaf = named(tree).get(f"layer/{part}")
            if leaf is None:
                continue  # Not of ours: Adam has it.
            expected = jax.NamedSharding(mesh, fitting(part, leaf.shape, SIZES))
            assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (name, part)


@pytest.mark.sample(1)
@every_case
def test_nnx_optimizer_with_sharding_metadata(case):
    mesh = make_mesh(jax.sharding.AxisType.Auto)
    tx, grads = on_a_mesh(case), run_layer(case).grads[:EVERY_K]
    with jax.set_mesh(mesh):
        model = Model(nnx.with_partitioning)
        optimizer = train_nnx(tx, model, grads, mesh)
    # The compiler may shard the scales that it writes as it shards their codes.
    assert_sharded_as_fits(optimizer, mesh, ("QuantizedState.scales",))
    kernel = model.layer.kernel.get_value()
    expected = jax.NamedSharding(mesh, P(*NAMES["kernel"]))
    assert kernel.sharding.is_equivalent_to(expected, 2)
    if case.name == "accumulation-adafactor":
        params, state = train(tx, jax.jit(tx.update), grads)
    else:
        params, state = trained(case)
    assert_close(nnx.state(model, nnx.Param), params)
    assert_close(arrays(optimizer.opt_state), state, "float32")


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@every_case
def test_nnx_optimizer_made_under_jit_on_a_mesh(case, kind):
    mesh = make_mesh(jax.sharding.AxisType[kind])

    @nnx.jit
    def make():
        return nnx.Optimizer(
            Model(nnx.with_partitioning), on_a_mesh(case), wrt=nnx.Param
        )

    with jax.set_mesh(mesh):
        assert_sharded_as_fits(make(), mesh)


@pytest.mark.sample(1)
@pytest.mark.parametrize("boxed", [False, True], ids=["plain", "boxed"])
@every_case
def test_linen_train_state(case, boxed):
    params, opt_state = trained(case)
    model = LinenModel(boxed)
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), jnp.ones((1, 8)))["params"],
        tx=case(),
    )
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for grads in run_layer(case).grads[:EVERY_K]:
        state = step(state, like(state.params, grads))
    assert_close(state.params, params)
    assert_close(state.opt_state, opt_state, "float32")
    fj.verify_state(case(), state.opt_state)
    if not boxed:
        assert jax.tree.structure(state.opt_state) == jax.tree.structure(opt_state)
        return
    for (name, specs), (_, tree) in zip(
        own_trees(linen.get_partition_spec(state.opt_state)),
        own_trees(opt_state),
        strict=True,
    ):
        leaves = named(tree)
        # optax.partition leaves the others to another transformation.
        for part in (part for part in NAMES if f"layer/{part}" in leaves):
            # Of boxes no mesh is known.
            expected = fitting(part, leaves[f"layer/{part}"].shape, {})
            assert specs["layer"][part] == expected, (name, part)


class Recorder:
    """A rank and a mask that note the paths they are asked about."""

    def __init__(self, case):
        self.ranks, self.masks = set(), set()
        self.tx = case(rank=self.rank, mask=self.mask)

    def rank(self, path, shape):
        self.ranks.add((path, shape))
        return FOLDS.rank

    def mask(self, path, shape):
        self.masks.add((path, shape))
        return True

    def seen(self):
        """What was noted since the last call."""
        seen = self.ranks, self.masks
        self.ranks, self.masks = set(), set()
        return seen


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", ["dict", "nnx", "linen", "linen-boxed"])
@every_sketching_case
def test_paths_are_the_same_everywhere(case, kind):
    recorder = Recorder(case)
    inputs = jnp.ones((1, 8))

    def loss(model, *args):
        return jnp.sum(model(*args))

    def from_dict():
        params = layer()
        return params, params

    def from_linen():
        model = LinenModel(kind == "linen-boxed")
        params = model.init(jax.random.key(0), inputs)["params"]
        return params, jax.grad(lambda p: loss(model.apply, {"params": p}, inputs))(
            params
        )

    def init_and_update():
        if kind == "nnx":
            model = Model()
            optimizer = nnx.Optimizer(model, recorder.tx, wrt=nnx.Param)
            at_init.append(recorder.seen())
            optimizer.update(model, nnx.grad(loss)(model, inputs))
            return nnx.state(model)
        params, grads = from_dict() if kind == "dict" else from_linen()
        state = recorder.tx.init(params)
        at_init.append(recorder.seen())
        return recorder.tx.update(grads, state, params)

    at_init = []
    nnx.eval_shape(init_and_update)
    kernel, bias = ("layer/kernel", (8, 16)), ("layer/bias", (16,))
    # Where Adam has the bias, a single zero stands for it among the matrices.
    zero = {("layer/bias", (1,))} if case.factory is fj.flora_muon else set()
    assert at_init == [({kernel}, {kernel, bias} | zero)]
    # A plan is made once: a path of another form would be asked about in update. Only
    # orthogonalize, which has no state to make, plans there.
    ranks, masks = recorder.seen()
    assert not ranks
    assert masks <= {kernel, bias} | zero


@pytest.mark.sample(1)
@every_sketching_case
def test_a_parameter_may_be_called_value(case):
    # As the attribute is that holds the array of an nnx.Variable.
    recorder = Recorder(case)
    params = {"attention": {"value": jnp.ones((8, 16))}}
    recorder.tx.init(params)
    expected = recorder.seen()

    def init_and_update():
        model = nnx.Dict(attention=nnx.Dict(value=nnx.Param(jnp.ones((8, 16)))))
        optimizer = nnx.Optimizer(model, recorder.tx, wrt=nnx.Param)
        # Plans are known by path: one of another form would be asked about.
        assert recorder.seen() == (set(), set())
        optimizer.update(model, nnx.state(model, nnx.Param))
        ranks, masks = recorder.seen()
        # Of orthogonalize, which has no state to make.
        assert not ranks
        assert masks <= expected[1]
        return nnx.state(model)

    nnx.eval_shape(init_and_update)
    (path,) = {path for path, _ in expected[0]}
    assert path == "attention/value"
