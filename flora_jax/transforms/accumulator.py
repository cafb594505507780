"""Gradient accumulation inside of one jitted step, kept as a sketch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation
from flora_jax._typing import AxisNames, PyTree
from flora_jax.leaves import mesh, trees
from flora_jax.projections.count_sketch import CountSketch
from flora_jax.sketching.sketch import Sketch, resolve
from flora_jax.sketching.sketcher import (
    Plans,
    SketchedGradients,
    Sketcher,
    gradient_shapes,
)
from flora_jax.transforms.accumulation import NAME, accumulate, estimate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedAccumulatorCarry:
    """Carry of :func:`compressed_accumulator`.

    Attributes:
      sketches: tree of sketches, one array per gradient leaf.
      key: root key data, uint32 of shape (2,).
      step: index of the cycle, int32; the epoch of the projection.
      plans: static plans of the leaves, in flattening order.
      like: static shapes, dtypes and shardings of the gradient leaves.
    """

    sketches: PyTree
    key: jax.Array
    step: jax.Array
    plans: Plans = dataclasses.field(metadata={"static": True})
    like: tuple[Any, ...] = dataclasses.field(metadata={"static": True})


def compressed_accumulator(
    sketch: Sketch | int,
    *,
    step: jax.typing.ArrayLike = 0,
    use_mean: bool = True,
    axis_name: AxisNames | None = None,
    dtype: Any = "float32",
) -> optax.microbatching.Accumulator:
    """Accumulates gradients of micro-batches as a sketch, for ``optax.microbatch``.

    The same arithmetic as :func:`flora_jax.compressed_accumulation` in its cycle number
    ``step``, in one jitted step that scans over micro-batches and keeps no state.
    It takes gradients, or what :func:`flora_jax.sketched_value_and_grad` returns in
    their place for the same sketch and ``sketch.cycle(step)``. That both have the same
    ``step`` is not checked.

    Memory: r·max(n, m) elements of ``dtype`` per sketched leaf while the scan runs.

    Args:
      sketch: the sketch, or its rank; CountSketch unless it names a projection.
      step: index of the cycle, for example the training step; possibly traced. Without
        it every cycle uses the same projection.
      use_mean: accumulate the mean over micro-batches, or their sum if False.
      axis_name: mesh axes of ``shard_map`` over which the sketches of each device's own
        micro-batches are averaged at the end, in place of gradients. These must be
        taken at ``jax.lax.pcast(params, axis_name, to="varying")``: jax sums those at
        replicated parameters over the devices.
      dtype: dtype of the accumulator; arithmetic is in float32.

    Returns:
      An ``optax.microbatching.Accumulator``; it returns gradients in their own dtype.

    Raises:
      TypeError: for arguments of a wrong type.
      ValueError: for arguments out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import flora_jax as fj
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> @jax.jit
      ... def gradient(w, x, step):
      ...   accumulator = fj.compressed_accumulator(fj.Sketch(16), step=step)
      ...   grad = optax.microbatching.microbatch(
      ...       jax.grad(loss), argnums=1, microbatch_size=2, accumulator=accumulator)
      ...   return grad(w, x)
      >>> gradient(jnp.ones((128, 256)), jnp.ones((8, 128)), 0).shape
      (128, 256)
    """
    _validation.check_axis_name("axis_name", axis_name)
    dtype = _validation.check_state_dtype(dtype)
    sketcher = Sketcher(NAME, resolve(sketch, CountSketch("unbiased")))
    cycle = sketcher.sketch.cycle(step)

    def init(gradients: PyTree) -> PyTree:
        plans = sketcher.plan(gradients)
        gradients = gradient_shapes(gradients)
        sketches = trees.zero_sketches(gradients, plans, dtype)
        return CompressedAccumulatorCarry(
            # They will differ from device to device.
            sketches=mesh.varying(sketches, axis_name),
            key=jnp.asarray(cycle.key),
            step=cycle.cycle,
            plans=plans,
            like=tuple(
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.typeof(x).sharding)
                for x in jax.tree.leaves(gradients)
            ),
        )

    def update(carry: PyTree, gradients: PyTree, index: Any) -> PyTree:
        plans = sketcher.plan(gradients)
        shapes = [plan.state_shape for plan in plans]
        old = trees.matching_leaves(
            "compressed_accumulator", "sketches", carry.sketches, plans, shapes
        )
        sampled, grads = [None] * len(plans), jax.tree.leaves(gradients)
        if not isinstance(gradients, SketchedGradients):
            sampled = sketcher.sample(plans, carry.key, carry.step)
        add = functools.partial(accumulate, sketcher, plans, use_mean, None)
        new = trees.run_sharded(add, old, sampled, grads, old, index)
        return dataclasses.replace(carry, sketches=trees.rebuild(carry.sketches, new))

    def finalize(carry: PyTree) -> PyTree:
        # The S that `update` sketched with: key and step are the same all through.
        sampled = sketcher.sample(carry.plans, carry.key, carry.step)
        mean = functools.partial(estimate, sketcher, carry.plans, axis_name)
        acc, like = jax.tree.leaves(carry.sketches), list(carry.like)
        leaves = trees.run_sharded(mean, like, sampled, acc)
        return trees.rebuild(carry.sketches, list(map(trees.cast_like, leaves, like)))

    def aggregate(gradients: PyTree) -> PyTree:
        reduce = jnp.mean if use_mean else jnp.sum
        return jax.tree.map(lambda leaf: reduce(leaf, axis=0), gradients)

    return optax.microbatching.Accumulator(init, update, finalize, aggregate)
