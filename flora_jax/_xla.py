"""Whether the compiler may shard arrays, and workarounds for it.

:func:`unshared` is obsolete once ``test_a_step_writes_no_second_copy_of_a_gradient``
(``tests/optimizers/test_flora.py``) passes without it, :func:`unstacked` once
``tests/conformance/test_compilation.py`` does. ``tests/compilers`` measures what
:func:`renewed_if` and :func:`scan_without_early_buffers` save. No test measures what
the others save: memory for bfloat16 leaves and of activations on a GPU, and the time of
hashing.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax._typing import PyTree

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def widened(leaf: Float[Array, "..."]) -> Float[Array, "..."]:
    """The leaf in float32, on CPU not shared with other readers of its float32 form.

    There XLA would widen a bfloat16 leaf once and write it to memory for all of its
    readers; behind a barrier each of them widens what it reads as it goes.
    """
    return leaf if leaf.dtype == jnp.float32 else unshared(leaf).astype(jnp.float32)


def unshared(tree: PyTree) -> PyTree:
    """The same arrays, which XLA does not recognize as the same on CPU.

    There XLA writes an operand of two reductions to memory (such as a product that both
    square) but fuses the operand of one. For a TPU both are one pass over it.
    """
    return jax.lax.platform_dependent(
        tree, cpu=jax.lax.optimization_barrier, default=_as_it_is
    )


def materialized(tree: PyTree) -> PyTree:
    """The same arrays, written to memory before anything reads them.

    XLA would fuse the hash behind a sign or an index into each loop that reads one, and
    compute it anew for every element of the gradient.
    """
    return jax.lax.platform_dependent(
        tree, cpu=_negated_twice, default=jax.lax.optimization_barrier
    )


def is_sharded() -> bool:
    """Whether the compiler may shard arrays here, over the axes of a mesh."""
    # Manual axes do not count: inside of shard_map each device has its own array.
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind is jax.sharding.AxisType.Auto for size, kind in kinds)


def unstacked(tree: PyTree) -> list[PyTree]:
    """The rows of stacked arrays; what reads them shares compiled kernels.

    XLA does not know a row's index: slices at constant indices would be fused into what
    reads them, and each such kernel compiled by itself. The index stays constant on
    meshes of TPUs, where int8 moments would take more memory, and on GPUs, where the
    rows are written to memory instead: a hidden index takes longer to compile.
    """
    (size,) = {x.shape[0] for x in jax.tree.leaves(tree)}
    places: list[Any] = [np.int32(i) for i in range(size)]
    if size > 1:
        barrier = _as_it_is if is_sharded() else jax.lax.optimization_barrier
        places = jax.lax.platform_dependent(
            places, cpu=_negated_twice, tpu=barrier, default=_as_it_is
        )
    take = functools.partial(
        jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False
    )
    rows = [
        jax.tree.map(functools.partial(take, index=place), tree) for place in places
    ]
    return _behind_barrier_on_gpus(rows) if size > 1 else rows


def renewed_if(
    due: jax.Array, renew: Callable[[jax.Array, PyTree], PyTree], old: PyTree
) -> PyTree:
    """``renew(0, old)`` if that is due, else ``old``.

    A loop of one iteration or none: a branch would return a copy of ``old``. XLA moves
    out of the loop, and so into every step, what depends neither on ``old`` nor on the
    index, which is that 0: let all that is expensive depend on it.

    Args:
      due: a bool scalar.
      renew: returns a tree of the same structure, shapes and dtypes.
      old: a tree of arrays.
    """
    return jax.lax.fori_loop(0, due.astype(jnp.int32), renew, old)


def scan_without_early_buffers(
    body: Callable[[list[Any], list[Any]], tuple[list[Any], list[Any]]],
    start: list[Any],
    slices: list[Any],
    length: int,
    *settings: Any,
) -> tuple[list[Any], list[Any]]:
    """``jax.lax.scan`` whose stacked outputs are not allocated before the loop starts.

    On a GPU XLA allocates a loop's zero-filled output buffers as early as it can, those
    of the backward pass during the forward pass. Here what fills them depends on the
    loop's inputs; every element is overwritten.

    Args:
      body: as for ``jax.lax.scan``.
      start: the first carry.
      slices: arrays, or none.
      length: number of iterations.
      *settings: ``reverse`` and ``unroll``.
    """
    if not length or not jax.sharding.get_abstract_mesh().empty:
        # On a mesh a carried buffer would have to be sharded as the loop leaves it.
        return jax.lax.scan(body, start, slices, length, *settings)
    _, like = jax.eval_shape(lambda c, xs: body(c, [x[0] for x in xs]), start, slices)
    places = [k for k, y in enumerate(like) if jnp.issubdtype(y.dtype, jnp.inexact)]
    known = [x for x in start if jnp.issubdtype(x.dtype, jnp.inexact) and x.size]
    firsts = [x[(0,) * x.ndim].real.astype(jnp.float32) for x in known]
    filled = sum(firsts, jnp.zeros([], jnp.float32))
    buffers = [
        jnp.full((length, *like[k].shape), filled.astype(like[k].dtype)) for k in places
    ]

    def step(carry: Any, x: Any) -> tuple[Any, list[Any]]:
        (state, buffers), (i, x) = carry, x
        state, ys = body(state, x)
        write = jax.lax.dynamic_update_index_in_dim
        buffers = [
            write(to, ys[k], i, 0) for to, k in zip(buffers, places, strict=True)
        ]
        return (state, buffers), [y for k, y in enumerate(ys) if k not in places]

    steps = jnp.arange(length), slices
    (last, buffers), others = jax.lax.scan(
        step, (start, buffers), steps, length, *settings
    )
    found, rest = iter(buffers), iter(others)
    return last, [next(found if k in places else rest) for k in range(len(like))]


def computed_first(value: PyTree, derived: PyTree) -> tuple[PyTree, PyTree]:
    """A value, and what is derived from it before anything else reads it on a GPU.

    There XLA fuses the kernels that sketch the activations of many layers into one, and
    keeps the activations until it runs. On a TPU it recomputes activations inside the
    products that read them, which a barrier would prevent.
    """
    return _behind_barrier_on_gpus((value, derived))


def _behind_barrier_on_gpus(tree: PyTree) -> PyTree:
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(
        tree, cuda=barrier, rocm=barrier, default=_as_it_is
    )


def _as_it_is(tree: PyTree) -> PyTree:
    return tree


def _negated_twice(tree: PyTree) -> PyTree:
    """What XLA does on CPU: it drops barriers before it fuses, but not a loop."""
    return jax.lax.fori_loop(
        0, 2, lambda _, arrays: jax.tree.map(operator.neg, arrays), tree
    )
