"""Data-parallel steps under shard_map that reduce sketches in place of gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import assert_close
from tests.sharding.test_compressed_pmean import batch, bytes_reduced, gradients

P = jax.P
SHAPES = {"wide": (16, 24), "stack": (3, 40, 16), "bias": (16,)}
FULL = 4 * (16 * 24 + 3 * 40 * 16 + 16)
SKETCHES = 4 * (4 * 24 + 3 * 40 * 4 + 16)


def sketch(rank=4, key=0):
    return fj.Sketch(rank, min_dim_size=8, key=key)


def zeros():
    return {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def local(tree):
    return jax.tree.map(lambda x: x[0], tree)


def on_devices(function, in_specs, out_specs):
    mapped = jax.shard_map(
        function, mesh=batch(), in_specs=in_specs, out_specs=out_specs
    )
    return jax.jit(mapped)


def accumulating(rank):
    """One call of the optimizer, with accumulators of each device, and their state."""
    tx = fj.compressed_accumulation(optax.sgd(1.0), 2, sketch(rank), axis_name="batch")
    state = tx.init(zeros())
    own = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), state.acc_grads)
    specs = jax.tree.map(lambda _: P(), state)
    specs = specs._replace(acc_grads=jax.tree.map(lambda _: P("batch"), own))

    def step(grads, state):
        state = state._replace(acc_grads=local(state.acc_grads))
        updates, state = tx.update(local(grads), state)
        acc = jax.tree.map(lambda x: x[None], state.acc_grads)
        return updates, state._replace(acc_grads=acc)

    step = on_devices(step, (P("batch"), specs), (P(), specs))
    return step, state._replace(acc_grads=own)


@pytest.mark.full
def test_accumulation_reduces_sketches_once_per_cycle():
    step, state = accumulating(rank=4)
    program = step.lower(gradients(0), state).compile()
    assert bytes_reduced(program) == SKETCHES
    # In the branch that ends a cycle: other micro-steps do not wait for one another.
    _, entry = program.as_text().split("\nENTRY ")
    assert "all-reduce" not in entry
    mean = jax.tree.map(lambda *x: np.mean(x, (0, 1)), gradients(0), gradients(1))
    for i in range(2):
        updates, state = step(gradients(i), state)
        assert any(np.any(x) for x in jax.tree.leaves(updates)) == (i == 1)
    # On one device, of the mean over devices, the same.
    tx = fj.compressed_accumulation(optax.sgd(1.0), 2, sketch())
    alone = tx.init(zeros())
    for _ in range(2):
        expected, alone = tx.update(mean, alone)
    assert_close(updates, expected, "float32")


@pytest.mark.filterwarnings("ignore:.* sketches only 0 of . leaves:UserWarning")
def test_accumulation_at_full_rank_is_the_plain_mean():
    step, state = accumulating(rank=16)
    for i in range(2):
        updates, state = step(gradients(i), state)
    mean = jax.tree.map(lambda *x: -np.mean(x, (0, 1)), gradients(0), gradients(1))
    assert_close(updates, mean, "float32")


@pytest.mark.full
@pytest.mark.parametrize(("rank", "expected"), [(4, SKETCHES), (16, FULL)])
def test_the_accumulator_of_microbatches(rank, expected):
    def loss(params, x):
        return sum(
            jnp.vdot(leaf, jnp.mean(x[name], 0)) for name, leaf in params.items()
        )

    def step(params, x):
        accumulator = fj.compressed_accumulator(sketch(rank, 3), axis_name="batch")
        # Or the gradient of what is the same on all devices would be summed already.
        params = jax.lax.pcast(params, "batch", to="varying")
        return optax.microbatching.microbatch(
            jax.grad(loss), argnums=1, microbatch_size=2, accumulator=accumulator
        )(params, x)

    rng = np.random.default_rng(0)
    data = {k: rng.normal(size=(32, *v)).astype("f") for k, v in SHAPES.items()}
    step = on_devices(step, (P(), P("batch")), P())
    assert bytes_reduced(step.lower(zeros(), data).compile()) == expected
    mean = jax.tree.map(lambda x: x.mean(0), data)
    accumulator = fj.compressed_accumulator(sketch(rank, 3))
    alone = accumulator.update(accumulator.init(mean), mean, 0)
    assert_close(step(zeros(), data), accumulator.finalize(alone), "float32")


@pytest.mark.full
@pytest.mark.parametrize("rank", [4, 16])
def test_flora_of_a_compressed_mean(rank):
    # Flora's second moment is of the whole gradient, so the mean comes first, with an
    # S of its own at each step.
    tx = fj.flora(0.1, sketch(), resample_every=None)
    state = tx.init(zeros())

    def step(mean_fn, grads, state):
        return tx.update(mean_fn(local(grads)), state, zeros())

    specs = ((P("batch"), P()), P())
    plain = functools.partial(jax.lax.pmean, axis_name="batch")
    ours = functools.partial(
        fj.compressed_pmean,
        axis_name="batch",
        sketch=sketch(rank, 1),
        step=state[0].count,
    )
    steps = [on_devices(functools.partial(step, f), *specs) for f in (plain, ours)]
    sent = [bytes_reduced(s.lower(gradients(0), state).compile()) for s in steps]
    assert sent == [FULL, SKETCHES if rank == 4 else FULL]
    (expected, _), (updates, _) = (s(gradients(0), state) for s in steps)
    if rank == 16:
        assert_close(updates, expected, "float32")
    else:
        assert not np.allclose(updates["wide"], expected["wide"])
