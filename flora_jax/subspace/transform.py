"""Any optimizer inside a subspace of each gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation as check
from flora_jax._typing import PyTree, Shape
from flora_jax.leaves.moments import find_moments, replace_moments
from flora_jax.leaves.paths import is_masked, named_leaves
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.trees import (
    cast_like,
    matching_leaves,
    rebuild,
    run_sharded,
    zeros_tree,
)
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
from flora_jax.subspace.basis import Basis
from flora_jax.subspace.residuals import LeafStep, Residual
from flora_jax.subspace.transports import Keep, Moments, check_moments

_NAME = "scale_in_subspace"
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
    basis: Any
    limiter: Any
    error: Any


def scale_in_subspace(
    inner: optax.GradientTransformation,
    sketch: Sketch | int,
    refresh_every: int | jax.Array | None = 200,
    *,
    residual: Residual | None = None,
    transport: Keep = Keep(),  # noqa: B008 (frozen)
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
    _check_objects(basis, residual, transport, error_feedback)
    rest = Residual() if residual is None else residual

    def init_fn(params: PyTree) -> SubspaceState:
        plans = basis.plan(params)
        warn_if_dense(_NAME, plans)
        shapes = [plan.state_shape for plan in plans]
        sketches = zeros_tree(params, shapes, jnp.float32)
        inner_state = inner.init(sketches)
        if transport.moves:
            check_moments(transport, inner_state, sketches)

        kept = _kept_shapes(basis, rest, error_feedback, plans)
        stored = sketcher.projection.dtype if basis.is_stored else None
        return SubspaceState(
            count=jnp.zeros([], jnp.int32),
            key=jnp.array(sketch.key_data),
            spec=sketcher.spec(
                plans, refresh_every=refresh_every, stagger=stagger or None
            ),
            inner=inner_state,
            basis=_zeros(params, kept["basis"], stored),
            limiter=_zeros(params, kept["limiter"]),
            error=_zeros(params, kept["error"]),
        )

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
        shapes = [plan.state_shape for plan in plans]
        boxes = zeros_tree(updates, shapes, jnp.float32)
        groups = find_moments(state.inner, boxes)
        _check_inner(plans, shapes, groups, state.inner)
        groups = groups if transport.moves else []
        kept = _kept_shapes(basis, rest, error_feedback, plans)
        stored, limits, error = (
            matching_leaves(_NAME, field, getattr(state, field), plans, own)
            if own is not None
            else []
            for field, own in kept.items()
        )
        grads = jax.tree.leaves(updates)
        moments = _by_leaf(groups, len(plans))
        # Injected numbers have the dtype of the parameters.
        numbers = jax.tree.map(_AS_FLOAT32, (transport, rest, scale))

        def enter(arrays: Any, root: jax.Array, count: jax.Array, how: Keep) -> Any:
            grads, error, stored, moments = arrays
            full = _corrected(plans, grads, error)
            sampled, stored, moments = basis.renew(
                plans, full, stored, moments, how, root, count
            )
            # Once more, so that how a basis is chosen on a mesh does not decide where
            # the sketches lie; on one device the compiler makes one of both.
            sketches, full = [], _corrected(plans, grads, error)
            for plan, own, leaf in zip(plans, sampled, full, strict=True):
                given = ScaledLeaf(leaf)
                sketches.append(sketcher.sketch_leaf(plan, own, given))
                if on_sketch is not None and not plan.dense:
                    new = sketches[-1]
                    on_sketch(SketchEvent(sketcher, plan, own, given, new, new))
            return sketches, sampled, stored, moments

        # What is sampled is replicated, as the key is.
        sketches, sampled, stored, moments = run_sharded(
            enter,
            (jax.tree.leaves(boxes), state.key, stored, moments),
            (grads, error, stored, moments),
            state.key,
            state.count,
            numbers[0],
        )
        directions, new_inner = inner.update(
            rebuild(boxes, sketches),
            _with_moments(state.inner, boxes, groups, moments),
            None,
            **extra_args,
        )

        def leave(arrays: Any, count: jax.Array, how: tuple[Residual, Any]) -> Any:
            (grads, error, limits, *found), (residual, scale) = arrays, how
            correction = residual.correction(count)
            new_updates, new_limits, new_error = [], list(limits), list(error)
            full = _corrected(plans, grads, error)
            leaves = zip(plans, full, *found, strict=True)
            for i, (plan, grad, own, new, direction) in enumerate(leaves):
                update = direction.astype(jnp.float32)
                if not plan.dense:
                    step = LeafStep(sketcher, plan, grad, own, new, update)
                    limit = limits[i] if limits else None
                    update, limit = residual.update(step, scale, limit, correction)
                    if limits:
                        new_limits[i] = limit
                    if error:
                        new_error[i] = grad - step.expanded(new)
                new_updates.append(update.astype(grads[i].dtype))
            return new_updates, new_limits, new_error

        new_updates, limits, error = run_sharded(
            leave,
            (grads, limits, error),
            (grads, error, limits, sampled, sketches, jax.tree.leaves(directions)),
            state.count,
            numbers[1:],
        )
        return rebuild(updates, new_updates), SubspaceState(
            count=optax.safe_increment(state.count),
            key=state.key,
            spec=state.spec,
            inner=jax.tree.map(cast_like, new_inner, state.inner),
            basis=rebuild(state.basis, stored),
            limiter=rebuild(state.limiter, limits),
            error=rebuild(state.error, error),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_objects(
    basis: Basis, residual: Any, transport: Any, error_feedback: bool
) -> None:
    """Raises unless residual and transport suit each other and the projection."""
    if residual is not None and not isinstance(residual, Residual):
        raise TypeError(
            "`residual` must be None, Plain(), Fira(), FiraCode() or Apollo(), got"
            f" {residual!r}; pass an instance"
        )
    if not isinstance(transport, Keep):
        raise TypeError(
            "`transport` must be Keep(), Squared(), LDAdam(), PreserveRMS() or Reset(),"
            f" got {transport!r}; pass an instance"
        )
    projection = basis.sketcher.projection
    needs: dict[str, Any] = {
        "transport": transport if transport.needs_isometry else None
    }
    if residual is not None:
        residual.check()
        needs["residual"] = residual if residual.needs_isometry else None
        if error_feedback and not residual.is_partial:
            raise ValueError(
                "`error_feedback` keeps what the update leaves out, got"
                f" residual={residual}, which leaves out nothing; use residual=None"
            )
    transport.check()
    needs["error_feedback"] = error_feedback or None
    for name, value in needs.items():
        if value is not None and projection.normalization != "isometric":
            raise ValueError(
                f"`{name}` {value} needs a projection with orthonormal rows, got"
                f" {projection}; use CountSketch(normalization='isometric')"
            )
    if transport.needs_random_basis and basis.is_stored:
        raise ValueError(
            f"`transport` {transport} is for bases that a key regenerates, got"
            f" {projection}, whose moments it would inflate; use Squared() or LDAdam()"
        )


def _kept_shapes(
    basis: Basis, residual: Residual, error_feedback: bool, plans: Sequence[LeafPlan]
) -> dict[str, list[Shape] | None]:
    """Shapes of what a state keeps beside the inner one; None for what it does not."""
    stored = limits = errors = None
    if basis.is_stored:
        stored = [basis.stored_shape(plan) for plan in plans]
    if residual.is_limited:
        limits = [plan.resized(1, 1, plan.ones) for plan in plans]
    if error_feedback:
        errors = [plan.ones if plan.dense else plan.shape for plan in plans]
    return {"basis": stored, "limiter": limits, "error": errors}


def _zeros(params: PyTree, shapes: list[Shape] | None, dtype: Any = None) -> PyTree:
    """A tree of zeros, float32 unless told otherwise; () for what is not kept."""
    return () if shapes is None else zeros_tree(params, shapes, dtype or jnp.float32)


def _check_inner(
    plans: Sequence[LeafPlan],
    shapes: list[Shape],
    groups: Sequence[dict[str, PyTree]],
    inner: Any,
) -> None:
    """Raises if the inner state's moments are not those of these gradients."""
    found = [tree for group in groups for tree in group.values()]
    if found and all([x.shape for x in jax.tree.leaves(t)] == shapes for t in found):
        return
    for group in find_moments(inner, None):
        for field, tree in group.items():
            if all(jnp.ndim(x) == 0 for x in jax.tree.leaves(tree)):
                continue  # A user's number, no moments.
            own = list(zip(plans, shapes, strict=True))
            # optax.masked leaves some to others.
            if any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked))):
                known = {path for path, _ in named_leaves(tree)}
                own = [leaf for leaf in own if leaf[0].path in known]
            matching_leaves(
                _NAME, f"inner.{field}", tree, [x for x, _ in own], [x for _, x in own]
            )


def _by_leaf(groups: Sequence[dict[str, PyTree]], count: int) -> list[list[Moments]]:
    """For each leaf the moments of each NamedTuple, by field."""
    flat = [{k: jax.tree.leaves(x) for k, x in group.items()} for group in groups]
    return [
        [{k: x[i] for k, x in group.items()} for group in flat] for i in range(count)
    ]


def _with_moments(
    state: Any,
    boxes: PyTree,
    groups: Sequence[dict[str, PyTree]],
    moments: Sequence[list[Moments]],
) -> Any:
    """The inner state with the moments of all leaves replaced."""
    if not groups:
        return state
    new = [
        {
            k: rebuild(tree, [leaf[i][k] for leaf in moments])
            for k, tree in group.items()
        }
        for i, group in enumerate(groups)
    ]
    return replace_moments(state, boxes, new)


def _corrected(
    plans: Sequence[LeafPlan], grads: Sequence[jax.Array], error: Sequence[jax.Array]
) -> list[jax.Array]:
    """The gradients with what earlier sketches have left out."""
    if not error:
        return list(grads)
    return [
        grad if plan.dense else grad.astype(jnp.float32) + left
        for plan, grad, left in zip(plans, grads, error, strict=True)
    ]
