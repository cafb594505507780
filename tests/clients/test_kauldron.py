"""Kauldron's Trainer with Linen parameters, sharded and replicated on eight devices."""

import functools
import itertools

import numpy as np
import pytest
from flax import linen as nn
from kauldron import kd

from tests.clients.common import (
    MOMENTS,
    SKETCH,
    TRANSFORMATIONS,
    bits,
    kernel_bytes,
    shard_size,
    width_bytes,
)

STEPS = 4
every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


class Model(nn.Module):
    """Two kernels that are sketched: of 256 x 512 and 512 x 256."""

    x: kd.kontext.Key = kd.kontext.REQUIRED

    @nn.compact
    def __call__(self, x):
        return nn.Dense(256)(nn.relu(nn.Dense(512)(x)))


def examples():
    """One batch again and again: its loss falls from the first update on."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(8, 256)).astype(np.float32) for _ in range(2))
    return {"x": np.tile(x, (STEPS, 1)), "y": np.tile(y, (STEPS, 1))}


def trainer(tx, sharded=True, workdir="/unused", **checkpoints):
    fsdp = kd.sharding.FSDPSharding(min_size_to_shard_mb=0)
    layout = {"params": fsdp, "opt_state": fsdp} if sharded else {}
    return kd.train.Trainer(
        seed=0,
        workdir=workdir,
        train_ds=kd.data.InMemoryPipeline(loader=examples, batch_size=8),
        model=Model(x="batch.x"),
        num_train_steps=STEPS,
        train_losses={"loss": kd.losses.L2(preds="preds", targets="batch.y")},
        optimizer=tx,
        sharding=kd.sharding.ShardingStrategy(**layout),
        **checkpoints,
    )


def step(this, state, batch):
    state, aux = this.trainstep.step(state, batch, return_losses=True)
    return state, float(np.asarray(aux.compute().loss_values["losses/loss"]))


def batches(this):
    # The pipeline repeats its examples without end.
    endless = this.train_ds.device_put(this.sharding.batch)
    return itertools.islice(endless, STEPS)


@functools.cache
def trained(name, sharded=True):
    this = trainer(TRANSFORMATIONS[name](SKETCH), sharded)
    state, losses = this.init_state(), []
    for batch in batches(this):
        state, loss = step(this, state, batch)
        losses.append(loss)
    return state, losses


@every_transformation
def test_shards_train_as_replicas_do(name):
    (state, sharded), (_, replicated) = trained(name), trained(name, sharded=False)
    assert len(sharded) == STEPS
    assert sharded[-1] < sharded[0]
    np.testing.assert_allclose(sharded, replicated, rtol=1e-4)
    kernel = state.params["Dense_0"]["kernel"]
    assert shard_size(kernel) == kernel.size // 8


@pytest.mark.parametrize("name", MOMENTS)
def test_a_device_holds_its_share(name):
    state, _ = trained(name)
    kernels, bases = kernel_bytes(state.opt_state, state.params, SKETCH)
    print(f"{name}: {kernels} and {bases} bytes")
    assert 0 < kernels <= 1.15 * width_bytes(state.params, SKETCH, MOMENTS[name])
    assert bases <= 1.15 * width_bytes(state.params, SKETCH, 1)


@every_transformation
def test_a_resumed_run_equals_the_unbroken_one(name, tmp_path):
    def make():
        checkpointer = kd.ckpts.Checkpointer(save_interval_steps=1)
        tx = TRANSFORMATIONS[name](SKETCH)
        return trainer(tx, workdir=tmp_path, checkpointer=checkpointer)

    first, second = make(), make()
    state, losses = first.init_state(), []
    for number, batch in enumerate(batches(first)):
        if number == STEPS // 2:
            first.checkpointer.save(state, step=number)
            first.checkpointer.wait_until_finished()
            state = second.checkpointer.restore(second.init_state())
        state, loss = step(first if number < STEPS // 2 else second, state, batch)
        losses.append(loss)
    expected, unbroken = trained(name)
    assert losses == unbroken
    assert bits(state) == bits(expected)
