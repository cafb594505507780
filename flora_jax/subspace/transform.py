"""Any optimizer inside a subspace of each gradient."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation as _checks
from flora_jax.random import keys as _keys
from flora_jax.leaves import trees as _state
from flora_jax.leaves.rules import LeafRules
from flora_jax.projections import AdaptiveProjection, Projection
from flora_jax.sketching.sketched_gradients import refuse_sketches
from flora_jax.subspace.basis import Subspace
from flora_jax.subspace.checks import check_subspace
from flora_jax.subspace.residuals import bring_back
from flora_jax.subspace.update import enter_subspace, leave_subspace
from flora_jax.subspace.transports import moments_of

_NAME = "scale_in_subspace"


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
    projection: Projection,
    rank: Any,
    refresh_every: int | None = 200,
    *,
    transport: str = "keep",
    residual: str = "dropped",
    norms: str = "channel",
    limiter: jax.typing.ArrayLike | None = None,
    scale: jax.typing.ArrayLike = 1.0,
    betas: tuple[Any, Any] | None = None,
    error_feedback: bool = False,
    stagger: bool = False,
    key: Any = 0,
    mask: Any = None,
    min_dim_size: int = 128,
    max_aspect_ratio: float = 16,
    side: str = "smaller",
    weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs a transformation on sketches of the updates, and brings its result back.

    For a leaf folded to G (n x m) with its columns sketched by S (r x m, orthonormal
    rows), R = G Sᵀ is given to ``inner``, which answers N, and the update is, with α =
    ``scale``,

    - ``residual="dropped"``: α·N S (GaLore);
    - ``"plain"``: α·N S + (G − R S);
    - ``"fira"``: α·N S + φ·(G − R S), φ_i = ‖N_i‖/(‖R_i‖ + 1e-8) for each row i, or one
      φ per matrix with ``norms="tensor"``; ``"fira_code"`` takes G − α·R S, as the
      code published with that paper;
    - ``"apollo"``: α·φ·G; this one needs no orthonormal S.

    ``limiter`` is Fira's γ: X = φ·(…), without ``inner``'s debiasing, is divided by
    max(‖X‖/(‖X_prev‖ + 1e-8), γ)/γ, where X_prev is what was applied before; where that
    is zero, X is not limited.

    Every T steps S is replaced. With T = S S′ᵀ from the old basis to the new, first
    moments m (fields named ``mu``, ``ema``, ``momentum``; also the sums ``trace`` and
    ``acc_grads``) and second moments v (``nu``) of ``inner`` become

    - ``transport="keep"``: what they were (GaLore, APOLLO);
    - ``"squared"``: m T and v T∘T, T∘T being the elementwise square;
    - ``"ldadam"``: m T and, with m̂ and v̂ free of bias, the absolute value of
      (v̂ − m̂²) T∘T + (m̂ T)²;
    - ``"rms"``: √(m/r)·m T, and v T∘T with columns divided by their sums, so that an
      oblivious basis changes the size of neither;
    - ``"reset"``: what makes the step Adam's first: m̂ = R, v̂ = R², and sums zero.

    Leaves that are not sketched are given to ``inner`` as they are.

    A refresh is a branch that runs when it is due; under ``optax.MultiSteps``, which
    runs its inner transformation at every micro-step, and under ``jax.vmap``, which
    runs both branches, it is paid for more often: prefer
    :func:`flora_jax.compressed_accumulation`.

    With an oblivious projection ‖R_i‖ in Fira's φ is at least √(r/m)·‖G_i‖/8: a row
    that cancels in its sketch would else have a boundless φ.

    Memory: what ``inner`` keeps for r·max(n, m) numbers in place of n·m
    (``side="smaller"``), a stored basis of ``TopSVD`` (r·width numbers) or ``TopDCT``
    (r), one number per matrix with a limiter, n·m with error feedback.

    Args:
      inner: a transformation that needs no parameters, such as
        ``optax.scale_by_adam()``; one that keeps the direction of the gradient: the
        learning rate, with its sign, follows in the chain.
      projection: where S comes from: ``TopSVD()``, ``TopDCT()``, or an oblivious one,
        ``CountSketch(scale="isometric")``.
      rank: sketch size r; an int, a callable of (path, shape), or a tree of ints.
      refresh_every: T, in updates; None keeps the first basis.
      transport: what becomes of ``inner``'s moments when S is replaced.
      residual: what becomes of the part of G outside of the subspace.
      norms: ``"channel"`` or ``"tensor"``.
      limiter: γ > 0, 1.01 in Fira; None for none.
      scale: α.
      betas: decays (β1, β2) with which ``inner`` debiases its moments as Adam does, the
        same that it has; None if it does not.
      error_feedback: add what the sketch left out to the next gradient; with
        ``residual="dropped"``.
      stagger: replace the bases of different leaves at different steps, evenly spread
        over T, so that no step but the first pays for all.
      key: int seed, typed threefry2x32 key, or its key data.
      mask: which leaves may be sketched; see :func:`flora_jax.plan_leaves`.
      min_dim_size: smallest side of a matrix that is sketched.
      max_aspect_ratio: largest ratio of its sides.
      side: which side is sketched.
      weight_dimension_numbers: which axes form the matrix, in optax's convention.

    Returns:
      The gradient transformation. Updates have the dtype of the gradients.

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
      ...         optax.scale_by_adam(b2=0.99),
      ...         fj.CountSketch(scale="isometric"),
      ...         rank=32,
      ...         transport="squared"),
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
    rules = LeafRules(
        rank, mask, min_dim_size, max_aspect_ratio, side, weight_dimension_numbers
    )
    if refresh_every is not None:
        refresh_every = _checks.check_steps(
            "refresh_every", refresh_every, "use None to keep the first basis"
        )
    subspace = Subspace(_NAME, rules, projection, refresh_every, stagger, transport)
    check_subspace(subspace, residual, norms, limiter, scale, betas, error_feedback)
    inner = _checks.check_transformation("inner", inner)
    root = _keys.raw_key(key)

    def init_fn(params: Any) -> SubspaceState:
        plans = subspace.plan(params)
        sketches = [plan.state_shape for plan in plans]
        inner_state = inner.init(_state.zeros_tree(params, sketches, jnp.float32))
        if transport != "keep":
            moments_of(inner_state, plans, transport)

        shapes = subspace.shapes(plans)

        def tree(used: bool, field: str, dtype: Any = jnp.float32) -> Any:
            return _state.zeros_tree(params, shapes[field], dtype) if used else ()

        dtype = None
        if isinstance(projection, AdaptiveProjection):
            dtype = projection.dtype
        return SubspaceState(
            count=jnp.zeros([], jnp.int32),
            key=jnp.array(root),
            spec=subspace.spec(root, refresh_every=refresh_every, stagger=stagger),
            inner=inner_state,
            basis=tree(subspace.adaptive, "basis", dtype),
            limiter=tree(limiter is not None, "limiter"),
            error=tree(error_feedback, "error"),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SubspaceState]:
        del params
        _keys.check_state_key(_NAME, state.key)
        refuse_sketches(_NAME, updates, "its inner optimizer squares its own sketches")
        plans = subspace.plan(updates)
        # Injected numbers have the dtype of the parameters.
        scale32, limiter32, betas32 = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float32), (scale, limiter, betas)
        )
        sketches, basis, inner_state = enter_subspace(
            subspace, plans, updates, state, betas32
        )
        directions, new_inner = inner.update(sketches, inner_state, None, **extra_args)
        new_updates, limits, error = leave_subspace(
            functools.partial(bring_back, subspace, residual, norms),
            subspace,
            plans,
            updates,
            state,
            (basis, jax.tree.leaves(sketches), jax.tree.leaves(directions)),
            (scale32, limiter32, betas32),
        )
        return _state.rebuild(updates, new_updates), SubspaceState(
            count=optax.safe_increment(state.count),
            key=state.key,
            spec=state.spec,
            inner=jax.tree.map(_state.cast_like, new_inner, inner_state),
            basis=_state.rebuild(state.basis, basis),
            limiter=_state.rebuild(state.limiter, limits),
            error=_state.rebuild(state.error, error),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
