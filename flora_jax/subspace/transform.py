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
from flora_jax.leaves.in_place import APPLY
from flora_jax.leaves.moments import find_moments, replace_moments
from flora_jax.leaves.paths import is_masked, named_leaves
from flora_jax.leaves.plan import LeafPlan
from flora_jax.projections.base import Projection
from flora_jax.projections.count_sketch import CountSketch
from flora_jax.random.keys import check_state_key
from flora_jax.sketching.sketch import Sketch, check_leaves, resolve
from flora_jax.sketching.sketcher import (
    Apply,
    OnSketch,
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
    transport: Transport = Keep(),
    scale: jax.typing.ArrayLike = 1.0,
    error_feedback: bool = False,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Runs a transformation on sketches of the updates, and expands its result.

    For a leaf folded to G (n x m) with its columns sketched by S (r x m, orthonormal
    rows), ``inner`` maps R = G Sᵀ to N. With α = ``scale``, the update is α·N S, to
    which ``residual`` may add what the sketch does not see:

    - None: nothing (GaLore);
    - :class:`flora_jax.Plain`: G − R S;
    - :class:`flora_jax.Fira`: φ·(G − R S), φ_i = ‖N_i‖/(‖R_i‖ + 1e-8) for each row i,
      with limited growth; :class:`flora_jax.FiraCode`: φ·(G − α·R S), as in the code
      published with that paper;
    - :class:`flora_jax.Apollo`: the update is α·φ·G instead, which needs no
      orthonormal S.

    Every T steps S is replaced by S′, and ``transport`` says how the first moments m of
    ``inner`` (fields named ``mu``, ``ema``, ``momentum``; also the sums ``trace`` and
    ``acc_grads``) and the second ones v (``nu``) are carried over:

    - :class:`flora_jax.Keep`: unchanged (GaLore, APOLLO);
    - :class:`flora_jax.Squared`: m T and v T∘T, with T = S S′ᵀ and its elementwise
      square T∘T;
    - :class:`flora_jax.LDAdam`: m T, and the variance about the mean is moved;
    - :class:`flora_jax.PreserveRMS`: like the second, with sizes that do not change;
    - :class:`flora_jax.Reset`: they start anew from R.

    Leaves that are not sketched are given to ``inner`` as they are.

    A refresh runs when it is due; under ``optax.MultiSteps``, which runs its inner
    transformation at every micro-step, and under ``jax.vmap``, which runs it for all if
    it is due for one, it is paid for more often: prefer
    :func:`flora_jax.compressed_accumulation`. In ``jax.jit`` an update that may
    move moments to another random basis cannot be differentiated in reverse mode.

    Memory: what ``inner`` keeps for r·max(n, m) elements instead of n·m
    (``side="smaller"``), a stored basis of ``TopSVD`` (r·width elements) or ``TopDCT``
    (r), one element per matrix with a limiter, n·m with error feedback.

    Args:
      inner: a transformation that needs no parameters, such as
        ``optax.scale_by_adam()``. It must not negate or scale by the learning rate; add
        ``optax.scale_by_learning_rate`` after it in the chain.
      sketch: the sketch, or its rank; ``CountSketch(normalization="isometric")`` unless
        it has a projection, which may be oblivious, ``TopSVD()`` or ``TopDCT()``.
      refresh_every: T, in updates; it may be traced but must not change. None keeps the
        first basis.
      residual: how the component of G outside the subspace is handled; one of the
        above, or another :class:`flora_jax.Residual`.
      transport: how ``inner``'s moments are carried over when S is replaced; one of the
        above, or another :class:`flora_jax.Transport`.
      scale: α.
      error_feedback: add what the sketch left out to the next gradient; without a
        residual.
      stagger: replace the bases of different leaves at different steps, evenly spread
        over T, so that after the first step no single step refreshes every leaf.

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
    check.check_number("scale", scale, 0, None, "GaLore uses 0.25")
    sketcher = Sketcher(_NAME, sketch)
    basis = Basis(sketcher, refresh_every, stagger)
    rest = Residual() if residual is None else residual
    _check_objects(basis, rest, transport, error_feedback)
    settings = {"refresh_every": refresh_every, "stagger": stagger or None}

    def init_fn(params: PyTree) -> SubspaceState:
        plans = basis.plan(params)
        check_leaves(_NAME, sketch, plans, params)
        sketches = trees.zero_sketches(params, plans, jnp.float32)
        inner_state = inner.init(sketches)
        if transport.moves:
            check_moments(transport, inner_state, sketches)
        kept = {
            field: trees.zeros_tree(params, plans, shapes, dtype)
            for field, (shapes, dtype) in kept_leaves(plans).items()
        }
        count, key = jnp.zeros([], jnp.int32), jnp.array(sketch.key_data)
        spec = sketcher.spec(plans, **settings)
        return SubspaceState(count, key, spec, inner_state, **kept)

    def kept_leaves(plans: Sequence[LeafPlan]) -> dict[str, tuple[list[Shape], Any]]:
        """Shapes and dtype of each tree that is kept in addition to the inner state."""
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
        on_sketch: OnSketch = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SubspaceState]:
        in_place = extra_args.pop(APPLY, None)
        if in_place is not None and not in_place.is_for_recipe(params):
            in_place = None
        check_state_key(_NAME, state.key)
        refuse_sketches(_NAME, updates, "its inner optimizer squares its own sketches")
        plans = basis.plan(updates)
        # In the boxes that init gave to inner: a sketch has other axis names than its
        # leaf.
        boxes = trees.zero_sketches(updates, plans, jnp.float32)
        groups = find_moments(state.inner, boxes)
        _check_inner(plans, groups, state.inner)
        kept = {
            name: trees.matching_leaves(_NAME, name, getattr(state, name), plans, own)
            for name, (own, _) in kept_leaves(plans).items()
        }
        none = [None] * len(plans)
        stored = kept.get("basis", none)
        norms, errors = kept.get("limiter", none), kept.get("error", none)
        grads = jax.tree.leaves(updates)
        moments = _by_leaf(groups if transport.moves else [], len(plans))

        # Squares and what is sampled are replicated, as the key is.
        sketches, squares, sampled, stored, moments = trees.run_sharded(
            functools.partial(_sketch_in_current_basis, basis, plans, on_sketch),
            (jax.tree.leaves(boxes), state.key, state.key, stored, moments),
            grads,
            errors,
            stored,
            moments,
            # Injected hyperparameters have the dtype of the parameters.
            Refresh(jax.tree.map(jnp.float32, transport), state.key, state.count),
        )
        inner_state = state.inner
        if transport.moves:
            inner_state = _with_moments(inner_state, boxes, groups, moments)
        directions, new_inner = inner.update(
            trees.rebuild(boxes, sketches), inner_state, None, **extra_args
        )
        new = jax.tree.leaves(directions)
        fields = grads, norms, errors, sampled, sketches, squares, new
        leaves = [LeafInputs(*leaf) for leaf in zip(*fields, strict=True)]
        apply, own, arguments = None, none, none
        if in_place is not None:
            apply, own = in_place.apply, jax.tree.leaves(params)
            arguments = in_place.arguments()
        results = trees.run_sharded(
            functools.partial(_expand_and_add_residual, sketcher, plans, apply),
            list(map(LeafResult, grads if apply is None else own, norms, errors)),
            leaves,
            own,
            arguments,
            state.count,
            *jax.tree.map(jnp.float32, (rest, scale)),
        )
        norms, errors = [x.residual_norm for x in results], [x.error for x in results]
        new = {"basis": stored, "limiter": norms, "error": errors}
        new_updates = [x.update for x in results]
        if in_place is None:
            new_updates = trees.rebuild(updates, new_updates)
        else:
            in_place.params = trees.rebuild(params, new_updates)
            new_updates = in_place
        return new_updates, state._replace(
            count=optax.safe_increment(state.count),
            inner=jax.tree.map(trees.cast_like, new_inner, state.inner),
            **{name: trees.rebuild(getattr(state, name), new[name]) for name in kept},
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class LeafInputs(NamedTuple):
    """What a leaf's update is made of, after ``inner``.

    Attributes:
      grad: the gradient that was given.
      residual_norm: norm of the last residual, one per matrix; None without a limiter.
      error: what earlier sketches left out; None without error feedback.
      sampled: what determines S; None for a dense leaf.
      sketch: R, or a dense leaf's gradient.
      squares: as in :class:`~flora_jax.subspace.residuals.LeafStep`; None for a dense
        leaf.
      direction: N.
    """

    grad: jax.Array
    residual_norm: jax.Array | None
    error: jax.Array | None
    sampled: Any
    sketch: jax.Array
    squares: Any
    direction: jax.Array


class LeafResult(NamedTuple):
    """A leaf's update or its new parameter, and its new residual_norm and error."""

    update: Any
    residual_norm: jax.Array | None
    error: jax.Array | None


def _sketch_in_current_basis(
    basis: Basis,
    plans: Sequence[LeafPlan],
    on_sketch: OnSketch,
    grads: Sequence[jax.Array],
    errors: Sequence[Any],
    stored: Sequence[Any],
    moments: Sequence[list[Moments]],
    refresh: Refresh,
) -> tuple[list[jax.Array], list[Any], list[Any], list[Any], list[list[Moments]]]:
    """Sketches and squares of all leaves, in bases that are renewed where due."""
    sketcher = basis.sketcher
    corrected = list(map(_add_error, plans, grads, errors))
    sampled, stored, moments = basis.renew(plans, corrected, stored, moments, refresh)
    # Once more, so that how a basis is chosen on a mesh does not decide where
    # the sketches lie; on one device the compiler makes one of both.
    corrected = map(_add_error, plans, grads, errors)
    sketches, squares = [], []
    for plan, own, grad in zip(plans, sampled, corrected, strict=True):
        given = ScaledLeaf(grad)
        new, own_squares = sketcher.sketch_with_squares(plan, own, given)
        sketches.append(new)
        squares.append(own_squares)
        if on_sketch is not None and not plan.dense:
            on_sketch(SketchEvent(sketcher, plan, own, given, new, new))
    return sketches, squares, sampled, stored, moments


def _expand_and_add_residual(
    sketcher: Sketcher,
    plans: Sequence[LeafPlan],
    apply: Apply | None,
    leaves: Sequence[LeafInputs],
    params: Sequence[Any],
    arguments: Sequence[Any],
    count: jax.Array,
    residual: Residual,
    scale: Any,
) -> list[LeafResult]:
    """Updates of all leaves in the full space, or their new parameters."""
    settings = residual, scale, residual.correction(count)
    full_update, results = functools.partial(_full_update, sketcher, *settings), []
    layers = functools.partial(_update_layers, full_update, apply)
    for plan, leaf, param, own in zip(plans, leaves, params, arguments, strict=True):
        arrays = leaf._replace(sampled=None), own
        new, result = sketcher.by_layers(layers, plan, leaf.sampled, arrays, param)
        results.append(result if apply is None else result._replace(update=new))
    return results


def _update_layers(
    full_update: Callable[..., LeafResult],
    apply: Apply | None,
    plan: LeafPlan,
    sampled: Any,
    arrays: tuple[LeafInputs, Any],
    param: Any,
) -> tuple[Any, LeafResult]:
    """The new parameter of some layers and the rest of their results, or all of it."""
    leaf, arguments = arrays
    result = full_update(plan, leaf._replace(sampled=sampled))
    update = result.update.astype(leaf.grad.dtype)
    if apply is None:
        return None, result._replace(update=update)
    return apply(arguments, update, param), result._replace(update=None)


def _full_update(
    sketcher: Sketcher,
    residual: Residual,
    scale: Any,
    correction: Any,
    plan: LeafPlan,
    leaf: LeafInputs,
) -> LeafResult:
    """A leaf's update in the full space, with its new norm and error."""
    norm, error = leaf.residual_norm, leaf.error
    update = leaf.direction.astype(jnp.float32)
    if plan.dense:
        return LeafResult(update, norm, error)
    grad = _add_error(plan, leaf.grad, error)
    step = LeafStep(
        sketcher=sketcher,
        plan=plan,
        grad=grad,
        sampled=leaf.sampled,
        sketch=leaf.sketch,
        squares=leaf.squares,
        direction=update,
        scale=scale,
        correction=correction,
        residual_norm=norm,
    )
    update, norm = residual.update(step)
    if error is not None:
        error = grad - step.expanded(leaf.sketch)
    return LeafResult(update, norm, error)


def _add_error(plan: LeafPlan, grad: jax.Array, error: Any) -> jax.Array:
    """The gradient with what earlier sketches have left out."""
    if plan.dense or error is None:
        return grad
    return grad.astype(jnp.float32) + error


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
    if transport.needs_isometry:
        _check_orthonormal(f"`transport` {transport}", projection)
    if residual.needs_isometry:
        _check_orthonormal(f"`residual` {residual}", projection)
    if error_feedback:
        _check_orthonormal("`error_feedback`", projection)
    if transport.needs_random_basis and basis.is_stored:
        raise ValueError(
            f"`transport` {transport} is for bases that a key regenerates, got"
            f" {projection}, whose moments it would inflate; use Squared() or LDAdam()"
        )


def _check_orthonormal(what: str, projection: Projection) -> None:
    """Raises unless the projection's rows are orthonormal, for what needs that."""
    if projection.normalization != "isometric":
        raise ValueError(
            f"{what} needs a projection with orthonormal rows, got {projection}; use"
            " CountSketch(normalization='isometric')"
        )


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
        trees.rebuild(x, [leaf[i][k] for leaf in moments])
        for i, group in enumerate(groups)
        for k, x in group.items()
    ]
    return replace_moments(inner, boxes, new)
