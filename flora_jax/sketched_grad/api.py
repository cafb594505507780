"""Gradients that are born compressed: the sketch of a gradient without the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax import _validation as _checks
from flora_jax.random import keys as _keys
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.rules import LeafRules
from flora_jax.projections import CountSketch, Projection
from flora_jax.transforms import accumulation as _accumulation
from flora_jax.transforms import momentum as _momentum
from flora_jax.sketched_grad.push import Want
from flora_jax.sketched_grad.planner import plan_program
from flora_jax.sketched_grad.program import Operators, Program, Stop
from flora_jax.sketching.sketcher import Sketcher
from flora_jax.sketching.sketched_gradients import SketchedGradients

_TAKERS = _accumulation.NAME, _momentum.NAME
_ARRAY = object()


class LeafReport(NamedTuple):
    """How the gradient of one leaf comes about.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      dense_reason: why the plan does not compress it, or None.
      stops: values that are computed in full and then sketched; empty if the gradient
        is born compressed.
    """

    path: str
    shape: tuple[int, ...]
    dense_reason: str | None
    stops: tuple[Stop, ...]

    @property
    def born_compressed(self) -> bool:
        """Whether the leaf is sketched, and no part of its gradient is ever formed."""
        return self.dense_reason is None and not self.stops


class _Traced(NamedTuple):
    """The gradient function at one set of shapes.

    Attributes:
      program: computes the arrays of the value, and then the gradients.
      inputs: leaves of the arguments that are differentiated.
      value: what the function returns, with ``_ARRAY`` in the place of each array.
      like: shapes and dtypes of the gradients.
      grad_tree: their structure.
      plans: of the gradients.
    """

    program: Program
    inputs: Sequence[Any]
    value: Any
    like: tuple[Any, ...]
    grad_tree: Any
    plans: tuple[LeafPlan, ...]

    def given(self) -> list[tuple[Any, Want | None]]:
        """The arguments that the program takes, and what it takes of them."""
        return [(jnp.asarray(self.inputs[i]), want) for i, want in self.program.inputs]

    def reports(self) -> list[LeafReport]:
        stops = self.program.stops
        return [
            LeafReport(
                plan.path,
                plan.shape,
                plan.dense_reason,
                tuple(dict.fromkeys(stop for stop in stops if stop.leaf == i)),
            )
            for i, plan in enumerate(self.plans)
        ]


def _trace(
    fun: Callable[..., Any],
    rules: LeafRules,
    argnums: Any,
    has_aux: bool,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> _Traced:
    places = tuple(argnums) if isinstance(argnums, Sequence) else (argnums,)
    if not all(-len(args) <= i < len(args) for i in places):
        raise ValueError(
            f"`argnums` must name positional arguments, got argnums={argnums} for"
            f" {len(args)} of them; pass what is differentiated by position"
        )
    gradient = jax.value_and_grad(fun, argnums, has_aux)
    values = []

    def of_params(*params: Any) -> Any:
        full = list(args)
        for i, value in zip(places, params, strict=True):
            full[i] = value
        value, grads = gradient(*full, **kwargs)
        values.append(jax.tree.map(_unless_array, value))
        return [x for x in jax.tree.leaves(value) if isinstance(x, jax.Array)], grads

    params = [args[i] for i in places]
    closed, (arrays, grads) = jax.make_jaxpr(of_params, return_shape=True)(*params)
    like, grad_tree = jax.tree.flatten(grads)
    plans = rules.plan(grads)
    first = len(arrays)
    asked: list[Any] = [(i, None) for i in range(first)]
    for i, plan in enumerate(plans):
        axes = tuple(a for a in plan.sketched_axes if plan.shape[a] != 1)
        want = Want(i, axes) if plan.dense_reason is None else None
        asked.append((first + i, want))
    program = plan_program(closed.jaxpr, closed.consts, asked)
    flat = jax.tree.leaves(params)
    program.stops.extend(
        Stop(want.leaf, "input", jnp.shape(flat[i]), "it is an argument")
        for i, want in program.inputs
        if want is not None
    )
    return _Traced(program, flat, values[-1], tuple(like), grad_tree, tuple(plans))


def _unless_array(x: Any) -> Any:
    """What else a function returns is handed back as it is."""
    return _ARRAY if isinstance(x, jax.Array) else x


def _state_shaped(plan: LeafPlan, sketch: jax.Array) -> jax.Array:
    """From (other axes…, r) to the shape that the state has."""
    others = [i for i in range(len(plan.shape)) if i not in plan.sketched_axes]
    largest = max(plan.sketched_axes, key=lambda i: plan.shape[i])
    moved = sketch.reshape(*(plan.shape[i] for i in others), plan.rank)
    place = sum(i < largest for i in others)
    return jnp.moveaxis(moved, -1, place).reshape(plan.state_shape)


def sketched_value_and_grad(
    fun: Callable[..., Any],
    rank: Any,
    *,
    key: Any,
    step: jax.typing.ArrayLike = 0,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    transformation: str = _accumulation.NAME,
    projection: Projection = CountSketch(),  # noqa: B008 (frozen)
    mask: Any = None,
    min_dim_size: int = 128,
    max_aspect_ratio: float = 16,
    side: str = "smaller",
    weight_dimension_numbers: Any = None,
) -> Callable[..., Any]:
    """Value and sketched gradient of a function, in place of ``jax.value_and_grad``.

    What :func:`flora_jax.compressed_accumulation` would make of the gradient in its
    cycle number ``step``, without forming it. The gradient of a weight is a product of
    activations x and cotangents δ, and its sketch one of smaller operands:

      S·(xᵀ δ) = (x Sᵀ)ᵀ δ,

    2·T·r·n operations in place of 2·T·m·n for T tokens. The function is traced, and S
    is taken from each gradient back through the equations that make it to the product
    where it begins: through transposes, casts, sums of several uses, jit, scan, cond
    and rematerialisation. Where something else stands in between, the value there is
    computed in full and sketched: the result is the same, to rounding.
    :func:`born_compressed` tells which leaves that are.

    Call it inside of ``jax.jit``: it traces the function each time that it is called. A
    sketch does not hold the key and the step that made it: with others than those of
    the state that receives it, the update is noise and nothing tells. ``optax.masked``,
    ``partition`` and ``apply_if_finite`` map over the gradients' tree and fail on
    sketches; use ``mask`` and the accumulation's ``should_skip_update_fn``.

    Memory: r numbers of float32 per row or column of the side that is not sketched
    (r·max(n, m) with ``side="smaller"``), in place of n·m.

    Args:
      fun: a function of arrays that returns a scalar, as for ``jax.value_and_grad``.
      rank: sketch size r; an int, a callable of (path, shape), or a tree of ints.
      key: int seed, typed threefry2x32 key, or its key data; possibly traced. That of
        the accumulator, or ``state.key`` of :func:`flora_jax.compressed_accumulation`.
      step: number of the cycle, possibly traced: ``state.gradient_step`` there.
      argnums: which arguments to differentiate, as for ``jax.value_and_grad``.
      has_aux: whether ``fun`` returns a pair of the scalar and other things.
      transformation: ``"compressed_accumulation"`` or ``"compressed_momentum"``:
        which one the sketches are for. The latter, with ``reading="paper"``, has
        ``key=state.key, step=state.count // resample_every`` (0 if that is None).
      projection: how leaves are sketched; one that a key regenerates.
      mask: which leaves may be sketched; see :func:`flora_jax.plan_leaves`.
      min_dim_size: smallest side of a matrix that is sketched.
      max_aspect_ratio: largest ratio of its sides.
      side: which side is sketched.
      weight_dimension_numbers: which axes form the matrix, in optax's convention.

    Returns:
      A function of the same arguments that returns the value (or the pair) and
      :class:`SketchedGradients`.

    Raises:
      TypeError: for arguments of a wrong type, such as a projection that is chosen from
        the gradient.
      ValueError: for arguments out of range; from the function, for ``argnums``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flora_jax as fj
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> @jax.jit
      ... def gradient(w, x):
      ...   return fj.sketched_value_and_grad(loss, rank=16, key=0)(w, x)
      >>> value, grads = gradient(jnp.ones((128, 256)), jnp.ones((8, 128)))
      >>> grads.tree.shape
      (16, 256)
    """
    rules = LeafRules(
        rank, mask, min_dim_size, max_aspect_ratio, side, weight_dimension_numbers
    )
    _checks.check_choice("transformation", transformation, _TAKERS)
    sketcher = Sketcher(transformation, rules, projection)
    root = _keys.raw_key(key)
    if not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise TypeError(
            f"`step` must be an integer, got step={step}; pass the number of the cycle"
        )

    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        traced = _trace(fun, rules, argnums, has_aux, args, kwargs)
        drawn = sketcher.draw(traced.plans, jnp.asarray(root), step)
        operators = Operators(traced.plans, projection, drawn)
        given = [
            x if want is None else operators.sketch(want.leaf, x, want.axes)
            for x, want in traced.given()
        ]
        results = traced.program.run(operators, given)
        first = len(results) - len(traced.plans)
        grads = [
            x if plan.dense_reason is not None else _state_shaped(plan, x)
            for plan, x in zip(traced.plans, results[first:], strict=True)
        ]
        arrays = iter(results[:first])
        value = jax.tree.map(lambda x: next(arrays) if x is _ARRAY else x, traced.value)
        tree = jax.tree.unflatten(traced.grad_tree, grads)
        return value, SketchedGradients(
            tree, traced.plans, traced.like, projection, transformation
        )

    return value_and_grad


def born_compressed(
    fun: Callable[..., Any],
    rank: Any,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **rules: Any,
) -> Callable[..., list[LeafReport]]:
    """Tells which gradients :func:`sketched_value_and_grad` never forms; runs nothing.

    Args:
      fun: the function.
      rank: sketch size r.
      argnums: which arguments to differentiate.
      has_aux: whether ``fun`` returns a pair.
      **rules: about the leaves, as for :func:`flora_jax.plan_leaves`.

    Returns:
      A function of the same arguments (arrays or ShapeDtypeStructs in the places of
      ``argnums``) that returns one :class:`LeafReport` per leaf.
    """
    settings = LeafRules(rank, **rules)

    def report(*args: Any, **kwargs: Any) -> list[LeafReport]:
        return _trace(fun, settings, argnums, has_aux, args, kwargs).reports()

    return report
