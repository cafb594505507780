"""Gradient accumulation over calls, kept as a sketch (the paper's Algorithm 1)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation
from flora_jax._typing import AxisNames, PyTree
from flora_jax._xla import renewed_if
from flora_jax.leaves import trees
from flora_jax.leaves.boxes import unboxed
from flora_jax.leaves.in_place import APPLY
from flora_jax.leaves.layers import loop_steps
from flora_jax.leaves.plan import LeafPlan
from flora_jax.projections.count_sketch import CountSketch
from flora_jax.random.keys import check_state_key
from flora_jax.sketching.sketch import Sketch, check_leaves, resolve
from flora_jax.sketching.sketcher import (
    Expansion,
    OnSketch,
    Plans,
    ScaledLeaf,
    SketchedGradients,
    Sketcher,
    SketchEvent,
    gradient_shapes,
)
from flora_jax.transforms.apply import apply_updates_of

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Of the accumulator too: the same projections for the same key and cycle.
NAME = "compressed_accumulation"
# (updates, gradient_step, params) to a bool scalar and a tree to keep, as in optax.
SkipFn = Callable[..., tuple[Any, PyTree]]


class CompressedAccumulationState(NamedTuple):
    """State of :func:`compressed_accumulation`; fields as in ``optax.MultiStepsState``.

    Attributes:
      mini_step: micro-steps accumulated in this cycle, int32.
      gradient_step: finished cycles, int32; also the epoch of the projection.
      inner_opt_state: state of the inner transformation.
      acc_grads: tree of sketches, one array per parameter leaf.
      skip_state: what ``should_skip_update_fn`` returned last.
      key: root key data, uint32 of shape (2,); it never changes.
      spec: what the state means, for :func:`flora_jax.verify_state`.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_opt_state: PyTree
    acc_grads: PyTree
    skip_state: PyTree
    key: jax.Array
    spec: jax.Array


def compressed_accumulation(
    inner: optax.GradientTransformation,
    every_k: int | jax.Array | Callable[[Any], Any],
    sketch: Sketch | int,
    *,
    use_grad_mean: bool = True,
    should_skip_update_fn: SkipFn | None = None,
    axis_name: AxisNames | None = None,
    dtype: Any = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Accumulates the gradients of k micro-steps as a sketch, then updates once.

    In place of ``optax.MultiSteps``. Each cycle samples a fresh S; for a leaf folded to
    G (n x m) with its columns sketched, micro-step i = 0…k−1 does

      C ← C + (G_i Sᵀ − C)/(i+1),

    and the last one gives C S, an estimate of the mean gradient (unbiased, unless the
    projection is isometric), to ``inner``. Other micro-steps return zeros and leave
    ``inner`` alone: unlike optax, it runs once per cycle. E‖C S‖² is m/r times ‖G‖²
    (Gaussian: 1 + (m+1)/r): a norm clip in ``inner`` nearly always clips; clip before.

    By default every micro-step still forms full gradients; only the accumulator
    shrinks. To avoid that, pass the output of
    :func:`flora_jax.sketched_value_and_grad`, made with the same sketch. XLA reserves
    memory for the mean gradient in any program that contains this update;
    :func:`flora_jax.update_and_apply` adds it to the parameters leaf by leaf, with
    :func:`flora_jax.adafactor` as ``inner`` stacked leaves layer by layer, and
    :func:`flora_jax.compressed_accumulator` lets it be compiled by itself.

    Under ``shard_map`` with gradients that are not reduced yet, give ``axis_name``:
    each device accumulates its own, and once per cycle their sketches are averaged, r·n
    elements where k reductions of n·m would be. ``acc_grads`` and ``skip_state`` are
    then each device's own: carry them with a first axis that is sharded over the mesh.
    Only at the end of a cycle, where they are zeros, may the number of devices change.
    The gradients must be each device's own too, taken at parameters of
    ``jax.lax.pcast(params, axis_name, to="varying")``: jax sums those at replicated
    parameters over the devices.

    Memory: r·max(n, m) elements of ``dtype`` per sketched leaf (``side="smaller"``),
    the leaf's size for dense ones.

    Args:
      inner: what receives the accumulated gradient, for example optax.adafactor(4e-4).
      every_k: micro-steps k per cycle; an int, or a callable of the cycle's index.
      sketch: the sketch, or its rank; CountSketch unless it names a projection
        (``Gaussian()`` is the paper's). Masks and ranks of ``inner`` are its own: give
        both the same sketch.
      use_grad_mean: accumulate the mean, or the sum if False.
      should_skip_update_fn: as in optax, a callable of (updates, gradient_step, params)
        that returns a bool scalar and a tree to keep in ``skip_state``; a skipped
        micro-step changes nothing else. For example ``optax.skip_not_finite``.
      axis_name: mesh axes of ``shard_map`` over which the accumulators are averaged at
        the end of a cycle; all devices skip a micro-step that one of them skips.
      dtype: dtype of the accumulator; arithmetic is in float32.

    Returns:
      The gradient transformation. It passes extra arguments on to ``inner``; updates
      have the dtype of the gradients, and ``inner``'s state keeps its dtypes.

    Raises:
      TypeError: for arguments of a wrong type; from update, if the key was cast.
      ValueError: for arguments out of range; from update, if gradients and state do
        not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import flora_jax as fj
      >>> params = {"w": jnp.ones((256, 512))}
      >>> tx = fj.compressed_accumulation(optax.adafactor(4e-4), 16, fj.Sketch(32))
      >>> tx.init(params).acc_grads["w"].shape
      (32, 512)

    References:
      Hao et al., `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
      <https://arxiv.org/abs/2402.03293>`_, 2024, Algorithm 1
    """
    if not callable(every_k):
        every_k = _validation.check_steps("every_k", every_k, "16 is the paper's")
        if isinstance(every_k, int) and every_k == 1:
            _validation.warn(
                "compressed_accumulation with every_k=1 saves nothing and adds noise to"
                " each gradient; use the inner transformation alone"
            )
    _validation.check_axis_name("axis_name", axis_name)
    dtype = _validation.check_state_dtype(dtype)
    sketcher = Sketcher(NAME, resolve(sketch, CountSketch("unbiased")))
    inner = _validation.check_transformation("inner", inner)
    should_skip = should_skip_update_fn or _never_skip

    def init_fn(params: PyTree) -> CompressedAccumulationState:
        plans = sketcher.plan(params)
        check_leaves(NAME, sketcher.sketch, plans, params)
        # Abstractly: gradients given here would be as large as the parameters.
        _, skip_state = jax.eval_shape(should_skip, params, jnp.int32(0), params)
        return CompressedAccumulationState(
            mini_step=jnp.zeros([], jnp.int32),
            gradient_step=jnp.zeros([], jnp.int32),
            inner_opt_state=jax.tree.map(_strong, inner.init(params)),
            acc_grads=trees.zero_sketches(params, plans, dtype),
            skip_state=optax.tree.zeros_like(skip_state),
            key=jnp.array(sketcher.sketch.key_data),
            spec=sketcher.spec(plans, dtype=dtype.name, use_grad_mean=use_grad_mean),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, CompressedAccumulationState]:
        on_sketch = extra_args.pop("on_sketch", None)
        in_place = extra_args.pop(APPLY, None)
        check_state_key(NAME, state.key)
        plans = sketcher.plan(updates)
        shapes = [plan.state_shape for plan in plans]
        old = trees.matching_leaves(NAME, "acc_grads", state.acc_grads, plans, shapes)
        answer, skip_state = should_skip(updates, state.gradient_step, params)
        skip = _check_skip(answer)
        # All or none, as they are averaged: a mean over as many micro-steps on each.
        if axis_name is not None and should_skip_update_fn is not None:
            skip = jax.lax.pmax(skip.astype(jnp.int32), axis_name) > 0
        sampled = sketcher.sample(plans, state.key, state.gradient_step)
        # Sketches are added without S, which only the end of a cycle needs.
        own = [None] * len(plans) if isinstance(updates, SketchedGradients) else sampled
        add = functools.partial(accumulate, sketcher, plans, use_grad_mean, on_sketch)
        grads = jax.tree.leaves(updates)
        acc = trees.run_sharded(add, old, own, grads, old, state.mini_step)
        if should_skip_update_fn is not None:
            # Not by a product with 0, which would keep a NaN.
            acc = [jnp.where(skip, *pair) for pair in zip(old, acc, strict=True)]
        k = every_k(state.gradient_step) if callable(every_k) else every_k
        emit = jnp.logical_not(skip) & (state.mini_step >= k - 1)
        like = gradient_shapes(updates)
        mean = functools.partial(estimate, sketcher, plans, axis_name)

        # Operands, not captured: an array captured by a branch loses its sharding type.
        operands = acc, state.inner_opt_state, sampled, params

        def mean_gradients(acc: list[jax.Array], sampled: Any) -> PyTree:
            """C S by the S that all of the cycle was sketched with."""
            leaves = trees.run_sharded(mean, jax.tree.leaves(like), sampled, acc)
            return optax.tree.cast_like(trees.rebuild(like, leaves), like)

        def end_cycle(
            acc: list[jax.Array], inner_state: PyTree, sampled: Any, params: PyTree
        ) -> tuple[Any, ...]:
            """The inner updates, the new inner state, and an empty accumulator."""
            grads = mean_gradients(acc, sampled)
            updates, new = inner.update(grads, inner_state, params, **extra_args)
            new = jax.tree.map(trees.cast_like, new, inner_state)
            empty = [jnp.zeros_like(x) for x in acc]
            return optax.tree.cast_like(updates, like), new, empty

        def can_loop(plan: LeafPlan) -> bool:
            """Whether a leaf can be expanded layer by layer, where it is read."""
            return axis_name is None and loop_steps(plan, on_one_device=True) > 0

        def end_cycle_in_place(_: Any, operands: tuple[Any, ...]) -> tuple[Any, ...]:
            """All operands after the end of a cycle."""
            acc, inner_state, sampled, params, key = operands
            # Or a TPU's compiler would sum up a parameter's squares before the loop.
            params = jax.tree.map(jax.lax.optimization_barrier, params)
            grads = mean_gradients(acc, sampled)
            leaves = zip(plans, sampled, acc, strict=True)
            sources = [
                Expansion(leaf, s, sketcher, plan) if can_loop(plan) else None
                for plan, s, leaf in leaves
            ]
            params, new = apply_updates_of(
                inner, grads, inner_state, params, key, extra_args, False, sources
            )
            new = jax.tree.map(trees.cast_like, new, inner_state)
            return [jnp.zeros_like(x) for x in acc], new, sampled, params, key

        def within_cycle(
            acc: list[jax.Array], inner_state: PyTree, *rest: Any
        ) -> tuple[Any, ...]:
            """Zeros of the type of the updates that the end of the cycle gives."""
            updates, _, _ = jax.eval_shape(end_cycle, acc, inner_state, *rest)
            return jax.tree.map(jnp.zeros_like, updates), inner_state, acc

        if in_place is not None:
            in_place.is_required = True
        if in_place is not None and in_place.is_for(params):
            acc, inner_state, _, in_place.params, _ = renewed_if(
                emit, end_cycle_in_place, (*operands, in_place.key)
            )
            new_updates = in_place
        else:
            # A branch, so that the mean gradient is computed once per cycle.
            new_updates, inner_state, acc = jax.lax.cond(
                emit, end_cycle, within_cycle, *operands
            )
        stepped = jnp.where(emit, 0, optax.safe_increment(state.mini_step))
        cycles = optax.safe_increment(state.gradient_step)
        return new_updates, CompressedAccumulationState(
            mini_step=jnp.where(skip, state.mini_step, stepped),
            gradient_step=jnp.where(emit, cycles, state.gradient_step),
            inner_opt_state=inner_state,
            acc_grads=trees.rebuild(state.acc_grads, acc),
            skip_state=jax.tree.map(trees.cast_like, skip_state, state.skip_state),
            key=state.key,
            spec=state.spec,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def has_updated(state: PyTree) -> jax.Array:
    """Whether a cycle has just ended, as ``MultiSteps.has_updated``.

    A skipped micro-step leaves the state, and so the answer, as they were.

    Args:
      state: state of :func:`compressed_accumulation`, or any state that holds one, also
        that of an ``nnx.Optimizer``.

    Returns:
      A bool scalar array.

    Raises:
      ValueError: if there is none, or more than one.
    """

    def is_ours(x: Any) -> bool:
        return isinstance(x, CompressedAccumulationState)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    if len(found) != 1:
        raise ValueError(
            "`state` must hold one CompressedAccumulationState, got"
            f" {len(found)} of them; pass the state of one compressed_accumulation"
        )
    own = unboxed(found[0])
    return (own.mini_step == 0) & (own.gradient_step > 0)


def accumulate(
    sketcher: Sketcher,
    plans: Plans,
    use_mean: bool,
    on_sketch: OnSketch,
    sampled: Sequence[Any],
    grads: Sequence[Float[Array, "..."]],
    acc: Sequence[Float[Array, "..."]],
    i: Any,
) -> list[Float[Array, "..."]]:
    """Adds micro-step i of a cycle to the accumulators: a running mean, or a sum.

    Args:
      sketcher: how leaves are sketched.
      plans: of the leaves.
      use_mean: whether the mean is accumulated, or the sum.
      on_sketch: told of each sketch, or None.
      sampled: what determines the projection of each leaf; None for dense leaves, and
        where its gradient is a sketch already.
      grads: gradients of the leaves.
      acc: accumulators of the leaves.
      i: index of the micro-step in its cycle.

    Returns:
      The new accumulators, in their dtypes.
    """
    new = []
    for plan, s, grad, old in zip(plans, sampled, grads, acc, strict=True):
        given = ScaledLeaf(grad)
        fresh = given.value() if s is None else sketcher.sketch_leaf(plan, s, given)
        # C ← C + (G_i Sᵀ − C)/(i+1): C is the mean of what was added, however long the
        # cycle turns out to be.
        total = old.astype(jnp.float32)
        total = total + ((fresh - total) / (i + 1) if use_mean else fresh)
        if on_sketch is not None and s is not None:
            on_sketch(SketchEvent(sketcher, plan, s, given, fresh, total))
        new.append(trees.cast_like(total, old))
    return new


def estimate(
    sketcher: Sketcher,
    plans: Plans,
    axis_name: AxisNames | None,
    sampled: Sequence[Any],
    acc: Sequence[Float[Array, "..."]],
) -> list[Float[Array, "..."]]:
    """What the accumulators stand for: float32, in the leaves' shapes.

    Of each device's own accumulators the mean over mesh axes, if there are any: the
    mean of sketches is the sketch of the mean.
    """
    # Before it is expanded: r·n elements are all-reduced in place of n·m.
    if axis_name is not None:
        acc = jax.lax.pmean(list(acc), axis_name)
    return [
        sketcher.unsketch_leaf(plan, s, leaf)
        for plan, s, leaf in zip(plans, sampled, acc, strict=True)
    ]


def _never_skip(*_: Any) -> tuple[jax.Array, tuple[()]]:
    return jnp.zeros([], jnp.bool_), ()


def _check_skip(skip: Any) -> jax.Array:
    skip = jnp.asarray(skip)
    if (skip.dtype, skip.shape) != (jnp.bool_, ()):
        raise ValueError(
            "`should_skip_update_fn` must return a bool scalar array first, got dtype"
            f" {skip.dtype} and shape {skip.shape}; reduce it with jnp.any"
        )
    return skip


def _strong(x: Any) -> jax.Array:
    """The array without weak type, which an update would change."""
    return jax.lax.convert_element_type(x, jnp.result_type(x))
