"""What recipes share: callable decay masks, Adam in a subspace, the last steps."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax

from flora_jax import _validation as check
from flora_jax._typing import PyTree
from flora_jax.projections.base import Projection
from flora_jax.quantization.quantize_state import check_code, quantize_state
from flora_jax.sketching.sketch import Sketch, resolve
from flora_jax.subspace.residuals import Fira, Residual
from flora_jax.subspace.transform import scale_in_subspace
from flora_jax.subspace.transports import Keep, LDAdam, Reset, Transport
from flora_jax.transforms.elementwise import (
    Elementwise,
    decayed_weights,
    negative_learning_rate,
)
from flora_jax.transforms.orthogonalize import orthogonalize
from flora_jax.transforms.parts import chain_parts

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound=Residual | Transport | None)

# A tree of bools, or a callable of the parameters that gives one.
DecayMask = PyTree | Callable[[PyTree], PyTree] | None


@dataclasses.dataclass(frozen=True)
class _Static:
    """A callable argument that is not callable itself."""

    value: Callable[..., Any]


class _Signature(inspect.Signature):
    """A signature that binds callable masks in a :class:`_Static`.

    ``optax.inject_hyperparams`` binds a factory's arguments and takes every callable
    one for a schedule, so that masks would have to be named in its ``static_args``.
    """

    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        """The arguments, with a callable ``weight_decay_mask`` wrapped."""
        bound = super().bind(*args, **kwargs)
        mask = bound.arguments.get("weight_decay_mask")
        if callable(mask):
            bound.arguments["weight_decay_mask"] = _Static(mask)
        return bound


def recipe(factory: F) -> F:
    """Lets ``optax.inject_hyperparams`` take a recipe with a callable decay mask."""
    signature = _Signature.from_callable(factory)
    setattr(factory, "__signature__", signature)  # noqa: B010 (no attribute by type)
    return factory


def adam(
    b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, eps: jax.typing.ArrayLike
) -> optax.GradientTransformation:
    """``optax.scale_by_adam``, after checks of its arguments."""
    check.check_number("b1", b1, 0, 1, "Adam's default is 0.9")
    check.check_number("b2", b2, 0, 1, "Adam's default is 0.999")
    check.check_number("eps", eps, 0, None, "Adam's default is 1e-8")
    return optax.scale_by_adam(b1, b2, eps)


def decay_and_learning_rate(
    weight_decay: optax.ScalarOrSchedule | None,
    weight_decay_mask: DecayMask,
    learning_rate: optax.ScalarOrSchedule,
) -> list[Elementwise]:
    """Decoupled weight decay, where there is one, and the learning rate."""
    if not callable(learning_rate):
        remedy = "pass a float or a schedule"
        check.check_number("learning_rate", learning_rate, -math.inf, None, remedy)
    last = negative_learning_rate(learning_rate)
    if weight_decay is None:
        return [last]
    if not callable(weight_decay):
        check.check_number("weight_decay", weight_decay, 0, None, "0.1 or None")
    mask = weight_decay_mask
    if isinstance(mask, _Static):
        mask = mask.value
    return [decayed_weights(weight_decay, mask), last]


def adamw_in_subspace(
    name: str,
    projection: Projection,
    *,
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int,
    refresh_every: int | jax.Array | None,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike,
    weight_decay: optax.ScalarOrSchedule | None,
    weight_decay_mask: DecayMask,
    state_dtype: str | None,
    stagger: bool,
    residual: Residual | None = None,
    transport: Transport = Keep(),
    error_feedback: bool = False,
    orthogonal: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam on sketches, decoupled weight decay in the full space, the learning rate.

    Args:
      name: the recipe's name, for messages.
      projection: for a sketch that has none.
      learning_rate: a float or a schedule.
      sketch: the user's sketch.
      refresh_every: as in ``scale_in_subspace``.
      b1: decay of the first moment, also for a residual or transport without decays.
      b2: decay of the second moment, likewise.
      eps: added to the square root of the second moment.
      scale: as in ``scale_in_subspace``.
      weight_decay: multiplied by the learning rate; None to disable.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      state_dtype: dtype of ``quantize_state`` for both moments; None for float32.
      stagger: as in ``scale_in_subspace``.
      residual: likewise.
      transport: likewise.
      error_feedback: likewise.
      orthogonal: whether the updates of matrices are orthogonalized.

    Returns:
      The gradient transformation.
    """
    check.check_bool("orthogonal", orthogonal)
    sketch = resolve(sketch, projection, Projection)
    tx = scale_in_subspace(
        adam(b1, b2, eps),
        sketch,
        refresh_every,
        residual=_with_decays(residual, b1, b2),
        transport=_with_decays(transport, b1, b2),
        scale=scale,
        error_feedback=error_feedback,
        stagger=stagger,
    )
    if state_dtype is not None:
        fields = ("mu", "nu", "error") if error_feedback else ("mu", "nu")
        tx = quantize_state(tx, check_code("state_dtype", state_dtype), fields=fields)
    muon = [orthogonalize(rules=sketch.rules)] if orthogonal else []
    last = decay_and_learning_rate(weight_decay, weight_decay_mask, learning_rate)
    needs = "" if weight_decay is None else f"{name}(weight_decay)"
    return chain_parts((), tx, *muon, last=last, params_for=needs)


def _with_decays(part: S, b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike) -> S:
    """A residual or transport that takes the recipe's decays where it has none."""
    if not isinstance(part, Fira | LDAdam | Reset):
        return part
    given = part.b1 is not None or part.b2 is not None
    return part if given else dataclasses.replace(part, b1=b1, b2=b2)
