"""Momentum kept as a sketch (the paper's Algorithm 2)."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from flora_jax import _validation as _checks
from flora_jax.random import keys as _keys
from flora_jax.leaves import trees as _state
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.rules import LeafRules
from flora_jax.projections import CountSketch, Projection
from flora_jax.transforms.parts import Part, leafwise
from flora_jax.transforms.momentum_step import step_all
from flora_jax.sketching.sketcher import Sketcher
from flora_jax.sketching.sketched_gradients import refuse_sketches

READINGS = ("paper", "interpolated", "residual")
NAME = "compressed_momentum"
_MAX_NOISE = 0.5  # rho from which init warns: a noise gain of 1/(1 - rho) = 2.


class CompressedMomentumState(NamedTuple):
    """State of :func:`compressed_momentum`.

    Attributes:
      count: number of updates so far, int32.
      key: root key data, uint32 of shape (2,); it never changes.
      spec: what the state means, for :func:`flora_jax.verify_state`.
      momentum: tree of sketches, one array per parameter leaf.
    """

    count: Any
    key: jax.Array
    spec: jax.Array
    momentum: Any


def compressed_momentum(
    decay: jax.typing.ArrayLike,
    rank: Any,
    *,
    resample_every: int | None = 1000,
    reading: str = "interpolated",
    projection: Projection = CountSketch(),  # noqa: B008 (frozen)
    key: Any = 0,
    mask: Any = None,
    min_dim_size: int = 128,
    max_aspect_ratio: float = 16,
    side: str = "smaller",
    weight_dimension_numbers: Any = None,
    dtype: Any = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """Exponential moving average of the updates, kept as a random sketch.

    For a leaf folded to G (n x m) with its columns sketched by S (r x m),

      M ← β M + (1−β) G Sᵀ,

    and every κ steps S is replaced by S′ and the momentum transferred, M ← M S S′ᵀ.
    The readings differ in the update alone; none of them is debiased, and dense leaves
    get what the uncompressed chain gives, which each equals at full rank with an
    orthogonal projection:

    - ``"paper"``: M S, of rank r within one interval;
      ``optax.ema(decay, debias=False)``.
    - ``"interpolated"``: β·M S + (1−β)·G, of full rank at every step;
      ``optax.chain(optax.scale(1 - decay), optax.trace(decay, nesterov=True))``.
    - ``"residual"``: momentum inside the subspace, the fresh gradient outside:
      M (S Sᵀ)⁻¹ S + (G − G Π) with Π = Sᵀ(S Sᵀ)⁻¹S; ``optax.ema(decay,
      debias=False)``. For a projection with S Sᵀ = (m/r) I the first term is
      (r/m)·M S. Needs orthogonal rows, so Gaussian is refused.

    An unbiased transfer multiplies E‖M‖² by about m/r: with ρ = β^{2κ}·m/r the noise
    grows by 1/(1−ρ), and from ρ = 1 it diverges; ``init`` warns from 0.5.

    Clip by RMS before this transformation: the unbiased estimate's RMS is
    √(1 + (m+1)/r) (Gaussian) or √(m/r) (CountSketch) times the signal's, so that a clip
    after it shrinks the signal, and learning rates do not carry over unexamined.

    With ``reading="paper"``, ``update`` also takes sketches in place of gradients, from
    :func:`flora_jax.sketched_value_and_grad` with
    ``transformation="compressed_momentum"``.

    Memory: r·max(n, m) numbers of ``dtype`` per sketched leaf (``side="smaller"``), the
    leaf's size for dense ones.

    Args:
      decay: β in [0, 1), a float or a scalar array.
      rank: sketch size r; an int, a callable of (path, shape), or a tree of ints.
      resample_every: κ, in updates; 1000 as in the paper. None keeps one projection.
      reading: ``"interpolated"`` (the default, after this project's trainings),
        ``"paper"`` or ``"residual"``.
      projection: how leaves are sketched; ``Gaussian()`` is the paper's.
      key: int seed, typed threefry2x32 key, or its key data; another one for each
        compressed_momentum of one chain.
      mask: which leaves may be sketched; see :func:`flora_jax.plan_leaves`.
      min_dim_size: smallest side of a matrix that is sketched.
      max_aspect_ratio: largest ratio of its sides.
      side: which side is sketched.
      weight_dimension_numbers: which axes form the matrix, in optax's convention.
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
      ...     fj.compressed_momentum(0.9, rank=32),
      ...     optax.scale_by_learning_rate(1e-3))
      >>> state = tx.init(params)
      >>> state[1].momentum["w"].shape
      (32, 512)

    References:
      Hao et al., `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
      <https://arxiv.org/abs/2402.03293>`_, 2024, Algorithm 2
    """
    return leafwise(
        momentum_part(
            decay,
            LeafRules(
                rank,
                mask,
                min_dim_size,
                max_aspect_ratio,
                side,
                weight_dimension_numbers,
            ),
            resample_every,
            reading,
            projection,
            key,
            dtype,
        )
    )


def momentum_part(
    decay: jax.typing.ArrayLike,
    rules: LeafRules,
    resample_every: int | None,
    reading: str,
    projection: Projection,
    key: Any,
    dtype: Any,
) -> Part:
    """:func:`compressed_momentum` as a part of a chain."""
    _checks.check_number("decay", decay, 0, 1, "0.9 is the paper's")
    _checks.check_choice("reading", reading, READINGS)
    if resample_every is not None:
        resample_every = _checks.check_steps(
            "resample_every", resample_every, "use None to keep one projection"
        )
    dtype = _checks.check_state_dtype(dtype)
    root = _keys.raw_key(key)
    sketcher = Sketcher(NAME, rules, projection)
    if reading == "residual" and projection.gram_diagonal(1, 1) is None:
        raise ValueError(
            "`reading` 'residual' needs a projection with orthogonal rows, got"
            f" projection={projection}; use CountSketch()"
        )

    def init(params: Any) -> CompressedMomentumState:
        plans = rules.plan(params)
        if projection.scale == "unbiased":  # Isometric transfers shrink.
            _warn_if_unstable(plans, decay, resample_every)
        shapes = [plan.state_shape for plan in plans]
        return CompressedMomentumState(
            count=jnp.zeros([], jnp.int32),
            key=jnp.array(root),
            spec=sketcher.spec(root, resample_every=resample_every),
            momentum=_state.zeros_tree(params, shapes, dtype),
        )

    def plan(updates: Any, state: Any) -> list[LeafPlan]:
        _keys.check_state_key(NAME, state.key)
        if reading != "paper":
            refuse_sketches(NAME, updates, f"reading={reading!r} adds the gradient")
        plans, _ = sketcher.planned(updates)
        _state.matching_leaves(
            NAME, "momentum", state.momentum, plans, [p.state_shape for p in plans]
        )
        return plans

    step = functools.partial(step_all, sketcher, reading, resample_every)
    return Part(init, plan, step, (decay,))


def _warn_if_unstable(
    plans: Sequence[LeafPlan], decay: Any, resample_every: int | None
) -> None:
    """Warns with the worst leaf's ρ = β^{2κ}·m/r where transfers amplify noise."""
    sketched = [plan for plan in plans if plan.dense_reason is None]
    if not sketched or resample_every is None or isinstance(decay, jax.core.Tracer):
        return
    worst = max(sketched, key=lambda plan: plan.width / plan.rank)
    ratio = worst.width / worst.rank
    rho = float(decay) ** (2 * resample_every) * ratio
    if rho <= _MAX_NOISE:
        return
    least = math.log(ratio / _MAX_NOISE) / (2 * math.log(1 / float(decay)))
    effect = "diverges" if rho >= 1 else f"has {1 / (1 - rho):.1f} times the noise"
    warnings.warn(
        f"compressed_momentum with resample_every={resample_every} and"
        f" decay={float(decay):g}: at leaf {worst.path!r} (width {worst.width}, rank"
        f" {worst.rank}) rho = decay**(2*resample_every)*width/rank is {rho:.3g}, so"
        f" that the momentum {effect}; use resample_every >= {math.ceil(least)}",
        stacklevel=4,
    )
