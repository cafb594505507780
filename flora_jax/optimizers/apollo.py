"""APOLLO and APOLLO-Mini: gradients scaled by Adam's step on their sketches."""

from __future__ import annotations

import jax
import optax

from flora_jax import _validation as check
from flora_jax.optimizers.common import DecayMask, adamw_in_subspace, recipe
from flora_jax.projections.count_sketch import CountSketch
from flora_jax.projections.gaussian import Gaussian
from flora_jax.sketching.sketch import Sketch
from flora_jax.subspace.residuals import Apollo, Residual


@recipe
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int,
    *,
    refresh_every: int | jax.Array | None = 200,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    scale: jax.typing.ArrayLike = 1.0,
    residual: Residual = Apollo(),
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: DecayMask = None,
    state_dtype: str | None = None,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: gradients scaled per channel by what Adam does to their sketches.

    A random P (r x m), regenerated from the key and replaced every T steps, gives R =
    P G. With Adam's direction N of it,

      s_j = ‖N_j‖/(‖R_j‖ + 1e-8) for each column j,   W ← W − η (√α G diag(s) + λ W),

    with the growth of ‖G diag(s)‖ limited as in :func:`flora_jax.fira` (limiting before
    or after √α is the same). A sketch sees √(r/m) of the gradient's Adam scale, which a
    larger ``scale`` or learning rate makes up for.

    Memory: 2·r·max(n, m) elements (``side="smaller"``) per sketched leaf, and one per
    matrix.

    Args:
      learning_rate: a float or a schedule; 0.01 in the paper.
      sketch: the sketch, or its rank; ``CountSketch()`` unless it has a projection;
        ``Gaussian()`` is the paper's, and ended level with it in this project's runs.
      refresh_every: updates between two bases T, 200 in the paper; None keeps the
        first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment; 1e-6 in the published code.
      scale: α; 1 in the paper.
      residual: :class:`flora_jax.Apollo` with its limiter γ and norms, ``"channel"`` as
        above, or ``"tensor"``: one s per matrix.
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
      >>> tx = fj.apollo(1e-2, fj.Sketch(32))
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, 2024
    """
    return adamw_in_subspace(
        "apollo",
        CountSketch("unbiased"),
        learning_rate=learning_rate,
        sketch=sketch,
        refresh_every=refresh_every,
        b1=b1,
        b2=b2,
        eps=eps,
        scale=_root(scale, "the paper uses 1"),
        residual=residual,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        state_dtype=state_dtype,
        stagger=stagger,
    )


@recipe
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int = Sketch(1),
    *,
    refresh_every: int | jax.Array | None = 200,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    scale: jax.typing.ArrayLike = 128.0,
    residual: Residual = Apollo(norms="tensor"),
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: DecayMask = None,
    state_dtype: str | None = None,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: :func:`flora_jax.apollo` of rank 1, with one scale per matrix.

    Memory: 2·max(n, m) elements (``side="smaller"``) per sketched leaf, and one per
    matrix.

    Args:
      learning_rate: a float or a schedule; 0.01 in the paper.
      sketch: the sketch, or its rank; 1 in the paper.
      refresh_every: updates between two bases T, 200 in the paper; None keeps the
        first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment; 1e-6 in the published code.
      scale: α; 128 in the paper.
      residual: as in :func:`flora_jax.apollo`.
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
      >>> tx = fj.apollo_mini(1e-2)
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, 2024
    """
    return adamw_in_subspace(
        "apollo_mini",
        Gaussian(),
        learning_rate=learning_rate,
        sketch=sketch,
        refresh_every=refresh_every,
        b1=b1,
        b2=b2,
        eps=eps,
        scale=_root(scale, "the paper uses 128"),
        residual=residual,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        state_dtype=state_dtype,
        stagger=stagger,
    )


def _root(scale: jax.typing.ArrayLike, remedy: str) -> jax.typing.ArrayLike:
    """√α, checked before the root makes a complex number of a negative one."""
    check.check_number("scale", scale, 0, None, remedy)
    return scale**0.5
