"""Gradients sketched during backpropagation: the sketch, without the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax._typing import PyTree
from flora_jax.leaves.plan import LeafPlan
from flora_jax.projections.count_sketch import CountSketch
from flora_jax.sketched_grad.cycle import find_source
from flora_jax.sketched_grad.planner import Planner
from flora_jax.sketched_grad.program import Fallback, LeafProjections, Program
from flora_jax.sketched_grad.rules import SketchRequest
from flora_jax.sketching.sketch import Sketch, resolve
from flora_jax.sketching.sketcher import SketchedGradients, Sketcher
from flora_jax.transforms.accumulation import NAME as ACCUMULATION

_DEFAULT = CountSketch("unbiased")  # As accumulation and momentum have it.
_ARRAY = object()


class LeafReport(NamedTuple):
    """How the gradient of one leaf is computed.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      dense_reason: why the leaf is not sketched at all, or None.
      fallbacks: parts of the gradient that are computed in full and then sketched.
    """

    path: str
    shape: tuple[int, ...]
    dense_reason: str | None
    fallbacks: tuple[Fallback, ...]

    @property
    def sketched_during_backpropagation(self) -> bool:
        """Whether the leaf is sketched and no part of its gradient is ever formed."""
        return self.dense_reason is None and not self.fallbacks

    def __str__(self) -> str:
        """One line for people."""
        how = "sketched during backpropagation"
        if self.dense_reason is not None:
            how = f"not sketched, because {self.dense_reason}"
        elif self.fallbacks:
            how = "computed in full and then sketched at " + ", ".join(
                f"{x.primitive} {x.shape} ({x.reason})" for x in self.fallbacks
            )
        return f"{self.path} {self.shape}: {how}"


class _TracedGradient(NamedTuple):
    """The gradient function at one set of shapes.

    Attributes:
      program: computes the arrays of the value, and then the gradients.
      params: leaves of the arguments that are differentiated.
      value: what the function returns, with ``_ARRAY`` in the place of each array.
      like: shapes and dtypes of the gradients.
      grad_tree: their structure.
      plans: of the gradients.
      requests: which sketch of each gradient is wanted, None for dense leaves.
    """

    program: Program
    params: Sequence[Any]
    value: PyTree
    like: tuple[jax.ShapeDtypeStruct, ...]
    grad_tree: Any
    plans: tuple[LeafPlan, ...]
    requests: list[SketchRequest | None]

    def run(self, projections: LeafProjections) -> tuple[list[Any], list[Any]]:
        """The arrays of the value, and the gradients' leaves."""
        given = []
        for i, request in self.program.inputs:
            x = jnp.asarray(self.params[i])
            given.append(x if request is None else projections.sketch(x, request))
        results = self.program.run(projections, given)
        first = len(results) - len(self.plans)
        grads = [
            x if request is None else _state_shaped(plan, request, x)
            for plan, request, x in zip(
                self.plans, self.requests, results[first:], strict=True
            )
        ]
        return results[:first], grads

    def reports(self) -> list[LeafReport]:
        fallbacks = list(dict.fromkeys(self.program.fallbacks))
        for i, request in self.program.inputs:
            if request is not None:
                shape, why = jnp.shape(self.params[i]), "it is an argument"
                fallbacks.append(Fallback(request.leaf, "input", shape, why))
        return [
            LeafReport(
                plan.path,
                plan.shape,
                plan.dense_reason,
                tuple(fallback for fallback in fallbacks if fallback.leaf == i),
            )
            for i, plan in enumerate(self.plans)
        ]


def _trace(
    fun: Callable[..., Any],
    sketcher: Sketcher,
    argnums: int | Sequence[int],
    has_aux: bool,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> _TracedGradient:
    places = tuple(argnums) if isinstance(argnums, Sequence) else (argnums,)
    if not all(-len(args) <= i < len(args) for i in places):
        raise ValueError(
            f"`argnums` must name positional arguments after the state, got {argnums=}"
            f" for {len(args)} of them; pass what is differentiated by position"
        )
    gradient = jax.value_and_grad(fun, argnums, has_aux)
    values = []

    def of_params(*params: Any) -> Any:
        full = list(args)
        for i, value in zip(places, params, strict=True):
            full[i] = value
        value, grads = gradient(*full, **kwargs)
        # What else a function returns is handed back as it is.
        values.append(
            jax.tree.map(lambda x: _ARRAY if isinstance(x, jax.Array) else x, value)
        )
        return [x for x in jax.tree.leaves(value) if isinstance(x, jax.Array)], grads

    params = [args[i] for i in places]
    closed, (arrays, grads) = jax.make_jaxpr(of_params, return_shape=True)(*params)
    like, grad_tree = jax.tree.flatten(grads)
    plans = sketcher.plan(grads)
    requests = [_request(i, plan) for i, plan in enumerate(plans)]
    wanted = enumerate([None] * len(arrays) + requests)
    return _TracedGradient(
        Planner().plan(closed, list(wanted)),
        jax.tree.leaves(params),
        values[-1],
        tuple(like),
        grad_tree,
        plans,
        requests,
    )


def _request(leaf: int, plan: LeafPlan) -> SketchRequest | None:
    if plan.dense:
        return None
    return SketchRequest(
        leaf, tuple(a for a in plan.sketched_axes if plan.shape[a] != 1)
    )


def _state_shaped(plan: LeafPlan, request: SketchRequest, x: jax.Array) -> jax.Array:
    """The sketch with r where the state has it, on the largest sketched axis."""
    largest = max(plan.sketched_axes, key=lambda a: plan.shape[a])
    return x.swapaxes(request.axes[0], largest)


def sketched_value_and_grad(
    fun: Callable[..., Any],
    sketch: Sketch | int,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, SketchedGradients]]:
    """Value and sketched gradient of a function, in place of ``jax.value_and_grad``.

    What :func:`flora_jax.compressed_accumulation` would make of the gradient in its
    current cycle, without forming it. The gradient of a weight is a product of
    activations x and cotangents δ, and its sketch one of smaller operands:

      S·(xᵀ δ) = (x Sᵀ)ᵀ δ,

    2·T·r·n operations in place of 2·T·m·n for T tokens. The function is traced, and S
    is taken from each gradient back through the equations that make it to the product
    where it begins: through transposes, casts, sums of several uses, jit, scan, cond
    and rematerialization. Where something else stands in between, the value there is
    computed in full and sketched: the result is the same, to rounding.
    :func:`explain_sketched_gradients` tells which leaves that are.

    Key and cycle are read from the state, which has to be one of the transformation
    that is given the sketches. A state of another key or another sketch makes the loss
    and all gradients NaN: that is known only once the state has values. Sketches that
    are given to a transformation with another sketch raise there.

    Call it inside of ``jax.jit``: it traces the function each time that it is called.
    ``optax.masked``, ``partition`` and ``apply_if_finite`` map over the gradients' tree
    and fail on sketches; use the sketch's ``mask`` and the accumulation's
    ``should_skip_update_fn``.

    Memory: r float32 elements per row or column of the side that is not sketched
    (r·max(n, m) with ``side="smaller"``), in place of n·m.

    Args:
      fun: a function of arrays that returns a scalar, as for ``jax.value_and_grad``.
      sketch: that of the accumulation or momentum that is given the gradients, the same
        object; or a rank.
      argnums: which arguments to differentiate, as for ``jax.value_and_grad``; counted
        after the state.
      has_aux: whether ``fun`` returns a pair of the scalar and other things.

    Returns:
      A function of the state and of ``fun``'s arguments that returns the value (or the
      pair) and :class:`SketchedGradients`. The state is that of
      :func:`flora_jax.compressed_accumulation`, or of
      :func:`flora_jax.compressed_momentum` with ``estimator="paper"``, or of a chain or
      wrapper around one of them; the outermost counts. For
      :func:`flora_jax.compressed_accumulator`, which has no state, it is
      ``sketch.cycle(step)`` with the accumulator's ``step``.

    Raises:
      TypeError: for arguments of a wrong type, such as a projection that is chosen from
        the gradient.
      ValueError: from the function, for ``argnums`` and for a state without what is
        needed, or with more than one of it.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flora_jax as fj
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> sketch = fj.Sketch(rank=16)
      >>> tx = fj.compressed_accumulation(optax.sgd(0.1), 4, sketch)
      >>> w, x = jnp.ones((128, 256)), jnp.ones((8, 128))
      >>> state = tx.init(w)
      >>> value, grads = fj.sketched_value_and_grad(loss, sketch)(state, w, x)
      >>> grads.tree.shape
      (16, 256)
      >>> updates, state = tx.update(grads, state, w)
    """
    resolved = resolve(sketch, _DEFAULT)

    def value_and_grad(
        state: PyTree, *args: Any, **kwargs: Any
    ) -> tuple[Any, SketchedGradients]:
        source = find_source(state)
        sketcher = Sketcher(source.name, resolved)
        traced = _trace(fun, sketcher, argnums, has_aux, args, kwargs)
        sampled = sketcher.sample(traced.plans, jnp.asarray(source.key), source.cycle)
        projections = LeafProjections(traced.plans, sketcher.projection, sampled)
        (loss, *aux), grads = traced.run(projections)
        # The loss too: apply_if_finite and a skip of what is not finite would hide it.
        agrees = source.agrees(sketcher, traced.plans)
        loss, *grads = (jnp.where(agrees, x, jnp.nan) for x in (loss, *grads))
        arrays = iter((loss, *aux))
        value = jax.tree.map(lambda x: next(arrays) if x is _ARRAY else x, traced.value)
        return value, SketchedGradients(
            jax.tree.unflatten(traced.grad_tree, grads),
            traced.plans,
            traced.like,
            resolved,
            source.name,
        )

    return value_and_grad


def explain_sketched_gradients(
    fun: Callable[..., Any],
    sketch: Sketch | int,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., list[LeafReport]]:
    """Tells which gradients :func:`sketched_value_and_grad` never forms; runs nothing.

    Args:
      fun: the function.
      sketch: the sketch, or its rank.
      argnums: which arguments to differentiate.
      has_aux: whether ``fun`` returns a pair.

    Returns:
      A function of the same arguments, without a state (arrays or ShapeDtypeStructs in
      the places of ``argnums``), that returns one :class:`LeafReport` per leaf.

    Raises:
      TypeError: for a projection that is chosen from the gradient.
      ValueError: from the function, for ``argnums``.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> loss = lambda w: jnp.sum(jnp.ones((8, 128)) @ w)
      >>> for leaf in fj.explain_sketched_gradients(loss, 16)(jnp.ones((128, 256))):
      ...   print(leaf)
       (128, 256): sketched during backpropagation
    """
    # The name makes no difference to what is formed.
    sketcher = Sketcher(ACCUMULATION, resolve(sketch, _DEFAULT))

    def report(*args: Any, **kwargs: Any) -> list[LeafReport]:
        return _trace(fun, sketcher, argnums, has_aux, args, kwargs).reports()

    return report
