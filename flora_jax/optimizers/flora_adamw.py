"""AdamW in a random subspace that is never stored."""

from __future__ import annotations

from typing import Any

import jax
import optax

from flora_jax.optimizers.adamw_in_subspace import adamw_in_subspace
from flora_jax.projections import CountSketch, Projection


def flora_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any,
    *,
    refresh_every: int | None = 100,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    scale: jax.typing.ArrayLike = 1.0,
    transport: str = "squared",
    residual: str = "fira",
    norms: str = "channel",
    limiter: jax.typing.ArrayLike | None = 1.01,
    projection: Projection = CountSketch(scale="isometric"),  # noqa: B008 (frozen)
    weight_decay: Any = None,
    weight_decay_mask: Any = None,
    orthogonal: bool = True,
    state_dtype: str | None = None,
    stagger: bool = False,
    key: Any = 0,
    mask: Any = None,
    min_dim_size: int = 128,
    max_aspect_ratio: float = 16,
    side: str = "smaller",
    weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam on sketches, Fira's residual, and Muon's step: full rank at FLORA's memory.

    The gradient is sketched by an isometry that a key regenerates, R = G Sᵀ; Adam runs
    on R, its direction is brought back, and the part of G outside of the subspace is
    scaled as Adam scales the part inside, row by row, with limited growth (φ is that of
    :func:`flora_jax.scale_in_subspace`):

      U = N S + φ·(G − R S),   W ← W − η (orth(U) + λ W),

    where orth gives all singular values of a matrix the same size, as Muon does, with a
    root mean square of 0.2; see :func:`flora_jax.orthogonalize`. Every T steps S is
    drawn anew; the moments are transported to it. The update has full rank at every
    step. Leaves that are no matrices, or that the mask leaves out, get AdamW's: leave
    embeddings out. With ``orthogonal=False``, W ← W − η (U + λ W): nearer to AdamW, and
    without the products of orth.

    The learning rate: four times AdamW's is the place to start. In trainings of 400
    updates eight to sixteen times as much was best (with ``orthogonal=False`` two to
    four times), in 4,000 the lowest that was tried, four times.

    Memory: 2·r·max(n, m) numbers (``side="smaller"``) per sketched leaf, and one per
    matrix; a quarter of the former with ``state_dtype="int8"``.

    Args:
      learning_rate: a float or a schedule.
      rank: sketch size r; an int, a callable of (path, shape), or a tree of ints.
      refresh_every: updates between two bases T; None keeps the first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      scale: α, which multiplies the update of sketched leaves.
      transport: what becomes of the moments when S changes; see
        :func:`flora_jax.scale_in_subspace`.
      residual: what becomes of the part of G outside of the subspace, likewise.
      norms: ``"channel"`` as above, or ``"tensor"``: one φ per matrix.
      limiter: γ; None for none.
      projection: where S comes from; orthonormal rows. ``Orthogonal`` decomposes anew
        at every step.
      weight_decay: decoupled weight decay in the full space, multiplied by the learning
        rate; None for none.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      orthogonal: orthogonalise the updates of matrices. That takes about 20·m²·n
        operations, m ≤ n, against 6·n·m of the training step for each token.
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
      >>> tx = fj.flora_adamw(1e-3, rank=64)
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Hao et al., `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
      <https://arxiv.org/abs/2402.03293>`_, 2024; Chen et al., `Fira
      <https://arxiv.org/abs/2410.01623>`_, 2024; Robert et al., `LDAdam
      <https://arxiv.org/abs/2410.16103>`_, 2024; Jordan et al.,
      `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024
    """
    return adamw_in_subspace(
        "flora_adamw",
        learning_rate,
        projection,
        rank,
        refresh_every,
        b1=b1,
        b2=b2,
        eps=eps,
        scale=scale,
        transport=transport,
        residual=residual,
        norms=norms,
        limiter=limiter,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        orthogonal=orthogonal,
        state_dtype=state_dtype,
        stagger=stagger,
        key=key,
        mask=mask,
        min_dim_size=min_dim_size,
        max_aspect_ratio=max_aspect_ratio,
        side=side,
        weight_dimension_numbers=weight_dimension_numbers,
    )
