"""Momentum kept as a sketch (the paper's Algorithm 2)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from flora_jax import _validation
from flora_jax._typing import PyTree
from flora_jax._xla import renewed_if
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.trees import cast_like, matching_leaves, rebuild, zero_sketches
from flora_jax.projections.count_sketch import CountSketch
from flora_jax.projections.linalg import along
from flora_jax.random.keys import check_state_key, renewal
from flora_jax.sketching.sketch import Sketch, check_leaves, resolve
from flora_jax.sketching.sketcher import (
    EstimatedLeaf,
    OnSketch,
    Plans,
    ScaledLeaf,
    SketchedGradients,
    Sketcher,
    SketchEvent,
    moved_sketch,
    refuse_sketches,
)
from flora_jax.transforms.parts import Part, leafwise

if TYPE_CHECKING:
    from jaxtyping import Array, Float

ESTIMATORS = ("paper", "nesterov", "fresh", "residual")
NAME = "compressed_momentum"
_MAX_NOISE = 0.5  # rho from which init warns: a noise gain of 1/(1 - rho) = 2.


class CompressedMomentumState(NamedTuple):
    """State of :func:`compressed_momentum`.

    Attributes:
      count: number of updates so far, int32.
      epoch: how often the projection was resampled, int32; with ``key`` it determines
        the projection of ``momentum`` and of the next gradient.
      key: root key data, uint32 of shape (2,); it never changes.
      spec: what the state means, for :func:`flora_jax.verify_state`.
      momentum: tree of sketches, one array per parameter leaf.
    """

    count: Any
    epoch: Any
    key: jax.Array
    spec: jax.Array
    momentum: PyTree


def compressed_momentum(
    decay: jax.typing.ArrayLike,
    sketch: Sketch | int,
    *,
    resample_every: int | jax.Array | None = 1000,
    estimator: str = "nesterov",
    dtype: Any = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Exponential moving average of the updates, kept as a random sketch.

    For a leaf folded to G (n x m) with its columns sketched by S (r x m),

    .. math:: M \leftarrow \beta M + (1-\beta)\, G S^\top,

    and every κ steps S is replaced by S′ and the momentum transferred, M ← M S S′ᵀ.
    The estimators differ in the update alone; none of them is debiased. Dense leaves
    get what the uncompressed chain named here gives, which each estimator equals at
    full rank with an orthogonal projection:

    - ``"paper"``: M S, of rank r within one interval;
      ``optax.ema(decay, debias=False)``.
    - ``"nesterov"``: β·M S + (1−β)·G with the new M, of full rank at every step;
      ``optax.chain(optax.scale(1 - decay), optax.trace(decay, nesterov=True))``. The
      official JAX release does this.
    - ``"fresh"``: β·M S + (1−β)·G with the M of the step before: the plain average,
      its newest term exact; ``optax.ema(decay, debias=False)``. The official PyTorch
      release does this.
    - ``"residual"``: momentum inside the subspace, the fresh gradient outside:
      M (S Sᵀ)⁻¹ S + (G − G Π) with Π = Sᵀ(S Sᵀ)⁻¹S; ``optax.ema(decay,
      debias=False)``. For a projection with S Sᵀ = (m/r) I the first term is
      (r/m)·M S. Needs orthogonal rows, so Gaussian is refused.

    An unbiased transfer multiplies E‖M‖² by about m/r: with ρ = β^{2κ}·m/r the noise
    grows by 1/(1−ρ), and from ρ = 1 it diverges; ``init`` warns from 0.5.

    Clip by RMS before this transformation: the unbiased estimate's RMS is
    √(1 + (m+1)/r) (Gaussian) or √(m/r) (CountSketch) times the signal's, so that a clip
    after it shrinks the signal, and learning rates do not carry over unexamined.

    With ``estimator="paper"``, ``update`` also takes sketches in place of gradients,
    from :func:`flora_jax.sketched_value_and_grad`.

    Memory: r·max(n, m) elements of ``dtype`` per sketched leaf (``side="smaller"``),
    the leaf's size for dense ones.

    Args:
      decay: β in [0, 1), a float or a scalar array.
      sketch: the sketch, or its rank; CountSketch unless it names a projection
        (``Gaussian()`` is the paper's).
      resample_every: κ, in updates; 1000 as in the paper. It may be traced. None keeps
        one projection; in ``jax.jit`` updates can be differentiated in reverse mode
        only then.
      estimator: ``"nesterov"``, ``"paper"``, ``"fresh"`` or ``"residual"``. The default
        reached the lowest loss of those that this project has measured.
      dtype: dtype of the momentum; arithmetic is in float32.

    Returns:
      The gradient transformation. Updates have the dtype of the gradients.

    Raises:
      TypeError: for arguments of a wrong type; from update, if the key was cast.
      ValueError: for arguments out of range; from update, if gradients and state do
        not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import flora_jax as fj
      >>> params = {"w": jnp.ones((256, 512))}
      >>> tx = optax.chain(
      ...     optax.scale_by_factored_rms(),
      ...     fj.compressed_momentum(0.9, fj.Sketch(32)),
      ...     optax.scale_by_learning_rate(1e-3))
      >>> state = tx.init(params)
      >>> state[1].momentum["w"].shape
      (32, 512)

    References:
      Hao et al., `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
      <https://arxiv.org/abs/2402.03293>`_, 2024, Algorithm 2
    """
    return leafwise(momentum_part(decay, sketch, resample_every, estimator, dtype))


def momentum_part(
    decay: jax.typing.ArrayLike,
    sketch: Sketch | int,
    resample_every: int | jax.Array | None,
    estimator: str,
    dtype: Any,
) -> Part:
    """:func:`compressed_momentum` as a part of a chain."""
    _validation.check_number("decay", decay, 0, 1, "0.9 is the paper's")
    _validation.check_choice("estimator", estimator, ESTIMATORS)
    if resample_every is not None:
        resample_every = _validation.check_steps(
            "resample_every", resample_every, "use None to keep one projection"
        )
    dtype = _validation.check_state_dtype(dtype)
    sketcher = Sketcher(NAME, resolve(sketch, CountSketch("unbiased")))
    if estimator == "residual" and sketcher.projection.gram_diagonal(1, 1) is None:
        raise ValueError(
            "`estimator` 'residual' needs a projection with orthogonal rows, got"
            f" projection={sketcher.projection}; use CountSketch()"
        )

    def init(params: PyTree) -> CompressedMomentumState:
        plans = sketcher.plan(params)
        check_leaves(NAME, sketcher.sketch, plans, params)
        # Isometric transfers shrink: E‖M S S′ᵀ‖² is about r/m times ‖M‖².
        if sketcher.projection.normalization == "unbiased":
            _warn_if_unstable(plans, decay, resample_every)
        return CompressedMomentumState(
            count=jnp.zeros([], jnp.int32),
            epoch=jnp.zeros([], jnp.int32),
            key=jnp.array(sketcher.sketch.key_data),
            spec=sketcher.spec(plans, dtype=dtype.name, resample_every=resample_every),
            momentum=zero_sketches(params, plans, dtype),
        )

    def plan(updates: PyTree, state: Any) -> tuple[bool, Plans]:
        check_state_key(NAME, state.key)
        if estimator != "paper":
            refuse_sketches(NAME, updates, f"{estimator=} adds the gradient")
        plans = sketcher.plan(updates)
        shapes = [plan.state_shape for plan in plans]
        matching_leaves(NAME, "momentum", state.momentum, plans, shapes)
        return isinstance(updates, SketchedGradients), plans

    step = functools.partial(momentum_step, sketcher, estimator)
    return Part(init, plan, step, (decay, resample_every))


def momentum_step(
    sketcher: Sketcher,
    estimator: str,
    planned: tuple[bool, Plans],
    leaves: Sequence[ScaledLeaf],
    state: CompressedMomentumState,
    on_sketch: OnSketch,
    decay: Any,
    resample_every: Any,
) -> tuple[list[EstimatedLeaf], CompressedMomentumState]:
    """All leaves' updates and the new state, transferred if an interval ends."""
    are_sketches, plans = planned
    old = jax.tree.leaves(state.momentum)
    sampled = sketcher.sample(plans, state.key, state.epoch)
    updates, momentum = [], []
    for plan, s, leaf, m in zip(plans, sampled, leaves, old, strict=True):
        # A sketch, and what is added to the estimate, read the leaf itself.
        leaf = leaf._replace(source=None)
        if are_sketches or plan.dense:
            leaf = leaf if leaf.threshold is None else leaf.clipped()
            fresh = leaf.value()
        else:
            fresh, leaf = sketcher.sketch_clipped(plan, s, leaf)
        # M ← β M + (1−β) G Sᵀ, in float32 whatever the dtype of the state.
        new = decay * m.astype(jnp.float32) + (1 - decay) * fresh
        if on_sketch is not None and not plan.dense:
            normalization = sketcher.projection.normalization
            largest = _largest_ratio(plan, normalization, decay, resample_every)
            on_sketch(SketchEvent(sketcher, plan, s, leaf, fresh, new, largest))
        average, added = new, None  # "paper": M S alone.
        if estimator == "residual" and not plan.dense:
            # M (S Sᵀ)⁻¹ S + G − G Π, where G Π is C (S Sᵀ)⁻¹ S of C = G Sᵀ.
            average, added = _inverse_gram(sketcher, plan, new - fresh), leaf
        elif estimator in ("nesterov", "fresh"):
            # β·M S + (1−β)·G. "fresh" takes the old M: G is in it once and exactly.
            average = new if estimator == "nesterov" else m.astype(jnp.float32)
            average, added = decay * average, leaf.times(jnp.float32(1 - decay))
        updates.append(EstimatedLeaf(sketcher, plan, s, average, added))
        momentum.append(cast_like(new, m))
    count, epoch = optax.safe_increment(state.count), state.epoch
    if resample_every is not None:
        # By the count of this update: the first interval has all of its κ updates.
        _, due = renewal(count, resample_every)
        epoch = epoch + due.astype(jnp.int32)

        def transferred(
            index: jax.Array, momentum: dict[int, jax.Array]
        ) -> dict[int, jax.Array]:
            # M ← M S S′ᵀ: the old S decompresses, the new one compresses.
            matrices = sketcher.transfers(plans, sampled, state.key, epoch + index)
            return {
                i: cast_like(moved_sketch(plans[i], matrices[i], m), m)
                for i, m in momentum.items()
            }

        sketched = {i: m for i, m in enumerate(momentum) if not plans[i].dense}
        # Other updates do not pay for S′.
        sketched = renewed_if(due, transferred, sketched)
        momentum = [sketched.get(i, m) for i, m in enumerate(momentum)]
    return updates, state._replace(
        count=count, epoch=epoch, momentum=rebuild(state.momentum, momentum)
    )


def _inverse_gram(
    sketcher: Sketcher, plan: LeafPlan, sketch: Float[Array, "..."]
) -> Float[Array, "..."]:
    """C (S Sᵀ)⁻¹ for a sketch C in the state's shape."""
    gram = sketcher.projection.gram_diagonal(plan.rank, plan.width)
    return plan.unfold(plan.fold(sketch) / along(gram, plan.axis), plan.state_shape)


def _largest_ratio(
    plan: LeafPlan, normalization: str, decay: Any, resample_every: Any
) -> jax.Array:
    """A bound on ‖M‖/‖G‖ for a stable momentum.

    κ updates with gradients of norm g take ‖M‖ to at most β^κ ‖M‖ + (1−β^κ) g, and a
    transfer multiplies it by √q: the fixed point of both.
    """
    if resample_every is None or normalization == "isometric":  # Such transfers shrink.
        return jnp.float32(1)
    growth = (plan.width / plan.rank) ** 0.5
    kept = jnp.asarray(decay, jnp.float32) ** resample_every
    left = 1 - kept * growth
    fixed = growth * (1 - kept) / jnp.where(left > 0, left, 1.0)
    return jnp.where(left > 0, jnp.maximum(fixed, 1.0), jnp.inf)


def _warn_if_unstable(plans: Plans, decay: Any, resample_every: Any) -> None:
    """Warns with the worst leaf's ρ = β^{2κ}·m/r where transfers amplify noise."""
    sketched = [plan for plan in plans if not plan.dense]
    traced = any(isinstance(x, jax.core.Tracer) for x in (decay, resample_every))
    if not sketched or resample_every is None or traced:
        return
    worst = max(sketched, key=lambda plan: plan.width / plan.rank)
    ratio, beta = worst.width / worst.rank, float(decay)
    rho = beta ** (2 * int(resample_every)) * ratio
    if rho <= _MAX_NOISE:
        return
    # ρ = β^{2κ}·m/r solved for the κ at which it is _MAX_NOISE.
    least = math.log(ratio / _MAX_NOISE) / (2 * math.log(1 / beta))
    effect = "diverges" if rho >= 1 else f"has {1 / (1 - rho):.1f} times the noise"
    _validation.warn(
        f"compressed_momentum with resample_every={resample_every} and"
        f" decay={beta:g}: at leaf {worst.path!r} (width {worst.width}, rank"
        f" {worst.rank}) rho = decay**(2*resample_every)*width/rank is {rho:.3g}, so"
        f" that the momentum {effect}; use resample_every >= {math.ceil(least)}"
    )
