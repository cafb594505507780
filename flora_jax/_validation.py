"""Argument validators: every message names the argument, the value and the remedy."""

from __future__ import annotations

import inspect
import numbers
import reprlib
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

_STATIC = frozenset(
    {
        "block",
        "dtype",
        "every_k",
        "key",
        "mask",
        "max_aspect_ratio",
        "min_dim_size",
        "min_dim_size_to_factor",
        "min_size",
        "projection",
        "rank",
        "refresh_every",
        "resample_every",
        "should_skip_update_fn",
        "steps",
        "weight_decay_mask",
        "weight_dimension_numbers",
    }
)


def static_args(factory: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a factory's arguments that must stay static under inject_hyperparams.

    ``optax.inject_hyperparams`` turns ints into traced arrays and callables into
    schedules. Ranks, intervals and keys decide shapes and programs and cannot be
    traced: name them in its ``static_args``. The other numbers take the parameters'
    dtype, in which a decay of 0.999 may be 1: with half-precision parameters pass
    ``hyperparam_dtype=jnp.float32`` as well.

    Args:
      factory: a factory of this package, for example ``flora_jax.flora``.

    Returns:
      The names, sorted, that ``factory`` takes and that must be static.

    Example:
      >>> import optax, flora_jax as fj
      >>> make = optax.inject_hyperparams(
      ...     fj.flora, static_args=fj.static_args(fj.flora))
      >>> tx = make(learning_rate=optax.linear_schedule(1e-3, 0.0, 100), rank=8)
    """
    return tuple(sorted(_STATIC & set(inspect.signature(factory).parameters)))


def check_positive_int(name: str, value: Any, remedy: str) -> int:
    """Returns ``value`` as an int, or raises if it is not a static int >= 1.

    Args:
      name: the argument's name.
      value: what was given for it.
      remedy: what to do instead, the end of the message.

    Returns:
      The value as a Python int.

    Raises:
      TypeError: for bools, floats, strings and arrays (traced ones included).
      ValueError: for zero and negative numbers.
    """
    _refuse_array(name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an int, got {name}={value!r}; {remedy}")
    if value <= 0:
        raise ValueError(f"`{name}` must be positive, got {name}={value}; {remedy}")
    return int(value)


def check_steps(name: str, value: Any, remedy: str) -> int:
    """Returns a number of steps as :func:`check_positive_int`, if counters reach it."""
    steps = check_positive_int(name, value, remedy)
    if steps >= 2**31:
        raise ValueError(
            f"`{name}` must be below 2**31, the end of int32 counters, got"
            f" {name}={steps}; {remedy}"
        )
    return steps


def _refuse_array(name: str, value: Any) -> None:
    if isinstance(value, jax.Array):
        raise TypeError(
            f"`{name}` must be a static Python number, got the array {value}; it"
            " decides shapes or the program: under optax.inject_hyperparams pass"
            " static_args=flora_jax.static_args(factory)"
        )


def check_number(
    name: str, value: Any, low: float, high: float | None, remedy: str
) -> None:
    """Raises unless ``low <= value < high``; traced arrays are passed on.

    Args:
      name: the argument's name.
      value: what was given for it.
      low: smallest value that is allowed.
      high: smallest value that is too large, or None.
      remedy: what to do instead, the end of the message.

    Raises:
      TypeError: for anything that is not a real number.
      ValueError: for numbers outside the range, and NaN.
    """
    if name in _STATIC:
        _refuse_array(name, value)
    if isinstance(value, jax.Array | np.ndarray):
        if value.shape or not jnp.issubdtype(value.dtype, jnp.number):
            raise TypeError(
                f"`{name}` must be a real number, got an array of shape {value.shape}"
                f" and dtype {value.dtype}; {remedy}"
            )
        if isinstance(value, jax.core.Tracer):
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"`{name}` must be a real number, got {value!r}; {remedy}")
    if not (value >= low and (high is None or value < high)):
        bounds = f"be at least {low}" if high is None else f"lie in [{low}, {high})"
        raise ValueError(f"`{name}` must {bounds}, got {name}={value}; {remedy}")


def check_bool(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a Python bool."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {name}={value!r}")


def check_axis_name(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` names mesh axes, or is None."""
    names = value if isinstance(value, tuple) else (value,)
    if value is not None and not all(isinstance(x, str) for x in names):
        raise TypeError(
            f"`{name}` must be the name of a mesh axis, a tuple of names, or None, got"
            f" {name}={value!r}; give the names that jax.make_mesh was given"
        )


def check_transformation(
    name: str, value: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that takes extra arguments, or raises TypeError."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(
            f"`{name}` must be an optax transformation, got {reprlib.repr(value)}; call"
            " the factory"
        )
    return optax.with_extra_args_support(value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}, got"
            f" {name}={value!r}; choose one of these"
        )


def check_state_dtype(value: Any) -> jnp.dtype:
    """Returns the dtype of the state, or raises unless it is a floating one."""
    remedy = "use jnp.float32, jnp.bfloat16 or jnp.float16"
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(f"`dtype` must be a dtype, got {value!r}; {remedy}") from error
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise TypeError(
            f"`dtype` must be a floating dtype of 16 bits or more, got dtype={dtype};"
            f" {remedy}"
        )
    return dtype


def check_leaf_rule(name: str, rule: Any) -> None:
    """Raises TypeError if a callable rule does not take (path, shape)."""
    try:
        inspect.signature(rule).bind("path", (1, 1))
    except TypeError as error:
        raise TypeError(
            f"`{name}` must be a callable of (path, shape), got {rule!r}: {error};"
            " unlike optax's masks it is asked for each leaf"
        ) from error
