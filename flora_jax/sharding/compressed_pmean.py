"""A mean over devices that sends sketches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flora_jax._typing import AxisNames, PyTree
from flora_jax.leaves.trees import matching_leaves, rebuild
from flora_jax.projections.count_sketch import CountSketch
from flora_jax.sketching.sketch import Sketch, resolve
from flora_jax.sketching.sketcher import ScaledLeaf, Sketcher, refuse_sketches

_NAME = "compressed_pmean"


def compressed_pmean(
    grads: PyTree,
    axis_name: AxisNames,
    sketch: Sketch | int,
    *,
    step: jax.typing.ArrayLike,
    error: PyTree = None,
) -> PyTree:
    """``jax.lax.pmean`` of gradients, to which each device sends a sketch of its own.

    A mean of sketches is the sketch of the mean: with G_d the gradient of device d and
    one S on all of them, ((1/D) Σ_d G_d Sᵀ) S is what the sketch of the mean gradient
    stands for, unbiased with an ``"unbiased"`` projection. For a sketched leaf r·n
    elements are all-reduced in place of n·m.

    With error feedback each device keeps what its own sketch has left out, adds it to
    its next gradient, and nothing is lost for good: A_d = G_d + E_d takes G_d's place
    and E_d ← A_d − A_d Sᵀ S. That needs an ``"isometric"`` projection; the estimate is
    then no longer unbiased at each step.

    Args:
      grads: gradients of this device, inside ``jax.shard_map`` (or ``jax.vmap`` with
        ``axis_name``); taken at ``jax.lax.pcast(params, axis_name, to="varying")``, as
        jax sums those at replicated parameters over the devices.
      axis_name: mesh axes to reduce over.
      sketch: how leaves are sketched, or the rank r; the same on all devices. By
        default with CountSketch, isometric if there is an ``error``, else unbiased.
      step: index of the step, an int or an int32 scalar; each has an S of its own.
      error: None, or the tree of E_d, of the gradients' structure, shapes and float32;
        zeros at first, and a different one on each device.

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
      ...     fj.compressed_pmean, axis_name="batch", sketch=32, step=0)
      >>> grads = {"w": jnp.ones((8, 256, 512))}  # of eight devices
      >>> total = jax.vmap(mean, axis_name="batch")(grads)
      >>> total["w"].shape
      (8, 256, 512)
    """
    normalization = "unbiased" if error is None else "isometric"
    sketcher = Sketcher(_NAME, resolve(sketch, CountSketch(normalization)))
    if error is not None and sketcher.projection.normalization != "isometric":
        raise ValueError(
            f"`error` needs an isometric projection, got {sketcher.projection}: what an"
            " unbiased estimate leaves out grows; use"
            " CountSketch(normalization='isometric')"
        )
    refuse_sketches(
        _NAME, grads, "it sketches by itself; average them with jax.lax.pmean", "grads"
    )
    plans, leaves = sketcher.plan(grads), jax.tree.leaves(grads)
    left: list[Any] = [None] * len(plans)
    if error is not None:
        shapes = [plan.shape for plan in plans]
        left = matching_leaves(_NAME, "error", error, plans, shapes)
    samples = sketcher.sample(plans, jnp.asarray(sketcher.sketch.key_data), step)
    estimates, errors = [], []
    for plan, sampled, leaf, kept in zip(plans, samples, leaves, left, strict=True):
        total = leaf if kept is None else leaf.astype(jnp.float32) + kept
        own = sketcher.sketch_leaf(plan, sampled, ScaledLeaf(total))
        mean = sketcher.unsketch_leaf(plan, sampled, jax.lax.pmean(own, axis_name))
        estimates.append(mean.astype(leaf.dtype))
        # E_d ← A_d − A_d Sᵀ S: what this device's own sketch leaves out.
        if kept is not None:
            errors.append(total - sketcher.unsketch_leaf(plan, sampled, own))
    means = rebuild(grads, estimates)
    return means if error is None else (means, rebuild(error, errors))
