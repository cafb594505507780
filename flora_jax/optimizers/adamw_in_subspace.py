"""AdamW inside a subspace: what all recipes of that family have in common."""

from __future__ import annotations

import math
from typing import Any

import optax

from flora_jax import _validation as _checks
from flora_jax.projections import Projection
from flora_jax.quantization import quantize_state
from flora_jax.subspace import scale_in_subspace
from flora_jax.transforms import orthogonalize, recipe


def adamw_in_subspace(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    projection: Projection,
    rank: Any,
    refresh_every: int | None,
    *,
    b1: Any,
    b2: Any,
    eps: Any,
    weight_decay: Any,
    weight_decay_mask: Any,
    state_dtype: str | None,
    orthogonal: bool = False,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adam on sketches, decoupled weight decay in the full space, the learning rate.

    Args:
      name: the recipe's name, for messages.
      learning_rate: a float or a schedule.
      projection: as in ``scale_in_subspace``.
      rank: as in ``scale_in_subspace``.
      refresh_every: as in ``scale_in_subspace``.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      weight_decay: multiplied by the learning rate; None for none.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      state_dtype: dtype of ``quantize_state`` for both moments; None for float32.
      orthogonal: whether the updates of matrices are orthogonalised.
      **settings: other arguments of ``scale_in_subspace``.

    Returns:
      The gradient transformation.
    """
    _checks.check_number("b1", b1, 0, 1, "0.9 is Adam's")
    _checks.check_number("b2", b2, 0, 1, "0.999 is Adam's")
    _checks.check_number("eps", eps, 0, None, "1e-8 is Adam's")
    _checks.check_bool("orthogonal", orthogonal)
    inner = optax.scale_by_adam(b1, b2, eps)
    tx = scale_in_subspace(
        inner, projection, rank, refresh_every, betas=(b1, b2), **settings
    )
    if state_dtype is not None:
        fields = ("mu", "nu", *(("error",) if settings.get("error_feedback") else ()))
        tx = quantize_state(tx, state_dtype, fields=fields)
    last = ()
    if orthogonal:
        names = "mask", "min_dim_size", "max_aspect_ratio", "weight_dimension_numbers"
        last = (orthogonalize(**{name: settings[name] for name in names}),)
    return recipe(
        (),
        tx,
        *last,
        *decay_and_rate(weight_decay, weight_decay_mask, learning_rate),
        params_for="" if weight_decay is None else f"{name}(weight_decay)",
    )


def decay_and_rate(
    weight_decay: optax.ScalarOrSchedule | None,
    weight_decay_mask: Any,
    learning_rate: optax.ScalarOrSchedule,
) -> list[optax.GradientTransformation]:
    """How every recipe ends: decoupled weight decay, and the learning rate."""
    if not callable(learning_rate):
        _checks.check_number(
            "learning_rate", learning_rate, -math.inf, None, "pass one, or a schedule"
        )
    rate = optax.scale_by_learning_rate(learning_rate)
    if weight_decay is None:
        return [rate]
    if not callable(weight_decay):
        _checks.check_number("weight_decay", weight_decay, 0, None, "0.1 or None")
    return [optax.add_decayed_weights(weight_decay, weight_decay_mask), rate]
