"""Argument validators: every message names the argument, the value and the remedy."""

from __future__ import annotations

import inspect
import numbers
import os
import reprlib
import sys
import warnings
from collections.abc import Collection
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

_LIBRARIES = os.path.dirname(os.path.dirname(jax.__file__))
_CALLERS = ("jax", "optax", "flax", "equinox")
# Frames that are not the user's: generated code, this package, and its callers.
_INSIDE = (
    "<string>",
    os.path.dirname(__file__) + os.sep,
    *(os.path.join(_LIBRARIES, name, "") for name in _CALLERS),
)


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
    if isinstance(value, jax.Array):
        raise TypeError(
            f"`{name}` must be a static Python int, got the array {value}, which"
            f" optax.inject_hyperparams may have made of an int; {remedy}"
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an int, got {name}={value!r}; {remedy}")
    if value <= 0:
        raise ValueError(f"`{name}` must be positive, got {name}={value}; {remedy}")
    return int(value)


def check_steps(name: str, value: Any, remedy: str) -> int | jax.Array:
    """Returns a number of steps that int32 counters reach; scalar arrays pass.

    Args:
      name: the argument's name.
      value: an int, or an integer scalar array, traced or not.
      remedy: what to do instead, the end of the message.

    Returns:
      The value, as a Python int unless it is an array.

    Raises:
      TypeError: for bools, floats, strings and other arrays.
      ValueError: for numbers below 1 or from 2**31 on.
    """
    if isinstance(value, jax.Array | np.ndarray) and not value.shape:
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(
                f"`{name}` must be an integer, got an array of dtype {value.dtype};"
                f" {remedy}"
            )
        if isinstance(value, jax.core.Tracer):
            return value
        check_steps(name, int(value), remedy)
        return jnp.asarray(value)
    steps = check_positive_int(name, value, remedy)
    if steps >= 2**31:
        raise ValueError(
            f"`{name}` must be below 2**31, the end of int32 counters, got"
            f" {name}={steps}; {remedy}"
        )
    return steps


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
    name: str, value: Any, following: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that takes extra arguments, or raises TypeError.

    Args:
      name: the argument's name.
      value: what was given for it.
      following: the next argument, which may have been taken for this one.
    """
    if not _is_transformation(value):
        remedy = "call the factory"
        if _is_transformation(following):
            remedy = "are the arguments in the other order?"
        raise TypeError(
            f"`{name}` must be an optax transformation, got {reprlib.repr(value)};"
            f" {remedy}"
        )
    return optax.with_extra_args_support(value)


def _is_transformation(value: Any) -> bool:
    return hasattr(value, "init") and hasattr(value, "update")


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


def warn(message: str) -> None:
    """Warns at the line of the user's code that led here.

    That is the first frame outside of this package and of the libraries that call it,
    however many of their frames lie between.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
