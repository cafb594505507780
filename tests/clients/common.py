"""What the tests of all trainers share: the transformations, and sizes of states."""

import math

import jax
import numpy as np
import optax

import flora_jax as fj
from flora_jax.leaves.paths import state_leaves

RANK = 64
SKETCH = fj.Sketch(RANK, mask=fj.not_embeddings)
RATE = 3e-3

TRANSFORMATIONS = {
    "adamw": lambda sketch: optax.adamw(RATE),
    "flora": lambda sketch: fj.flora(RATE, sketch),
    "flora_adamw": lambda sketch: fj.flora_adamw(RATE, sketch),
    "flora_muon": lambda sketch: fj.flora_muon(RATE, sketch),
    "galore": lambda sketch: fj.galore(RATE, sketch),
    "apollo": lambda sketch: fj.apollo(RATE, sketch),
    "fira_int8": lambda sketch: fj.fira(RATE, sketch, state_dtype="int8"),
    # In place of the trainer's own accumulation.
    "accumulation": lambda sketch: fj.compressed_accumulation(
        fj.flora_adamw(RATE, sketch), 2, sketch
    ),
}
# How many float32 moments each keeps of a sketched leaf; AdamW keeps two.
MOMENTS = {
    "flora": 1,
    "flora_adamw": 2,
    "flora_muon": 1,
    "galore": 2,
    "apollo": 2,
    "fira_int8": 0.5,
    "accumulation": 3,
}


def shard_bytes(x):
    """Bytes of an array on its first device."""
    return x.addressable_shards[0].data.nbytes


def kernel_bytes(state, params, sketch):
    """Bytes on a device of what belongs to sketched leaves, and of their bases.

    Codes of 8 bits may have a float32 scale for each row of the device's shard besides,
    which is not counted: a sharded row's is on each device.
    """
    plans = {plan.path: plan for plan in sketch.plan(params)}
    kernels, bases = 0, 0
    for leaf, param, field in state_leaves(state, params):
        if param is not None and not plans[param].dense:
            if field == "basis":
                bases += shard_bytes(leaf)
            else:
                kernels += shard_bytes(leaf)
                kernels -= 4 * code_rows(leaf)
    return kernels, bases


def code_rows(x):
    """Number of rows of 8-bit codes in the shard of an array."""
    rows = x.addressable_shards[0].data.shape[:-1]
    return math.prod(rows) if x.dtype.itemsize == 1 else 0


def width_bytes(params, sketch, scale):
    """Σ r/width of AdamW's bytes of the sketched leaves, times scale, on a device."""
    plans, leaves = sketch.plan(params), jax.tree.leaves(params)
    return sum(
        scale * 4 * shard_size(leaf) * plan.rank / plan.width
        for plan, leaf in zip(plans, leaves, strict=True)
        if not plan.dense
    )


def shard_size(x):
    return x.addressable_shards[0].data.size


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]
