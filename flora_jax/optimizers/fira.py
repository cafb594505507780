"""GaLore with the part of the gradient outside of the subspace."""

from __future__ import annotations

from typing import Any

import jax
import optax

from flora_jax.optimizers.adamw_in_subspace import adamw_in_subspace
from flora_jax.projections import Projection, TopSVD


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any,
    *,
    refresh_every: int | None = 200,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    scale: jax.typing.ArrayLike = 0.25,
    norms: str = "channel",
    limiter: jax.typing.ArrayLike | None = 1.01,
    residual: str = "fira",
    projection: Projection = TopSVD(),  # noqa: B008 (frozen)
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
    """Fira: Adam in a subspace, and the rest of the gradient scaled as Adam would.

    With P, R and N as in :func:`flora_jax.galore`, and ψ the direction N before its
    debiasing factor c = √(1−β2^t)/(1−β1^t),

      X = φ·(G − P R),   φ_j = ‖ψ_j‖/(‖R_j‖ + 1e-8) for each column j,
      X ← X / (max(‖X‖/(‖X_prev‖ + 1e-8), γ)/γ),
      W ← W − η (c·(α P ψ + X) + λ W).

    Where the last X was zero, as at the first step, X is not limited.

    Memory: as :func:`flora_jax.galore`, and one number per matrix.

    Args:
      learning_rate: a float or a schedule; 0.01 in the paper's pretraining.
      rank: sketch size r; an int, a callable of (path, shape), or a tree of ints.
      refresh_every: updates between two bases T, 200 in the paper; None keeps the
        first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      scale: α, which multiplies the update of sketched leaves; 0.25 in the paper.
      norms: ``"channel"`` as above, or ``"tensor"``: one φ per matrix.
      limiter: γ; None for none.
      residual: ``"fira"`` as in the paper, or ``"fira_code"``: G − α·P R, as in the
        published code.
      projection: where P comes from.
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
      >>> tx = fj.fira(1e-2, rank=32)
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
      Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024
    """
    return adamw_in_subspace(
        "fira",
        learning_rate,
        projection,
        rank,
        refresh_every,
        b1=b1,
        b2=b2,
        eps=eps,
        scale=scale,
        norms=norms,
        limiter=limiter,
        residual=residual,
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
