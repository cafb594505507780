"""A mean over devices that sends sketches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.random import keys as _keys
from flora_jax.leaves import trees as _state
from flora_jax.leaves.rules import LeafRules
from flora_jax.projections import CountSketch, ObliviousProjection
from flora_jax.transforms.parts import ScaledLeaf
from flora_jax.sketching.sketcher import Sketcher
from flora_jax.sketching.sketched_gradients import refuse_sketches

_NAME = "compressed_pmean"


def compressed_pmean(
    grads: Any,
    axis_name: Any,
    rank: Any,
    *,
    key: Any,
    step: Any,
    error: Any = None,
    projection: ObliviousProjection = CountSketch(),  # noqa: B008 (frozen)
    mask: Any = None,
    min_dim_size: int = 128,
    max_aspect_ratio: float = 16,
    side: str = "smaller",
    weight_dimension_numbers: Any = None,
) -> Any:
    """``jax.lax.pmean`` of gradients, of which each device sends a sketch.

    A mean of sketches is the sketch of the mean: with G_d the gradient of device d and
    one S on all of them, ((1/D) Σ_d G_d Sᵀ) S is what the sketch of the mean gradient
    stands for, unbiased with an ``"unbiased"`` projection. For a sketched leaf r·n
    numbers are reduced in place of n·m.

    With error feedback each device keeps what its own sketch has left out, adds it to
    its next gradient, and nothing is lost for good: A_d = G_d + E_d takes G_d's place
    and E_d ← A_d − A_d Sᵀ S. That needs an ``"isometric"`` projection; the estimate is
    then no longer unbiased at each step.

    Args:
      grads: gradients of this device, inside ``jax.shard_map`` (or ``jax.vmap`` with
        ``axis_name``); taken at ``jax.lax.pcast(params, axis_name, to="varying")``, as
        jax sums those at replicated parameters over the devices.
      axis_name: mesh axes to reduce over.
      rank: sketch size r; an int, a callable of (path, shape), or a tree of ints.
      key: int seed, typed threefry2x32 key, or its key data; the same on all devices.
      step: number of the step, an int or an int32 scalar; draws a fresh S.
      error: None, or the tree of E_d, of the gradients' structure, shapes and float32;
        zeros at first, and a different one on each device.
      projection: how leaves are sketched; regenerated from the key.
      mask: which leaves may be sketched; see :func:`flora_jax.plan_leaves`.
      min_dim_size: smallest side of a matrix that is sketched.
      max_aspect_ratio: largest ratio of its sides.
      side: which side is sketched.
      weight_dimension_numbers: which axes form the matrix, in optax's convention.

    Returns:
      The mean gradients, in the gradients' dtypes, the same on all devices; with
      ``error``, a pair of them and the new errors.

    Raises:
      TypeError: for arguments of a wrong type.
      ValueError: for arguments out of range, an ``error`` that does not fit the
        gradients, or error feedback with a projection that is not isometric.

    Example:
      >>> import functools
      >>> import jax, jax.numpy as jnp
      >>> import flora_jax as fj
      >>> mean = functools.partial(
      ...     fj.compressed_pmean, axis_name="batch", rank=32, key=0, step=0)
      >>> grads = {"w": jnp.ones((8, 256, 512))}  # of eight devices
      >>> total = jax.vmap(mean, axis_name="batch")(grads)
      >>> total["w"].shape
      (8, 256, 512)
    """
    rules = LeafRules(
        rank, mask, min_dim_size, max_aspect_ratio, side, weight_dimension_numbers
    )
    sketcher = Sketcher(_NAME, rules, projection)
    if error is not None and projection.scale != "isometric":
        raise ValueError(
            f"`error` needs an isometric projection, got {projection}: what an unbiased"
            " estimate leaves out grows; use CountSketch(scale='isometric')"
        )
    refuse_sketches(
        _NAME, grads, "it sketches by itself; average them with jax.lax.pmean", "grads"
    )
    plans, leaves = rules.plan(grads), jax.tree.leaves(grads)
    left: list[Any] = [None] * len(plans)
    if error is not None:
        shapes = [plan.shape for plan in plans]
        left = _state.matching_leaves(_NAME, "error", error, plans, shapes)
    drawn = sketcher.draw(plans, jnp.asarray(_keys.raw_key(key)), step)
    estimates, errors = [], []
    for plan, basis, leaf, kept in zip(plans, drawn, leaves, left, strict=True):
        whole = leaf if kept is None else leaf.astype(jnp.float32) + kept
        sketch = sketcher.sketch(plan, basis, ScaledLeaf(whole))
        mean = sketcher.unsketch(plan, basis, jax.lax.pmean(sketch, axis_name))
        estimates.append(mean.astype(leaf.dtype))
        if kept is not None:
            errors.append(whole - sketcher.unsketch(plan, basis, sketch))
    means = _state.rebuild(grads, estimates)
    return means if error is None else (means, _state.rebuild(error, errors))
