"""FLORA, which is Adafactor with sketched momentum, and Adafactor without momentum."""

from __future__ import annotations

import dataclasses
import math

import jax
import optax

from flora_jax import _validation as check
from flora_jax.leaves.rules import LeafRules
from flora_jax.optimizers.common import DecayMask, decay_and_learning_rate, recipe
from flora_jax.sketching.sketch import Sketch, as_sketch
from flora_jax.transforms.elementwise import Elementwise, parameter_scale
from flora_jax.transforms.factored_rms import clip_part, factored_rms_part
from flora_jax.transforms.momentum import momentum_part
from flora_jax.transforms.parts import Part, chain_parts


@recipe
def flora(
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int,
    b1: jax.typing.ArrayLike = 0.9,
    *,
    resample_every: int | jax.Array | None = 1000,
    estimator: str = "nesterov",
    decay_rate: jax.typing.ArrayLike = 0.8,
    epsilon: jax.typing.ArrayLike = 1e-30,
    clipping_threshold: jax.typing.ArrayLike | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: DecayMask = None,
    dtype: str = "float32",
) -> optax.GradientTransformationExtraArgs:
    """FLORA: Adafactor with sketched Nesterov momentum, resampled every 1000 updates.

    The chain: :func:`flora_jax.scale_by_factored_rms`, clipping by each leaf's RMS,
    :func:`flora_jax.compressed_momentum`, multiplication by the parameter's RMS, weight
    decay, learning rate. The momentum averages the normalized, clipped update.

    At full rank it equals this chain with ``optax.scale_by_factored_rms()`` and, for
    ``estimator="paper"``, ``optax.ema(b1, debias=False)``; for the default, Nesterov's
    ``optax.chain(optax.scale(1 - b1), optax.trace(b1, nesterov=True))``. The former is
    not ``optax.adafactor(momentum=b1)``, which multiplies by learning rate and
    parameter scale before its average: the two differ where these change within a few
    steps.

    Memory of one (n, m) matrix: r·max(n, m) elements of ``dtype`` and n + m of float32
    (AdamW: 2 n m; Adafactor with momentum: n m + n + m).

    Args:
      learning_rate: a float or a schedule; 1e-3 in the paper's runs from scratch.
      sketch: the sketch, or its rank; CountSketch unless it has a projection
        (``Gaussian()`` is the paper's). The second moment is factored by the same
        ``min_dim_size`` and ``weight_dimension_numbers``, at any aspect ratio.
      b1: momentum's decay β.
      resample_every: updates between two projections; 1000 as in the paper.
      estimator: how the momentum becomes an update; see
        :func:`flora_jax.compressed_momentum`. ``"paper"`` is the paper's; in this
        project's runs of a small language model the default reached a lower loss than
        it (2.290 against 2.334 at rank 16, 2.231 against 2.293 at rank 32).
      decay_rate: exponent of the second moment's decay schedule; 0.8 as in Adafactor.
      epsilon: added to the squared gradient; 1e-30 as in Adafactor.
      clipping_threshold: largest RMS of a leaf's normalized update, before momentum;
        None to disable.
      multiply_by_parameter_scale: multiply updates by the RMS of their parameter.
      weight_decay: decoupled weight decay, multiplied by the learning rate; None to
        disable.
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
      >>> tx = fj.flora(1e-3, fj.Sketch(32))
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.ones((256, 512))}, state, params)

    References:
      Hao et al., `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
      <https://arxiv.org/abs/2402.03293>`_, 2024
    """
    sketch = as_sketch(sketch)
    # A mask leaves leaves out of the sketch alone, and Adafactor has no aspect limit.
    rules = dataclasses.replace(sketch.rules, mask=None, max_aspect_ratio=math.inf)
    remedy = "the paper uses 0.9; without momentum use fj.adafactor"
    check.check_number("b1", b1, 0, 1, remedy)
    momentum = momentum_part(b1, sketch, resample_every, estimator, dtype)
    return _chain(
        "flora",
        [*_normalized(decay_rate, epsilon, clipping_threshold, rules), momentum],
        multiply_by_parameter_scale,
        weight_decay is not None,
        decay_and_learning_rate(weight_decay, weight_decay_mask, learning_rate),
    )


@recipe
def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay_rate: jax.typing.ArrayLike = 0.8,
    epsilon: jax.typing.ArrayLike = 1e-30,
    clipping_threshold: jax.typing.ArrayLike | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: DecayMask = None,
    rules: LeafRules = LeafRules(max_aspect_ratio=math.inf),
) -> optax.GradientTransformationExtraArgs:
    """Adafactor without momentum, whose state can be sharded on any mesh.

    The chain: :func:`flora_jax.scale_by_factored_rms`, clipping by each leaf's RMS,
    multiplication by the parameter's RMS, weight decay, learning rate.

    Without weight decay it equals ``optax.adafactor`` where both factor the same axes
    (see :func:`flora_jax.scale_by_factored_rms`); optax does not multiply its
    ``weight_decay_rate`` by the learning rate. The unused statistics of
    ``optax.adafactor`` have one axis, so that its state cannot be created under the
    sharding metadata of a matrix. :func:`flora_jax.flora` adds sketched momentum.

    Memory of one (n, m) matrix: n + m float32 elements.

    Args:
      learning_rate: a float or a schedule, relative to the parameters' RMS.
      decay_rate: exponent of the second moment's decay schedule; 0.8 as published.
      epsilon: added to the squared gradient; 1e-30 as published.
      clipping_threshold: largest RMS of a leaf's normalized update; None to disable.
      multiply_by_parameter_scale: multiply updates by the RMS of their parameter.
      weight_decay: decoupled weight decay, multiplied by the learning rate; None to
        disable.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      rules: which leaves are factored, and by which axes; sides of 128 or more.

    Returns:
      The gradient transformation. Updates have the dtype of the gradients.

    Raises:
      TypeError: for arguments of a wrong type.
      ValueError: for arguments out of range; from update, if ``params`` is missing or
        gradients and state do not match.

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.compressed_accumulation(fj.adafactor(1e-2), 16, fj.Sketch(32))

    References:
      Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
      <https://arxiv.org/abs/1804.04235>`_, 2018
    """
    return _chain(
        "adafactor",
        _normalized(decay_rate, epsilon, clipping_threshold, rules),
        multiply_by_parameter_scale,
        weight_decay is not None,
        decay_and_learning_rate(weight_decay, weight_decay_mask, learning_rate),
    )


def _normalized(
    decay_rate: jax.typing.ArrayLike,
    epsilon: jax.typing.ArrayLike,
    clipping_threshold: jax.typing.ArrayLike | None,
    rules: LeafRules,
) -> list[Part]:
    """Division by the factored RMS, and clipping."""
    parts = [factored_rms_part(decay_rate, epsilon, rules)]
    if clipping_threshold is not None:
        check.check_number(
            "clipping_threshold", clipping_threshold, 1e-30, None, "1.0, or None"
        )
        parts.append(clip_part(clipping_threshold))
    return parts


def _chain(
    name: str,
    parts: list[Part],
    multiply_by_parameter_scale: bool,
    weight_decay: bool,
    last: list[Elementwise],
) -> optax.GradientTransformationExtraArgs:
    """The chain, and a name for it that lists what needs the parameters."""
    needs = {
        "multiply_by_parameter_scale": multiply_by_parameter_scale,
        "weight_decay": weight_decay,
    }
    names = ", ".join(key for key, needed in needs.items() if needed)
    scale = [parameter_scale()] if multiply_by_parameter_scale else []
    params_for = f"{name}({names})" if names else ""
    return chain_parts(parts, last=[*scale, *last], params_for=params_for)
