"""The sketched accumulator inside one jitted step, for optax.microbatching."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation as _checks
from flora_jax.random import keys as _keys
from flora_jax.leaves import mesh as _mesh
from flora_jax.leaves import trees as _state
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.rules import LeafRules
from flora_jax.projections import CountSketch, Projection
from flora_jax.transforms.accumulation import NAME
from flora_jax.sketching.sketcher import Sketcher, accumulate, estimate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedAccumulatorCarry:
    """Carry of :func:`compressed_accumulator`.

    Attributes:
      sketches: tree of sketches, one array per gradient leaf.
      key: root key data, uint32 of shape (2,).
      step: number of the cycle, int32; the epoch of the projection.
      plans: static plans of the leaves, in flattening order.
      like: static shapes, dtypes and shardings of the gradient leaves.
    """

    sketches: Any
    key: jax.Array
    step: jax.Array
    plans: tuple[LeafPlan, ...] = dataclasses.field(metadata={"static": True})
    like: tuple[Any, ...] = dataclasses.field(metadata={"static": True})


def compressed_accumulator(
    rank: Any,
    *,
    key: Any,
    step: jax.typing.ArrayLike = 0,
    use_mean: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
    projection: Projection = CountSketch(),  # noqa: B008 (frozen)
    mask: Any = None,
    min_dim_size: int = 128,
    max_aspect_ratio: float = 16,
    side: str = "smaller",
    weight_dimension_numbers: Any = None,
    dtype: Any = jnp.float32,
) -> optax.microbatching.Accumulator:
    """Accumulates gradients of micro-batches as a sketch, for ``optax.microbatch``.

    The same numbers as :func:`flora_jax.compressed_accumulation` in its cycle number
    ``step``, in one jitted step that scans over micro-batches: no state outlives it.
    It takes gradients, or what :func:`flora_jax.sketched_value_and_grad` with the same
    key, step, projection and rules returns in their place.

    Memory: r·max(n, m) numbers of ``dtype`` per sketched leaf while the scan runs.

    Args:
      rank: sketch size r; an int, a callable of (path, shape), or a tree of ints.
      key: int seed, typed threefry2x32 key, or its key data; possibly traced. There is
        no default: one key and step for ever would be one projection for ever.
      step: number of the cycle, for example the training step; possibly traced.
      use_mean: accumulate the mean over micro-batches, or their sum if False.
      axis_name: mesh axes of ``shard_map`` over which the sketches of each device's own
        micro-batches are averaged at the end, in place of gradients. These must be
        taken at ``jax.lax.pcast(params, axis_name, to="varying")``: jax sums those at
        replicated parameters over the devices.
      projection: how leaves are sketched; ``Gaussian()`` is the paper's.
      mask: which leaves may be sketched; see :func:`flora_jax.plan_leaves`.
      min_dim_size: smallest side of a matrix that is sketched.
      max_aspect_ratio: largest ratio of its sides.
      side: which side is sketched.
      weight_dimension_numbers: which axes form the matrix, in optax's convention.
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
      ...   accumulator = fj.compressed_accumulator(rank=16, key=0, step=step)
      ...   grad = optax.microbatching.microbatch(
      ...       jax.grad(loss), argnums=1, microbatch_size=2, accumulator=accumulator)
      ...   return grad(w, x)
      >>> gradient(jnp.ones((128, 256)), jnp.ones((8, 128)), 0).shape
      (128, 256)
    """
    _checks.check_axis_name("axis_name", axis_name)
    dtype = _checks.check_state_dtype(dtype)
    root = _keys.raw_key(key)
    rules = LeafRules(
        rank, mask, min_dim_size, max_aspect_ratio, side, weight_dimension_numbers
    )
    sketcher = Sketcher(NAME, rules, projection)
    if not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise TypeError(
            f"`step` must be an integer, got step={step}; pass the number of the cycle"
        )

    def init(gradients: Any) -> Any:
        plans, gradients = sketcher.planned(gradients)
        sketches = _state.zeros_tree(gradients, [p.state_shape for p in plans], dtype)
        # They will differ from device to device.
        sketches = _mesh.varying(sketches, axis_name)
        return CompressedAccumulatorCarry(
            sketches=sketches,
            key=jnp.array(root),
            step=jnp.asarray(step, jnp.int32),
            plans=tuple(plans),
            like=tuple(
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.typeof(x).sharding)
                for x in jax.tree.leaves(gradients)
            ),
        )

    def update(carry: Any, gradients: Any, index: Any) -> Any:
        plans, _ = sketcher.planned(gradients)
        old = _state.matching_leaves(
            "compressed_accumulator",
            "sketches",
            carry.sketches,
            plans,
            [p.state_shape for p in plans],
        )
        new = _state.run_sharded(
            functools.partial(accumulate, sketcher, plans, use_mean),
            old,
            jax.tree.leaves(gradients),
            old,
            carry.key,
            index,
            carry.step,
        )
        return dataclasses.replace(carry, sketches=_state.rebuild(carry.sketches, new))

    def finalize(carry: Any) -> Any:
        leaves = jax.tree.leaves(carry.sketches)
        leaves = _state.run_sharded(
            functools.partial(estimate, sketcher, carry.plans, axis_name),
            list(carry.like),
            leaves,
            carry.key,
            carry.step,
        )
        cast = [x.astype(t.dtype) for x, t in zip(leaves, carry.like, strict=True)]
        return _state.rebuild(carry.sketches, cast)

    def aggregate(gradients: Any) -> Any:
        reduce = jnp.mean if use_mean else jnp.sum
        return jax.tree.map(lambda leaf: reduce(leaf, axis=0), gradients)

    return optax.microbatching.Accumulator(init, update, finalize, aggregate)
