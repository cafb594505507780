"""Stacked leaves, a few layers at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax._typing import PyTree
from flora_jax._xla import is_sharded
from flora_jax.leaves.mesh import common_shards, is_manual
from flora_jax.leaves.plan import LeafPlan


def loop_steps(plan: LeafPlan, on_one_device: bool = False) -> int:
    """In how many steps a loop goes over a leaf's layers; 0 if there is no loop.

    Args:
      plan: the leaf's plan.
      on_one_device: whether there is one without a mesh as well.
    """
    if not plan.batch_axes or not (is_sharded() or on_one_device):
        return 0
    layers = plan.shape[plan.batch_axes[0]]
    steps, rest = divmod(layers, plan.layer_shards or common_shards(layers))
    return 0 if rest or steps == 1 else steps


def by_layers(
    fn: Callable[..., PyTree],
    plan: LeafPlan,
    arrays: PyTree,
    folded: PyTree = None,
    renewed: PyTree = None,
    on_one_device: bool = False,
) -> tuple[PyTree, PyTree]:
    """``fn(plan, arrays, folded, renewed)`` of a leaf, layer by layer on a mesh.

    To sum up a sketch over devices, or to expand it, each device holds all of its rank:
    in a loop that of one layer, and not that of the full leaf. Layers on different
    devices are taken together. If nobody has said whether the mesh shards their axis,
    those are that would be on different devices.

    Args:
      fn: a function of the plan of some layers, and of their part of the arrays. It
        returns new ``renewed``, and other arrays of the leaf's number of axes.
      plan: the leaf's plan.
      arrays: of the leaf's number of axes: its shape, a sketch's, or ones on axes that
        are reduced; scalars are passed as they are.
      folded: arrays whose first axes are the batch axes, as those of a fold are; of
        size 1 for what all layers share.
      renewed: arrays like ``arrays``, of which those that ``fn`` returns take the
        place, in their memory.
      on_one_device: whether to do so without a mesh as well.

    Returns:
      What ``fn`` would return for all layers.
    """
    if not (steps := loop_steps(plan, on_one_device)):
        return fn(plan, arrays, folded, renewed)
    axis = plan.batch_axes[0]
    layers = plan.shape[axis]
    # An axis that is sharded is so along the first of these two.
    together = layers // steps
    sizes = [*plan.shape]
    sizes[axis] = together
    part = dataclasses.replace(plan, shape=tuple(sizes), layer_shards=together)

    def split(x: jax.Array, axis: int) -> jax.Array:
        return x.reshape(*x.shape[:axis], together, steps, *x.shape[axis + 1 :])

    def at(i: Any, x: Any, axis: int = axis) -> Any:
        if jnp.ndim(x) <= axis or x.shape[axis] == 1:
            return x
        index = jax.lax.dynamic_index_in_dim
        return index(split(x, axis), i, axis + 1, keepdims=False)

    def run(i: Any, renewed: PyTree) -> PyTree:
        own, new = jax.tree.map(functools.partial(at, i), (arrays, renewed))
        return fn(part, own, jax.tree.map(lambda x: at(i, x, 0), folded), new)

    def step(i: Any, full: tuple[PyTree, PyTree]) -> PyTree:
        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            update = jax.lax.dynamic_update_index_in_dim
            return update(split(x, axis), new, i, axis + 1).reshape(x.shape)

        return jax.tree.map(put, full, run(i, full[0]))

    def empty(x: jax.Array) -> jax.Array:
        sizes = [*x.shape]
        sizes[axis] = layers
        # Inside of jax.shard_map it varies over the same axes of the mesh as x.
        return jax.lax.full_like(x, 0, shape=sizes)

    def matched(x: jax.Array, new: jax.Array) -> jax.Array:
        return x * jax.lax.full_like(new, 1, shape=())

    # Of one step the types alone are wanted; the compiler drops the rest.
    new, others = run(0, renewed)
    if is_manual():
        renewed = jax.tree.map(matched, renewed, new)
    full = renewed, jax.tree.map(empty, others)
    return jax.lax.fori_loop(0, steps, step, full)
