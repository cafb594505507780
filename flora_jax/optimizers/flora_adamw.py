"""FLORA-AdamW: AdamW on random sketches, with Fira's residual."""

from __future__ import annotations

import jax
import optax

from flora_jax.optimizers.common import DecayMask, adamw_in_subspace, recipe
from flora_jax.projections.count_sketch import CountSketch
from flora_jax.sketching.sketch import Sketch
from flora_jax.subspace.residuals import Fira, Residual
from flora_jax.subspace.transports import Squared, Transport


@recipe
def flora_adamw(
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int,
    *,
    refresh_every: int | jax.Array | None = 100,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    scale: jax.typing.ArrayLike = 1.0,
    residual: Residual | None = Fira(),
    transport: Transport = Squared(),
    orthogonal: bool = False,
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: DecayMask = None,
    state_dtype: str | None = None,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """FLORA-AdamW: AdamW on sketches, the rest of the gradient scaled to match.

    The gradient is sketched by an isometry that a key regenerates, R = G Sᵀ; Adam runs
    on R, its direction N is expanded, and the component of G outside the subspace is
    scaled as Adam scales the part inside, row by row, with limited growth (φ is that of
    :class:`flora_jax.Fira`):

      W ← W − η (N S + φ·(G − R S) + λ W).

    Every T steps S is replaced and the moments are transported. The update has full
    rank at every step. Leaves that are not sketched get AdamW: leave embeddings out by
    the sketch's mask.

    The learning rate: in runs of 400 updates two to four times AdamW's was best. With
    ``orthogonal=True`` it was six to twelve times, and four in runs of 4,000.

    The defaults: in runs of 400 updates of a small language model (rank 16, T = 50,
    ``orthogonal=True``, two seeds) no change of one setting lowered the loss by more
    than 0.005, which two seeds cannot distinguish from zero.

    Memory: 2·r·max(n, m) elements (``side="smaller"``) per sketched leaf, and one per
    matrix; a quarter of the former with ``state_dtype="int8"``.

    Args:
      learning_rate: a float or a schedule.
      sketch: the sketch, or its rank; ``CountSketch(normalization="isometric")`` unless
        it has a projection. ``Orthogonal`` decomposes anew at every step.
      refresh_every: updates between two bases T; None keeps the first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      scale: α, which multiplies the update of sketched leaves.
      residual: how the component of G outside the subspace is handled; see
        :func:`flora_jax.scale_in_subspace`. Decays that it leaves open are b1 and b2.
      transport: how the moments are carried over when S is replaced, likewise.
      orthogonal: orthogonalize the updates of matrices, as Muon does; see
        :func:`flora_jax.orthogonalize` for its cost.
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
      >>> tx = fj.flora_adamw(1e-3, fj.Sketch(64))
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Hao et al., `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
      <https://arxiv.org/abs/2402.03293>`_, 2024; Chen et al., `Fira
      <https://arxiv.org/abs/2410.01623>`_, 2024; Robert et al., `LDAdam
      <https://arxiv.org/abs/2410.16103>`_, 2024
    """
    return adamw_in_subspace(
        "flora_adamw",
        CountSketch("isometric"),
        learning_rate=learning_rate,
        sketch=sketch,
        refresh_every=refresh_every,
        b1=b1,
        b2=b2,
        eps=eps,
        scale=scale,
        residual=residual,
        transport=transport,
        orthogonal=orthogonal,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        state_dtype=state_dtype,
        stagger=stagger,
    )
