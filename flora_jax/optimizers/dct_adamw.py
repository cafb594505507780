"""DCT-AdamW: AdamW in selected cosines, with indices for a basis."""

from __future__ import annotations

import jax
import optax

from flora_jax.optimizers.common import DecayMask, adamw_in_subspace, recipe
from flora_jax.projections.top_dct import TopDCT
from flora_jax.sketching.sketch import Sketch
from flora_jax.subspace.transports import Squared


@recipe
def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int,
    *,
    refresh_every: int | jax.Array | None = 1,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    scale: jax.typing.ArrayLike = 1.0,
    error_feedback: bool = False,
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: DecayMask = None,
    state_dtype: str | None = None,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """DCT-AdamW: AdamW in the cosines in which each gradient is largest.

    Every T steps the basis becomes the r rows of the cosine transform of G's smaller
    side that have the largest norm; only their indices are kept. Moments of rows that
    stay are moved to their new places, those of new rows start at zero. With R the
    selected rows and N Adam's direction of them,

      W ← W − η (α Q_selectedᵀ N + λ W).

    With error feedback A = G + E takes G's place, and E ← A − Q_selectedᵀ R.

    Memory: 2·r·max(n, m) elements (``side="smaller"``) and r int32 ones per sketched
    leaf, and n·m with error feedback, a quarter of that in int8.

    Args:
      learning_rate: a float or a schedule.
      sketch: the sketch, or its rank; ``TopDCT()`` unless it has a projection, such as
        ``TopDCT(norm="l2")``.
      refresh_every: updates between two bases T; 1 in the paper; None keeps the first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      scale: α, which multiplies the update of sketched leaves.
      error_feedback: keep what the sketches leave out, and add it to the next gradient;
        in ``state_dtype``, if that is given.
      weight_decay: decoupled weight decay in the full space, multiplied by the learning
        rate; None to disable.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      state_dtype: ``"int8"``, ``"float8_e4m3fn"`` or ``"bfloat16"`` for both moments,
        as by :func:`flora_jax.quantize_state`; None for float32.
      stagger: replace the bases of different leaves at different steps.

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
      >>> tx = fj.dct_adamw(1e-3, fj.Sketch(32))
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      `SVD-Free Low-Rank Adaptive Gradient Optimization
      <https://arxiv.org/abs/2505.17967>`_, 2025
    """
    return adamw_in_subspace(
        "dct_adamw",
        TopDCT(),
        learning_rate=learning_rate,
        sketch=sketch,
        refresh_every=refresh_every,
        b1=b1,
        b2=b2,
        eps=eps,
        scale=scale,
        transport=Squared(),
        error_feedback=error_feedback,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        state_dtype=state_dtype,
        stagger=stagger,
    )
