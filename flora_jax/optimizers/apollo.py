"""The gradient itself, scaled as Adam would scale it."""

from __future__ import annotations

from typing import Any

import jax
import optax

from flora_jax import _validation as _checks
from flora_jax.optimizers.adamw_in_subspace import adamw_in_subspace
from flora_jax.projections import Gaussian, Projection


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any,
    *,
    refresh_every: int | None = 200,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    scale: jax.typing.ArrayLike = 1.0,
    norms: str = "channel",
    limiter: jax.typing.ArrayLike | None = 1.01,
    projection: Projection = Gaussian(),  # noqa: B008 (frozen)
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
    """APOLLO: gradients scaled per channel by what Adam does to their sketches.

    A random P (r x m), drawn anew every T steps and never stored, gives R = P G; with
    Adam's direction N of it,

      s_j = ‖N_j‖/(‖R_j‖ + 1e-8) for each column j,   W ← W − η (√α G diag(s) + λ W),

    with the growth of ‖G diag(s)‖ limited as in :func:`flora_jax.fira` (limiting before
    or after √α is the same). A sketch sees √(r/m) of the gradient's Adam scale, which a
    larger ``scale`` or learning rate makes up for.

    Memory: 2·r·max(n, m) numbers (``side="smaller"``) per sketched leaf, and one per
    matrix.

    Args:
      learning_rate: a float or a schedule; 0.01 in the paper.
      rank: sketch size r; an int, a callable of (path, shape), or a tree of ints.
      refresh_every: updates between two bases T, 200 in the paper; None keeps the
        first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      scale: α; 1 in the paper.
      norms: ``"channel"`` as above, or ``"tensor"``: one s per matrix.
      limiter: γ; None for none.
      projection: ``Gaussian()`` is the paper's.
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
      >>> tx = fj.apollo(1e-2, rank=32)
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, 2024
    """
    # Before the root, which makes a complex number of a negative one.
    _checks.check_number("scale", scale, 0, None, "1 is the paper's")
    return adamw_in_subspace(
        "apollo",
        learning_rate,
        projection,
        rank,
        refresh_every,
        b1=b1,
        b2=b2,
        eps=eps,
        scale=scale**0.5,
        norms=norms,
        limiter=limiter,
        residual="apollo",
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


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 1,
    *,
    refresh_every: int | None = 200,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    scale: jax.typing.ArrayLike = 128.0,
    limiter: jax.typing.ArrayLike | None = 1.01,
    projection: Projection = Gaussian(),  # noqa: B008 (frozen)
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
    """APOLLO-Mini: :func:`flora_jax.apollo` of rank 1, with one scale per matrix.

    Memory: 2·max(n, m) numbers (``side="smaller"``) per sketched leaf, and one per
    matrix.

    Args:
      learning_rate: a float or a schedule; 0.01 in the paper.
      rank: sketch size r; 1 in the paper.
      refresh_every: updates between two bases T, 200 in the paper; None keeps the
        first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      scale: α; 128 in the paper.
      limiter: γ; None for none.
      projection: ``Gaussian()`` is the paper's.
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
      >>> tx = fj.apollo_mini(1e-2)
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, 2024
    """
    return apollo(
        learning_rate,
        rank,
        refresh_every=refresh_every,
        b1=b1,
        b2=b2,
        eps=eps,
        scale=scale,
        norms="tensor",
        limiter=limiter,
        projection=projection,
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
