"""Adam in a subspace of cosines."""

from __future__ import annotations

from typing import Any

import jax
import optax

from flora_jax.optimizers.adamw_in_subspace import adamw_in_subspace
from flora_jax.projections import Projection, TopDCT


def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any,
    *,
    refresh_every: int | None = 1,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    scale: jax.typing.ArrayLike = 1.0,
    error_feedback: bool = False,
    projection: Projection = TopDCT(),  # noqa: B008 (frozen)
    weight_decay: Any = None,
    weight_decay_mask: Any = None,
    state_dtype: str | None = None,
    stagger: bool = False,
    key: Any = 0,
    mask: Any = None,
    min_dim_size: int = 128,
    max_aspect_ratio: float = 16,
    side: str = "smaller",
    weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW in the cosines in which each gradient is largest.

    Every T steps the basis becomes the r rows of the cosine transform of G's smaller
    side that have the largest norm, of which their numbers alone are kept. Moments of
    rows that stay are moved to their new places, those of new rows start at zero. With
    R the selected rows and N Adam's direction of them,

      W ← W − η (α Q_selectedᵀ N + λ W).

    With error feedback A = G + E takes G's place, and E ← A − Q_selectedᵀ R.

    Memory: 2·r·max(n, m) numbers (``side="smaller"``) and r int32 ones per sketched
    leaf, and n·m with error feedback, a quarter of that in int8.

    Args:
      learning_rate: a float or a schedule.
      rank: sketch size r; an int, a callable of (path, shape), or a tree of ints.
      refresh_every: updates between two bases T; 1 in the paper; None keeps the first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      scale: α, which multiplies the update of sketched leaves.
      error_feedback: keep what the sketches leave out, and add it to the next gradient;
        in ``state_dtype``, if that is given.
      projection: ``TopDCT()``, or ``TopDCT(norm="l2")``.
      weight_decay: decoupled weight decay in the full space, multiplied by the learning
        rate; None for none.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      state_dtype: ``"int8"``, ``"float8_e4m3fn"`` or ``"bfloat16"`` for both moments,
        as by :func:`flora_jax.quantize_state`; None for float32.
      stagger: replace the bases of different leaves at different steps.
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
      ValueError: for arguments out of range; from update, if ``params`` are needed and
        missing, or gradients and state do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jnp.ones((256, 512))}
      >>> tx = fj.dct_adamw(1e-3, rank=32)
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      `SVD-Free Low-Rank Adaptive Gradient Optimization
      <https://arxiv.org/abs/2505.17967>`_, 2025
    """
    return adamw_in_subspace(
        "dct_adamw",
        learning_rate,
        projection,
        rank,
        refresh_every,
        b1=b1,
        b2=b2,
        eps=eps,
        scale=scale,
        transport="squared",
        error_feedback=error_feedback,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        state_dtype=state_dtype,
        stagger=stagger,
        key=key,
        mask=mask,
        min_dim_size=min_dim_size,
        max_aspect_ratio=max_aspect_ratio,
        side=side,
        weight_dimension_numbers=weight_dimension_numbers,
    )
