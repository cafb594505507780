"""Any optimizer inside a subspace of each gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation as check
from flora_jax._typing import PyTree, Shape
from flora_jax.leaves import trees
from flora_jax.leaves.moments import find_moments, replace_moments
from flora_jax.leaves.paths import is_masked, named_leaves
from flora_jax.leaves.plan import LeafPlan
from flora_jax.projections.base import Projection
from flora_jax.projections.count_sketch import CountSketch
from flora_jax.random.keys import check_state_key
from flora_jax.sketching.sketch import Sketch, resolve, warn_if_dense
from flora_jax.sketching.sketcher import (
    ScaledLeaf,
    Sketcher,
    SketchEvent,
    refuse_sketches,
)
from flora_jax.subspace.basis import Basis, Refresh
from flora_jax.subspace.residuals import LeafStep, Residual
from flora_jax.subspace.transports import Keep, Moments, Transport, check_moments

_NAME = "scale_in_subspace"
# Trees of moments by field, of each NamedTuple of the inner state.
Groups: TypeAlias = Sequence[dict[str, PyTree]]
_KEPT = ("basis", "limiter", "error")
_AS_FLOAT32 = functools.partial(jnp.asarray, dtype=jnp.float32)


class SubspaceState(NamedTuple):
    """State of :func:`scale_in_subspace`.

    Attributes:
      count: number of updates so far, int32.
      key: root key data, uint32 of shape (2,); it never changes.
      spec: what the state means, for :func:`flora_jax.verify_state`.
      inner: state of the inner transformation, on the tree of sketches.
      basis: tree of stored bases; () for a projection that a key regenerates.
      limiter: tree of norms, one per matrix; () without a limiter.
      error: tree of what sketches have left out; () without error feedback.
    """

    count: Any
    key: jax.Array
    spec: jax.Array
    inner: Any
    basis: Any = ()
    limiter: Any = ()
    error: Any = ()


def scale_in_subspace(
    inner: optax.GradientTransformation,
    sketch: Sketch | int,
    refresh_every: int | jax.Array | None = 200,
    *,
    residual: Residual | None = None,
    transport: Transport = Keep(),  # noqa: B008 (frozen)
    scale: jax.typing.ArrayLike = 1.0,
    error_feedback: bool = False,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Runs a transformation on sketches of the updates, and expands its result.

    For a leaf folded to G (n x m) with its columns sketched by S (r x m, orthonormal
    rows), R = G Sᵀ is given to ``inner``, which answers N. With α = ``scale``, the
    update is α·N S, to which ``residual`` may add what the sketch does not see:

    - None: nothing (GaLore);
    - :class:`flora_jax.Plain`: G − R S;
    - :class:`flora_jax.Fira`: φ·(G − R S), φ_i = ‖N_i‖/(‖R_i‖ + 1e-8) for each row i,
      with limited growth; :class:`flora_jax.FiraCode`: φ·(G − α·R S), as in the code
      published with that paper;
    - :class:`flora_jax.Apollo`: the update is α·φ·G instead, which needs no
      orthonormal S.

    Every T steps S is replaced by S′, and ``transport`` says what becomes of the first
    moments m of ``inner`` (fields named ``mu``, ``ema``, ``momentum``; also the sums
    ``trace`` and ``acc_grads``) and of the second ones v (``nu``):

    - :class:`flora_jax.Keep`: nothing (GaLore, APOLLO);
    - :class:`flora_jax.Squared`: m T and v T∘T, with T = S S′ᵀ and its elementwise
      square T∘T;
    - :class:`flora_jax.LDAdam`: m T, and the variance about the mean is moved;
    - :class:`flora_jax.PreserveRMS`: like the second, with sizes that do not change;
    - :class:`flora_jax.Reset`: they start anew from R.

    Leaves that are not sketched are given to ``inner`` as they are.

    A refresh is a branch that runs when it is due; under ``optax.MultiSteps``, which
    runs its inner transformation at every micro-step, and under ``jax.vmap``, which
    runs both branches, it is paid for more often: prefer
    :func:`flora_jax.compressed_accumulation`.

    Memory: what ``inner`` keeps for r·max(n, m) elements instead of n·m
    (``side="smaller"``), a stored basis of ``TopSVD`` (r·width elements) or ``TopDCT``
    (r), one element per matrix with a limiter, n·m with error feedback.

    Args:
      inner: a transformation that needs no parameters, such as
        ``optax.scale_by_adam()``; one that keeps the direction of the gradient: the
        learning rate, with its sign, follows in the chain.
      sketch: the sketch, or its rank; ``CountSketch(normalization="isometric")`` unless
        it has a projection, which may be oblivious, ``TopSVD()`` or ``TopDCT()``.
      refresh_every: T, in updates; it may be traced but must not change. None keeps the
        first basis.
      residual: what becomes of the part of G outside of the subspace.
      transport: what becomes of ``inner``'s moments when S is replaced.
      scale: α.
      error_feedback: add what the sketch left out to the next gradient; without a
        residual.
      stagger: replace the bases of different leaves at different steps, evenly spread
        over T, so that no step but the first pays for all.

    Returns:
      The gradient transformation. Updates have the dtype of the gradients. An extra
      argument ``on_sketch`` of its update is called with each leaf's ``SketchEvent``.

    Raises:
      TypeError: for arguments of a wrong type; from update, if the key was cast.
      ValueError: for arguments out of range or that exclude each other; from init, if
        ``inner`` has no moments to transport or a leaf too few directions; from update,
        if gradients and state do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import flora_jax as fj
      >>> tx = optax.chain(
      ...     fj.scale_in_subspace(
      ...         optax.scale_by_adam(0.9, 0.99),
      ...         fj.Sketch(32),
      ...         residual=fj.Fira(b1=0.9, b2=0.99),
      ...         transport=fj.Squared()),
      ...     optax.scale_by_learning_rate(1e-3))
      >>> state = tx.init({"w": jnp.ones((256, 512))})
      >>> state[0].inner.nu["w"].shape
      (32, 512)

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024; Chen et al.,
      `Fira <https://arxiv.org/abs/2410.01623>`_, 2024; Zhu et al., `APOLLO
      <https://arxiv.org/abs/2412.05270>`_, 2024; Robert et al., `LDAdam
      <https://arxiv.org/abs/2410.16103>`_, 2024
    """
    inner = check.check_transformation("inner", inner)
    sketch = resolve(sketch, CountSketch("isometric"), Projection)
    if refresh_every is not None:
        refresh_every = check.check_steps(
            "refresh_every", refresh_every, "use None to keep the first basis"
        )
    check.check_bool("stagger", stagger)
    check.check_bool("error_feedback", error_feedback)
    check.check_number("scale", scale, 0, None, "0.25 is GaLore's")
    sketcher = Sketcher(_NAME, sketch)
    basis = Basis(sketcher, refresh_every, stagger)
    rest = Residual() if residual is None else residual
    _check_objects(basis, rest, transport, error_feedback)
    settings = {"refresh_every": refresh_every, "stagger": stagger or None}

    def init_fn(params: PyTree) -> SubspaceState:
        plans = basis.plan(params)
        warn_if_dense(_NAME, plans)
        sketches = _zero_sketches(params, plans)
        inner_state = inner.init(sketches)
        if transport.moves:
            check_moments(transport, inner_state, sketches)
        kept = {
            field: trees.zeros_tree(params, shapes, dtype)
            for field, (shapes, dtype) in kept_leaves(plans).items()
        }
        count, key = jnp.zeros([], jnp.int32), jnp.array(sketch.key_data)
        spec = sketcher.spec(plans, **settings)
        return SubspaceState(count, key, spec, inner_state, **kept)

    def kept_leaves(plans: Sequence[LeafPlan]) -> dict[str, tuple[list[Shape], Any]]:
        """Shapes and dtype of each tree that the state keeps beside the inner one."""
        kept = {}
        if basis.is_stored:
            shapes = [basis.stored_shape(plan) for plan in plans]
            kept["basis"] = shapes, sketcher.projection.dtype
        if rest.is_limited:
            shapes = [plan.resized(1, 1, plan.ones) for plan in plans]
            kept["limiter"] = shapes, jnp.float32
        if error_feedback:
            shapes = [plan.ones if plan.dense else plan.shape for plan in plans]
            kept["error"] = shapes, jnp.float32
        return kept

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        on_sketch: Callable[[SketchEvent], None] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SubspaceState]:
        del params
        check_state_key(_NAME, state.key)
        refuse_sketches(_NAME, updates, "its inner optimizer squares its own sketches")
        plans = basis.plan(updates)
        # In the boxes that init gave to inner: a sketch has other axis names than its
        # leaf.
        boxes = _zero_sketches(updates, plans)
        groups = find_moments(state.inner, boxes)
        _check_inner(plans, groups, state.inner)
        kept = {
            name: trees.matching_leaves(_NAME, name, getattr(state, name), plans, own)
            for name, (own, _) in kept_leaves(plans).items()
        }
        none = [None] * len(plans)
        stored, limits, error = (kept.get(name, none) for name in _KEPT)
        grads = jax.tree.leaves(updates)
        moments = _by_leaf(groups if transport.moves else [], len(plans))
        # Injected numbers have the dtype of the parameters.
        how, *numbers = jax.tree.map(_AS_FLOAT32, (transport, rest, scale))

        # What is sampled is replicated, as the key is.
        sketches, sampled, stored, moments = trees.run_sharded(
            functools.partial(_enter, basis, plans, on_sketch),
            (jax.tree.leaves(boxes), state.key, stored, moments),
            (grads, error, stored, moments),
            Refresh(how, state.key, state.count),
        )
        inner_state = state.inner
        if transport.moves:
            inner_state = _with_moments(inner_state, boxes, groups, moments)
        directions, new_inner = inner.update(
            trees.rebuild(boxes, sketches), inner_state, None, **extra_args
        )
        found = sampled, sketches, jax.tree.leaves(directions)
        results = trees.run_sharded(
            functools.partial(_leave, sketcher, plans),
            list(zip(grads, limits, error, strict=True)),
            list(zip(grads, limits, error, *found, strict=True)),
            state.count,
            *numbers,
        )
        new_updates, limits, error = zip(*results, strict=True) if results else 3 * [[]]
        new = {"basis": stored, "limiter": limits, "error": error}
        return trees.rebuild(updates, new_updates), state._replace(
            count=optax.safe_increment(state.count),
            inner=jax.tree.map(trees.cast_like, new_inner, state.inner),
            **{name: trees.rebuild(getattr(state, name), new[name]) for name in kept},
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _enter(
    basis: Basis,
    plans: Sequence[LeafPlan],
    on_sketch: Callable[[SketchEvent], None] | None,
    leaves: tuple[list[Any], ...],
    refresh: Refresh,
) -> tuple[list[jax.Array], list[Any], list[Any], list[list[Moments]]]:
    """Sketches of all leaves in bases that are renewed where that is due."""
    (grads, error, stored, moments), sketcher = leaves, basis.sketcher
    full = list(map(_corrected, plans, grads, error))
    sampled, stored, moments = basis.renew(plans, full, stored, moments, refresh)
    # Once more, so that how a basis is chosen on a mesh does not decide where
    # the sketches lie; on one device the compiler makes one of both.
    sketches, full = [], map(_corrected, plans, grads, error)
    for plan, own, leaf in zip(plans, sampled, full, strict=True):
        given = ScaledLeaf(leaf)
        new = sketcher.sketch_leaf(plan, own, given)
        sketches.append(new)
        if on_sketch is not None and not plan.dense:
            on_sketch(SketchEvent(sketcher, plan, own, given, new, new))
    return sketches, sampled, stored, moments


def _leave(
    sketcher: Sketcher,
    plans: Sequence[LeafPlan],
    leaves: list[tuple[Any, ...]],
    count: jax.Array,
    residual: Residual,
    scale: Any,
) -> list[tuple[jax.Array, Any, Any]]:
    """For each leaf its update, limiter and error."""
    numbers, results = (scale, residual.correction(count)), []
    for plan, leaf in zip(plans, leaves, strict=True):
        given, limit, left, sampled, sketch, direction = leaf
        update = direction.astype(jnp.float32)
        if not plan.dense:
            grad = _corrected(plan, given, left)
            seen = grad, sampled, sketch, update
            step = LeafStep(sketcher, plan, *seen, *numbers, limit)
            update, limit = residual.update(step)
            if left is not None:
                left = grad - step.expanded(sketch)
        results.append((update.astype(given.dtype), limit, left))
    return results


def _corrected(plan: LeafPlan, grad: jax.Array, left: Any) -> jax.Array:
    """The gradient with what earlier sketches have left out."""
    if plan.dense or left is None:
        return grad
    return grad.astype(jnp.float32) + left


def _check_objects(
    basis: Basis, residual: Any, transport: Any, error_feedback: bool
) -> None:
    """Raises unless residual and transport suit each other and the projection."""
    if not isinstance(residual, Residual):
        raise TypeError(
            "`residual` must be None, Plain(), Fira(), FiraCode() or Apollo(), got"
            f" {residual!r}; pass an instance"
        )
    if not isinstance(transport, Transport):
        raise TypeError(
            "`transport` must be Keep(), Squared(), LDAdam(), PreserveRMS() or Reset(),"
            f" got {transport!r}; pass an instance"
        )
    residual.check()
    if error_feedback and not residual.is_partial:
        raise ValueError(
            "`error_feedback` keeps what the update leaves out, got"
            f" residual={residual}, which leaves out nothing; use residual=None"
        )
    transport.check()
    projection = basis.sketcher.projection
    needs = {
        "transport": transport.needs_isometry and transport,
        "residual": residual.needs_isometry and residual,
        "error_feedback": error_feedback,
    }
    for name, value in needs.items():
        if value and projection.normalization != "isometric":
            raise ValueError(
                f"`{name}` {value} needs a projection with orthonormal rows, got"
                f" {projection}; use CountSketch(normalization='isometric')"
            )
    if transport.needs_random_basis and basis.is_stored:
        raise ValueError(
            f"`transport` {transport} is for bases that a key regenerates, got"
            f" {projection}, whose moments it would inflate; use Squared() or LDAdam()"
        )


def _zero_sketches(like: PyTree, plans: Sequence[LeafPlan]) -> PyTree:
    return trees.zeros_tree(like, [plan.state_shape for plan in plans], jnp.float32)


def _check_inner(plans: Sequence[LeafPlan], groups: Groups, inner: Any) -> None:
    """Raises if the inner state's moments are not those of these gradients."""
    shapes = [plan.state_shape for plan in plans]
    found = [tree for group in groups for tree in group.values()]
    if found and all([x.shape for x in jax.tree.leaves(t)] == shapes for t in found):
        return
    for group in find_moments(inner, None):
        for field, tree in group.items():
            if all(jnp.ndim(x) == 0 for x in jax.tree.leaves(tree)):
                continue  # A user's number, no moments.
            own = plans
            # optax.masked leaves some to others.
            if any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked))):
                known = {path for path, _ in named_leaves(tree)}
                own = [plan for plan in plans if plan.path in known]
            shapes = [plan.state_shape for plan in own]
            trees.matching_leaves(_NAME, f"inner.{field}", tree, own, shapes)


def _by_leaf(groups: Groups, count: int) -> list[list[Moments]]:
    """For each leaf the moments of each NamedTuple, by field."""
    flat = [{k: jax.tree.leaves(x) for k, x in group.items()} for group in groups]
    return [
        [{k: x[i] for k, x in group.items()} for group in flat] for i in range(count)
    ]


def _with_moments(inner: Any, boxes: PyTree, groups: Groups, moments: Any) -> Any:
    """The inner state with the moments of all leaves replaced."""
    new = [
        {
            k: trees.rebuild(x, [leaf[i][k] for leaf in moments])
            for k, x in group.items()
        }
        for i, group in enumerate(groups)
    ]
    return replace_moments(inner, boxes, new)
