"""What recipes have in common: a decay mask that may be callable, and how they end."""

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

F = TypeVar("F", bound=Callable[..., Any])

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
    check.check_number("b1", b1, 0, 1, "0.9 is Adam's")
    check.check_number("b2", b2, 0, 1, "0.999 is Adam's")
    check.check_number("eps", eps, 0, None, "1e-8 is Adam's")
    return optax.scale_by_adam(b1, b2, eps)


def decay_and_learning_rate(
    weight_decay: optax.ScalarOrSchedule | None,
    weight_decay_mask: DecayMask,
    learning_rate: optax.ScalarOrSchedule,
) -> list[optax.GradientTransformation]:
    """Decoupled weight decay, where there is one, and the learning rate."""
    if not callable(learning_rate):
        check.check_number(
            "learning_rate", learning_rate, -math.inf, None, "pass one, or a schedule"
        )
    last = optax.scale_by_learning_rate(learning_rate)
    if weight_decay is None:
        return [last]
    if not callable(weight_decay):
        check.check_number("weight_decay", weight_decay, 0, None, "0.1 or None")
    mask = weight_decay_mask
    if isinstance(mask, _Static):
        mask = mask.value
    return [optax.add_decayed_weights(weight_decay, mask), last]
