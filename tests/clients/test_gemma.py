"""flax's examples/gemma: its model, mesh and training step, on one and eight devices.

The example is in flax's source distribution, whose folder FLAX_SOURCE names.
"""

import functools
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from tests.clients.common import (
    MOMENTS,
    SKETCH,
    TRANSFORMATIONS,
    bits,
    kernel_bytes,
    width_bytes,
)

sys.path.insert(0, str(pathlib.Path(os.environ["FLAX_SOURCE"]) / "examples" / "gemma"))

import train as gemma  # noqa: E402
import transformer  # noqa: E402
from transformer_cfg import ShardingConfig  # noqa: E402

STEPS = 4
# As the example's own tiny configuration, with two of its layers.
SIZES = {
    "num_layers": 2,
    "embed_dim": 256,
    "hidden_dim": 512,
    "num_heads": 4,
    "head_dim": 128,
    "num_kv_heads": 1,
    "use_post_attn_norm": False,
    "use_post_ffw_norm": False,
    "attention_types": (1, 1),
    "final_logit_softcap": None,
}
every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


def mesh(devices, tensor=1):
    """Of Explicit axes, as the example's."""
    shape, used = (devices // tensor, tensor), jax.devices()[:devices]
    return jax.make_mesh(shape, ("fsdp", "tensor"), devices=used)


class Run:
    """Model, optimizer and compiled step, made as the example makes them."""

    def __init__(self, name, where):
        layout = ShardingConfig.fsdp_tp_sharding(
            fsdp_axis_name="fsdp", tensor_parallel_axis_name="tensor"
        )
        config = transformer.TransformerConfig.from_dict(
            **SIZES, num_embed=256, dtype=jnp.float32, shd_config=layout
        )
        self.where, self.losses = where, []
        self.rngs = nnx.Rngs(params=0, dropout=0)
        with jax.set_mesh(where):
            self.model = transformer.Transformer(config, rngs=self.rngs)
            tx = TRANSFORMATIONS[name](SKETCH)
            self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)
        self.metrics = nnx.MultiMetric(
            loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy()
        )
        self.step = jax.jit(gemma.jax_train_step)

    def train(self, steps):
        """One batch again and again: its loss falls from the first update on."""
        tokens = np.random.default_rng(0).integers(1, 256, (8, 17), dtype=np.int32)
        sharding = jax.NamedSharding(self.where, jax.P("fsdp"))
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
        batch |= {"inputs_position": positions}
        batch |= {"inputs_segmentation": np.ones((8, 16), np.int32)}
        batch = jax.device_put(batch, sharding)
        parts = self.model, self.optimizer, self.rngs
        with jax.set_mesh(self.where):
            for _ in range(steps):
                self.metrics.reset()
                state, _ = self.step(*parts, batch, self.metrics)
                nnx.update((*parts, self.metrics), state)
                self.losses.append(float(self.metrics.compute()["loss"]))

    def state(self):
        """What the example saves."""
        return {
            "model": nnx.state(self.model),
            "optimizer": nnx.state(self.optimizer),
        }


@functools.cache
def trained(name, devices, tensor=1):
    run = Run(name, mesh(devices, tensor))
    run.train(STEPS)
    return run


@every_transformation
def test_eight_devices_train_as_one_does(name):
    one, eight = trained(name, 1), trained(name, 8)
    assert eight.losses[-1] < eight.losses[0]
    np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-4)
    assert eight.step._cache_size() <= trained("adamw", 8).step._cache_size()


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", MOMENTS)
def test_a_device_holds_its_share(name, tensor):
    run = trained(name, 8, tensor)
    params = nnx.state(run.model, nnx.Param)
    kernels, bases = kernel_bytes(run.optimizer.opt_state, params, SKETCH)
    print(f"{name}, {tensor}-way tensor parallel: {kernels} and {bases} bytes")
    assert 0 < kernels <= 1.15 * width_bytes(params, SKETCH, MOMENTS[name])
    assert bases <= 1.15 * width_bytes(params, SKETCH, 1)


@every_transformation
def test_a_resumed_run_equals_the_unbroken_one(name, tmp_path):
    first = Run(name, mesh(8))
    first.train(2)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(2, args=ocp.args.StandardSave(first.state()))
        manager.wait_until_finished()
        second = Run(name, mesh(8))
        target = ocp.args.StandardRestore(second.state())
        restored = manager.restore(2, args=target)
    nnx.update(second.model, restored["model"])
    nnx.update(second.optimizer, restored["optimizer"])
    second.train(2)
    assert second.losses == trained(name, 8).losses[2:]
    assert bits(second.state()) == bits(trained(name, 8).state())
