"""The paper's optimizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation as _checks
from flora_jax.leaves.rules import LeafRules
from flora_jax.optimizers.adamw_in_subspace import decay_and_rate
from flora_jax.projections import CountSketch, Projection
from flora_jax.transforms import (
    clip_part,
    factored_rms_part,
    momentum_part,
    recipe,
    scale_by_parameter_scale,
)


def flora(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any,
    b1: jax.typing.ArrayLike | None = 0.9,
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
    decay_rate: jax.typing.ArrayLike = 0.8,
    epsilon: jax.typing.ArrayLike = 1e-30,
    min_dim_size_to_factor: int = 128,
    clipping_threshold: jax.typing.ArrayLike | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
    dtype: Any = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """Adafactor whose momentum is kept as a sketch: the optimizer of the FLORA paper.

    The chain: :func:`flora_jax.scale_by_factored_rms`, clipping by each leaf's RMS,
    :func:`flora_jax.compressed_momentum`, multiplication by the parameter's RMS, weight
    decay, learning rate. The momentum averages the normalised, clipped update.

    At full rank it equals this chain with ``optax.scale_by_factored_rms()`` and, for
    ``reading="paper"``, ``optax.ema(b1, debias=False)``; for the default, Nesterov's
    ``optax.chain(optax.scale(1 - b1), optax.trace(b1, nesterov=True))``. The former is
    not ``optax.adafactor(momentum=b1)``, which multiplies by rate and parameter scale
    before its average: the two differ where these change within a few steps.

    Memory of one (n, m) matrix: r·max(n, m) numbers of ``dtype`` and n + m of float32
    (AdamW: 2 n m; Adafactor with momentum: n m + n + m).

    Args:
      learning_rate: a float or a schedule; 1e-3 in the paper's runs from scratch.
      rank: sketch size r; an int, a callable of (path, shape), or a tree of ints.
      b1: momentum's decay β; None keeps no momentum.
      resample_every: updates between two projections; 1000 as in the paper.
      reading: how the momentum becomes an update; see
        :func:`flora_jax.compressed_momentum`. ``"paper"`` is the paper's; the default
        reached a lower loss than it in this project's trainings.
      projection: how leaves are sketched; ``Gaussian()`` is the paper's.
      key: int seed, typed threefry2x32 key, or its key data.
      mask: which leaves may be sketched; see :func:`flora_jax.plan_leaves`.
      min_dim_size: smallest side of a matrix that is sketched.
      max_aspect_ratio: largest ratio of its sides.
      side: which side is sketched.
      weight_dimension_numbers: which axes form the matrix, in optax's convention.
      decay_rate: exponent of the second moment's decay schedule.
      epsilon: added to the squared gradient.
      min_dim_size_to_factor: smallest side of a matrix whose second moment is factored.
      clipping_threshold: largest RMS of a leaf's normalised update, before momentum;
        None does not clip.
      multiply_by_parameter_scale: multiply updates by the RMS of their parameter.
      weight_decay: decoupled weight decay, multiplied by the learning rate; None for
        none.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      dtype: dtype of the momentum; the second moment is kept in float32.

    Returns:
      The gradient transformation. Updates have the dtype of the gradients.

    Raises:
      TypeError: for arguments of a wrong type; from update, if the key was cast.
      ValueError: for arguments out of range; from update, if ``params`` is missing or
        gradients and state do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jnp.ones((256, 512))}
      >>> tx = fj.flora(learning_rate=1e-3, rank=32)
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.ones((256, 512))}, state, params)

    References:
      Hao et al., `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
      <https://arxiv.org/abs/2402.03293>`_, 2024
    """
    parts = [
        factored_rms_part(
            decay_rate, epsilon, min_dim_size_to_factor, weight_dimension_numbers
        )
    ]
    if clipping_threshold is not None:
        _checks.check_number(
            "clipping_threshold",
            clipping_threshold,
            1e-30,
            None,
            "1.0, or None for none",
        )
        parts.append(clip_part(clipping_threshold))
    if b1 is not None:
        _checks.check_number("b1", b1, 0, 1, "0.9 is the paper's")
    momentum = momentum_part(  # Made in any case, so that it checks its arguments.
        0.0 if b1 is None else b1,
        LeafRules(
            rank, mask, min_dim_size, max_aspect_ratio, side, weight_dimension_numbers
        ),
        resample_every,
        reading,
        projection,
        key,
        dtype,
    )
    if b1 is not None:
        parts.append(momentum)
    chain: list[optax.GradientTransformation] = []
    if multiply_by_parameter_scale:
        chain.append(scale_by_parameter_scale())
    chain += decay_and_rate(weight_decay, weight_decay_mask, learning_rate)
    needs = []
    if multiply_by_parameter_scale:
        needs.append("multiply_by_parameter_scale")
    if weight_decay is not None:
        needs.append("weight_decay")
    return recipe(
        parts, *chain, params_for=f"flora({', '.join(needs)})" if needs else ""
    )
