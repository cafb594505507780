"""Gradient accumulation kept as a sketch (the paper's Algorithm 1)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation as _checks
from flora_jax.random import keys as _keys
from flora_jax.leaves import trees as _state
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.rules import LeafRules
from flora_jax.projections import CountSketch, Projection
from flora_jax.sketching.sketcher import Sketcher, accumulate, estimate
from flora_jax.sketching.watch import watching

# compressed_accumulator shares it: same key and cycle, same projections.
NAME = "compressed_accumulation"


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
    inner_opt_state: Any
    acc_grads: Any
    skip_state: Any
    key: jax.Array
    spec: jax.Array


def compressed_accumulation(
    inner: optax.GradientTransformation,
    every_k: int | Callable[[Any], Any],
    rank: Any,
    *,
    use_grad_mean: bool = True,
    should_skip_update_fn: Callable[..., tuple[Any, Any]] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    projection: Projection = CountSketch(),  # noqa: B008 (frozen)
    key: Any = 0,
    mask: Any = None,
    min_dim_size: int = 128,
    max_aspect_ratio: float = 16,
    side: str = "smaller",
    weight_dimension_numbers: Any = None,
    dtype: Any = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """Accumulates the gradients of k micro-steps as a sketch, then updates once.

    In place of ``optax.MultiSteps``. Each cycle draws a fresh S; for a leaf folded to
    G (n x m) with its columns sketched, micro-step i = 0…k−1 does

      C ← C + (G_i Sᵀ − C)/(i+1),

    and the last one gives C S, an estimate of the mean gradient (unbiased, unless the
    projection is isometric), to ``inner``. Other micro-steps return zeros and leave
    ``inner`` alone: unlike optax, it runs once per cycle. E‖C S‖² is m/r times ‖G‖²
    (Gaussian: 1 + (m+1)/r): a norm clip in ``inner`` nearly always clips; clip before.

    Each micro-step forms full gradients: what is saved is the accumulator. Not so if
    ``update`` is given what :func:`flora_jax.sketched_value_and_grad` returns in place
    of gradients, with ``key=state.key, step=state.gradient_step`` and the same rules.
    In one program with the update, XLA still reserves the mean gradient that the last
    micro-step of a cycle forms; :func:`flora_jax.compressed_accumulator` is apart.

    Under ``shard_map`` with gradients that are not reduced yet, give ``axis_name``:
    each device accumulates its own, and once per cycle their sketches are averaged, r·n
    numbers where k reductions of n·m would be. ``acc_grads`` and ``skip_state`` are
    then each device's own: carry them with a first axis that is cut over the mesh. Only
    at the end of a cycle, where they are zeros, may the number of devices change. The
    gradients must be each device's own too, taken at parameters of
    ``jax.lax.pcast(params, axis_name, to="varying")``: jax sums those at replicated
    parameters over the devices.

    Memory: r·max(n, m) numbers of ``dtype`` per sketched leaf (``side="smaller"``), the
    leaf's size for dense ones.

    Args:
      inner: what receives the accumulated gradient, for example optax.adafactor(4e-4).
      every_k: micro-steps k per cycle; an int, or a callable of the cycle's number.
      rank: sketch size r; an int, a callable of (path, shape), or a tree of ints.
      use_grad_mean: accumulate the mean, or the sum if False.
      should_skip_update_fn: as in optax, a callable of (updates, gradient_step, params)
        that returns a bool scalar and a tree to keep in ``skip_state``; a skipped
        micro-step changes nothing else. For example ``optax.skip_not_finite``.
      axis_name: mesh axes of ``shard_map`` over which the accumulators are averaged at
        the end of a cycle; all devices skip a micro-step that one of them skips.
      projection: how leaves are sketched; ``Gaussian()`` is the paper's.
      key: int seed, typed threefry2x32 key, or its key data.
      mask: which leaves may be sketched; see :func:`flora_jax.plan_leaves`.
      min_dim_size: smallest side of a matrix that is sketched.
      max_aspect_ratio: largest ratio of its sides.
      side: which side is sketched.
      weight_dimension_numbers: which axes form the matrix, in optax's convention.
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
      >>> tx = fj.compressed_accumulation(optax.adafactor(4e-4), every_k=16, rank=32)
      >>> tx.init(params).acc_grads["w"].shape
      (32, 512)

    References:
      Hao et al., `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
      <https://arxiv.org/abs/2402.03293>`_, 2024, Algorithm 1
    """
    if not callable(every_k):
        every_k = _checks.check_steps("every_k", every_k, "16 is the paper's")
        if every_k == 1:
            warnings.warn(
                "compressed_accumulation with every_k=1 saves nothing and adds noise to"
                " each gradient; use the inner transformation alone",
                stacklevel=2,
            )
    _checks.check_axis_name("axis_name", axis_name)
    dtype = _checks.check_state_dtype(dtype)
    root = _keys.raw_key(key)
    rules = LeafRules(
        rank, mask, min_dim_size, max_aspect_ratio, side, weight_dimension_numbers
    )
    sketcher = Sketcher(NAME, rules, projection)
    inner = _checks.check_transformation("inner", inner)
    should_skip_fn = should_skip_update_fn or _never_skip

    def init_fn(params: Any) -> CompressedAccumulationState:
        shapes = [plan.state_shape for plan in rules.plan(params)]
        # Abstractly: gradients given here would be as large as the parameters.
        _, skip_state = jax.eval_shape(should_skip_fn, params, jnp.int32(0), params)
        return CompressedAccumulationState(
            mini_step=jnp.zeros([], jnp.int32),
            gradient_step=jnp.zeros([], jnp.int32),
            inner_opt_state=jax.tree.map(_strong, inner.init(params)),
            acc_grads=_state.zeros_tree(params, shapes, dtype),
            skip_state=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), skip_state),
            key=jnp.array(root),
            spec=sketcher.spec(root, use_grad_mean=use_grad_mean),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, CompressedAccumulationState]:
        _keys.check_state_key(NAME, state.key)
        plans, like = sketcher.planned(updates)
        answer, skip_state = should_skip_fn(updates, state.gradient_step, params)
        skip = _check_skip(answer)
        if axis_name is not None and should_skip_update_fn is not None:
            skip = jax.lax.pmax(skip.astype(jnp.int32), axis_name) > 0
        acc = _add(sketcher, plans, use_grad_mean, updates, state)
        if should_skip_update_fn is not None:
            old = jax.tree.leaves(state.acc_grads)
            acc = [jnp.where(skip, *pair) for pair in zip(old, acc, strict=True)]
        k = every_k(state.gradient_step) if callable(every_k) else every_k
        emit = jnp.logical_not(skip) & (state.mini_step >= k - 1)
        run_inner = functools.partial(inner.update, **extra_args)
        mean_fn = functools.partial(estimate, sketcher, plans, axis_name)
        emit_fn = functools.partial(_emit, mean_fn, run_inner, like, state)
        idle_fn = functools.partial(_idle, emit_fn)
        new_updates, inner_state, acc = jax.lax.cond(
            emit, emit_fn, idle_fn, acc, state.inner_opt_state, params
        )
        stepped = jnp.where(emit, 0, optax.safe_increment(state.mini_step))
        cycles = optax.safe_increment(state.gradient_step)
        return new_updates, CompressedAccumulationState(
            mini_step=jnp.where(skip, state.mini_step, stepped),
            gradient_step=jnp.where(emit, cycles, state.gradient_step),
            inner_opt_state=inner_state,
            acc_grads=_state.rebuild(state.acc_grads, acc),
            skip_state=jax.tree.map(_state.cast_like, skip_state, state.skip_state),
            key=state.key,
            spec=state.spec,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _add(
    sketcher: Sketcher,
    plans: Sequence[LeafPlan],
    use_mean: bool,
    updates: Any,
    state: CompressedAccumulationState,
) -> list[jax.Array]:
    """The accumulator's leaves with one more micro-step in them."""
    old = _state.matching_leaves(
        NAME, "acc_grads", state.acc_grads, plans, [p.state_shape for p in plans]
    )
    return _state.run_sharded(
        functools.partial(accumulate, sketcher, plans, use_mean),
        old,
        jax.tree.leaves(updates),
        old,
        state.key,
        state.mini_step,
        state.gradient_step,
    )


def _emit(
    mean_fn: Callable[..., Any],
    run_inner: Callable[..., Any],
    like: Any,
    state: CompressedAccumulationState,
    acc: Sequence[jax.Array],
    inner_state: Any,
    params: Any,
) -> tuple[Any, Any, Any]:
    """The end of a cycle: inner's updates, its new state, and an empty accumulator."""
    leaves = _state.run_sharded(
        mean_fn, jax.tree.leaves(like), acc, state.key, state.gradient_step
    )
    mean = optax.tree.cast_like(_state.rebuild(like, leaves), like)
    with watching(None):  # Nothing can be seen from outside of a branch.
        new_updates, new_inner = run_inner(mean, inner_state, params)
    return (
        optax.tree.cast_like(new_updates, like),
        jax.tree.map(_state.cast_like, new_inner, inner_state),
        jax.tree.map(jnp.zeros_like, acc),
    )


def _idle(
    emit_fn: Callable[..., Any], acc: Sequence[jax.Array], inner_state: Any, params: Any
) -> tuple[Any, Any, Any]:
    """A micro-step within a cycle: zeros of the type that the end of it gives."""
    updates, _, _ = jax.eval_shape(emit_fn, acc, inner_state, params)
    return jax.tree.map(jnp.zeros_like, updates), inner_state, acc


def has_updated(state: Any) -> jax.Array:
    """Whether a cycle has just ended, as ``MultiSteps.has_updated``.

    A skipped micro-step leaves the state, and so the answer, as they were.

    Args:
      state: state of :func:`compressed_accumulation`, or any state that holds one.

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
    return (found[0].mini_step == 0) & (found[0].gradient_step > 0)


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
