"""Fira: GaLore with the rest of the gradient scaled to match."""

from __future__ import annotations

import jax
import optax

from flora_jax.optimizers.common import DecayMask, adamw_in_subspace, recipe
from flora_jax.projections.top_svd import TopSVD
from flora_jax.sketching.sketch import Sketch
from flora_jax.subspace.residuals import Fira, Residual


@recipe
def fira(
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int,
    *,
    refresh_every: int | jax.Array | None = 200,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    scale: jax.typing.ArrayLike = 0.25,
    residual: Residual = Fira(),
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: DecayMask = None,
    state_dtype: str | None = None,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Fira: Adam in a singular subspace, the rest of the gradient scaled to match.

    With P, R and N as in :func:`flora_jax.galore`, and ψ the direction N before its
    debiasing factor c = √(1−β2^t)/(1−β1^t),

      X = φ·(G − P R),   φ_j = ‖ψ_j‖/(‖R_j‖ + 1e-8) for each column j,
      X ← X / (max(‖X‖/(‖X_prev‖ + 1e-8), γ)/γ),
      W ← W − η (c·(α P ψ + X) + λ W).

    Where the last X was zero, as at the first step, X is not limited.

    Memory: as :func:`flora_jax.galore`, and one element per matrix.

    Args:
      learning_rate: a float or a schedule; 0.01 in the paper's pretraining.
      sketch: the sketch, or its rank; ``TopSVD()`` unless it has a projection;
        ``TopSVD(method="exact")`` is the paper's.
      refresh_every: updates between two bases T, 200 in the paper; None keeps the
        first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment; 1e-6 in the published code.
      scale: α, which multiplies the update of sketched leaves; 0.25 in the paper.
      residual: :class:`flora_jax.Fira` as in the paper, with its limiter γ and norms;
        :class:`flora_jax.FiraCode` takes G − α·P R, as the published code.
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
      >>> tx = fj.fira(1e-2, fj.Sketch(32))
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
      Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024
    """
    return adamw_in_subspace(
        "fira",
        TopSVD(),
        learning_rate=learning_rate,
        sketch=sketch,
        refresh_every=refresh_every,
        b1=b1,
        b2=b2,
        eps=eps,
        scale=scale,
        residual=residual,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        state_dtype=state_dtype,
        stagger=stagger,
    )
