"""Gradients sketched during backpropagation: the sketch, without the gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from flora_jax._typing import PyTree, Shape
from flora_jax.leaves.boxes import unboxed
from flora_jax.leaves.paths import normalize_path
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.spec import spec_identity
from flora_jax.projections.count_sketch import CountSketch
from flora_jax.random.keys import check_state_key
from flora_jax.sketched_grad.planner import Planner
from flora_jax.sketched_grad.program import Fallback, LeafProjections, Program
from flora_jax.sketched_grad.rewrites import Operand, SketchRequest
from flora_jax.sketching.sketch import Sketch, SketchCycle, resolve
from flora_jax.sketching.sketcher import SketchedGradients, Sketcher
from flora_jax.transforms import accumulation, momentum

_DEFAULT = CountSketch("unbiased")  # As accumulation and momentum have it.
_ARRAY = object()
# What holds key and cycle in a state, and the name by which its keys are salted.
_SOURCES = {
    accumulation.CompressedAccumulationState: (accumulation.NAME, "gradient_step"),
    momentum.CompressedMomentumState: (momentum.NAME, "epoch"),
}


class ProjectionSource(NamedTuple):
    """What determines the projections of a gradient.

    Attributes:
      name: of the transformation that the sketches are for, the salt of its keys.
      key: root key data, uint32 of shape (2,).
      cycle: how often the projection was resampled, an int32 scalar.
      spec: what the state means, or None if there is no state.
    """

    name: str
    key: Any
    cycle: Any
    spec: Any = None

    def agrees(self, sketcher: Sketcher, plans: tuple[LeafPlan, ...]) -> Any:
        """Whether the state was made with the sketcher's sketch, possibly traced."""
        agrees = jnp.all(jnp.asarray(self.key) == sketcher.sketch.key_data)
        if self.spec is not None:
            agrees &= spec_identity(self.spec) == np.uint32(sketcher.identity(plans))
        return agrees


def find_source(state: PyTree) -> ProjectionSource:
    """Finds the outermost accumulation or momentum in a state.

    Args:
      state: the state of an optimizer, or of the accumulation or momentum itself, or a
        SketchCycle.

    Raises:
      TypeError: if the state's key was cast to another dtype.
      ValueError: if there is none, or more than one.
    """
    if isinstance(state, SketchCycle):
        return ProjectionSource(accumulation.NAME, *state)

    def holds_key(x: Any) -> bool:
        return type(x) in _SOURCES

    # An accumulation is a leaf here: what its inner state holds is given the gradient
    # that the accumulation estimates.
    leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=holds_key)[0]
    found = [(normalize_path(path), x) for path, x in leaves if holds_key(x)]
    if not found:
        raise ValueError(
            "`state` must hold the state of compressed_accumulation or"
            f" compressed_momentum, got {type(state).__name__} without one; pass the"
            " optimizer's state before the arguments of the function, or"
            " sketch.cycle(step) where the gradients go to compressed_accumulator"
        )
    if len(found) > 1:
        paths = ", ".join(f"{type(x).__name__} at {path!r}" for path, x in found)
        raise ValueError(
            f"`state` must hold one state that sketches gradients, got {paths}; pass"
            " the one that the gradients are for"
        )
    own = found[0][1]
    name, cycle = _SOURCES[type(own)]
    source = ProjectionSource(name, *unboxed((own.key, getattr(own, cycle), own.spec)))
    check_state_key(name, source.key)
    return source


class LeafReport(NamedTuple):
    """How the gradient of one leaf is computed.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      dense_reason: why the leaf is not sketched at all, or None.
      fallbacks: parts of the gradient that are computed in full and then sketched.
      unsketched_activations: why the forward pass keeps no sketches in place of the
        activations that the gradient depends on; None if it does.
    """

    path: str
    shape: Shape
    dense_reason: str | None
    fallbacks: tuple[Fallback, ...]
    unsketched_activations: str | None

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
        # Of others it goes without saying.
        if self.sketched_during_backpropagation and self.unsketched_activations:
            how += f"; not its activations: {self.unsketched_activations}"
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
        grads = zip(self.plans, self.requests, results[first:], strict=True)
        return results[:first], [_state_shaped(*grad) for grad in grads]

    def reports(self) -> list[LeafReport]:
        fallbacks = list(dict.fromkeys(self.program.fallbacks))
        for i, request in self.program.inputs:
            if request is not None and not request.of_factor:
                shape, why = jnp.shape(self.params[i]), "it is an argument"
                fallbacks.append(Fallback(request.leaf, "input", shape, why))
        sketched, _ = _kept_factors(self.program)
        kept = {request.leaf for _, request in sketched if request is not None}
        reports = []
        for i, plan in enumerate(self.plans):
            own = tuple(fallback for fallback in fallbacks if fallback.leaf == i)
            request = self.requests[i]
            reason = None
            if request is None or own:
                reason = "its gradient is computed in full"
            elif request.same_as in self.program.read_in_full:
                reason = "the backward pass reads them for something else as well"
            elif request.same_as not in kept:
                reason = "recomputed, or the sketched side is that of the cotangents"
            report = LeafReport(plan.path, plan.shape, plan.dense_reason, own, reason)
            reports.append(report)
        return reports


def _kept_factors(program: Program) -> tuple[set[Operand], set[Operand]]:
    """Sketches of factors that the forward pass makes and the backward pass reads.

    Returns:
      The sketches, and those whose factors the backward pass reads in full as well.
    """
    loss, steps = program.outputs[0], iter(program.steps)
    forward: set[Operand] = {(program.jaxpr.invars[i], r) for i, r in program.inputs}
    # The loss is the last value of the forward pass.
    for step in steps:
        forward |= {*step.results}
        if loss in step.results:
            break
    # Literals are not hashable.
    read = {x for step in steps for x in step.operands if not isinstance(x[0], Literal)}
    constants = {*program.jaxpr.constvars}
    sketched: set[Operand] = {
        (atom, request)
        for atom, request in read
        if request is not None
        and request.of_factor
        and ((atom, request) in forward or atom in constants)
    }
    return sketched, {(atom, r) for atom, r in sketched if (atom, None) in read}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
    """What a traced function returns in addition to arrays; compared by identity."""

    value: PyTree


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

    def of_params(*params: Any) -> Any:
        full = list(args)
        for i, value in zip(places, params, strict=True):
            full[i] = value
        value, grads = gradient(*full, **kwargs)
        leaves, treedef = jax.tree.flatten(value)
        arrays = [x for x in leaves if isinstance(x, jax.Array)]
        # What else a function returns is handed back as it is.
        others = [_ARRAY if isinstance(x, jax.Array) else x for x in leaves]
        return arrays, _Static(jax.tree.unflatten(treedef, others)), grads

    params = [args[i] for i in places]
    closed, returned = jax.make_jaxpr(of_params, return_shape=True)(*params)
    arrays, value, grads = returned
    like, grad_tree = jax.tree.flatten(grads)
    plans = sketcher.plan(grads)
    first: dict[Any, int] = {}  # Of the leaves that have the same S.
    requests = [
        _request(i, p, first.setdefault((p.key_path, p.rank, p.width), i))
        for i, p in enumerate(plans)
    ]
    # The value's arrays come first among the outputs, and are wanted as they are.
    planner, wanted = Planner(), list(enumerate([None] * len(arrays) + requests))
    program = planner.plan(closed, wanted)
    # What is kept in full in any case is sketched where the sketch is read.
    if late := frozenset(atom for atom, _ in _kept_factors(program)[1]):
        program = planner.plan(closed, wanted, late)
    return _TracedGradient(
        program=program,
        params=jax.tree.leaves(params),
        value=value.value,
        like=tuple(like),
        grad_tree=grad_tree,
        plans=plans,
        requests=requests,
    )


def _request(leaf: int, plan: LeafPlan, same_as: int) -> SketchRequest | None:
    # Rules move axes through reshapes, in which axes of size 1 come and go.
    axes = tuple(a for a in plan.sketched_axes if plan.shape[a] != 1)
    return None if plan.dense else SketchRequest(leaf, axes, same_as)


def _state_shaped(plan: LeafPlan, request: SketchRequest | None, x: Any) -> Any:
    """The sketch with r where the state has it, on the largest sketched axis."""
    if request is None:
        return x
    # A sketch has r on its first sketched axis and 1 on the others: a swap moves it.
    largest = max(plan.sketched_axes, key=plan.shape.__getitem__)
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
    :func:`explain_sketched_gradients` reports which leaves those are.

    Key and cycle are read from the state, which has to be one of the transformation
    that is given the sketches. A state with a different key or sketch makes the loss
    and all sketches NaN, as the key is known only at run time. ``update`` raises if it
    is given gradients that were sketched with a different sketch.

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
        plans, like = traced.plans, traced.like
        sampled = sketcher.sample(plans, jnp.asarray(source.key), source.cycle)
        projections = LeafProjections(plans, sketcher.projection, sampled)
        (loss, *aux), grads = traced.run(projections)
        # The loss too: apply_if_finite and a skip of what is not finite would hide it.
        agrees = source.agrees(sketcher, plans)
        loss = jnp.where(agrees, loss, jnp.nan)
        # Not the dense ones, which no sketch changes, and which would be copied.
        grads = [
            x if plan.dense else jnp.where(agrees, x, jnp.nan)
            for plan, x in zip(plans, grads, strict=True)
        ]
        arrays = iter((loss, *aux))
        value = jax.tree.map(lambda x: next(arrays) if x is _ARRAY else x, traced.value)
        tree = jax.tree.unflatten(traced.grad_tree, grads)
        return value, SketchedGradients(tree, plans, like, resolved, source.name)

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
    sketcher = Sketcher(accumulation.NAME, resolve(sketch, _DEFAULT))

    def report(*args: Any, **kwargs: Any) -> list[LeafReport]:
        return _trace(fun, sketcher, argnums, has_aux, args, kwargs).reports()

    return report
