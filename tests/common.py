"""Tolerances, trees and tiers that several tests share."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Relative to the largest entry of what is expected: a few dozen roundings of the dtype.
_TOLERANCE = {"float64": 1e-12, "float32": 3e-6, "bfloat16": 3e-2, "float16": 4e-3}
_TOLERANCE |= dict.fromkeys(["int32", "int8", "uint8"], 0.0)


def assert_close(actual, expected, dtype=None):
    """Asserts that two trees agree within the tolerance of a dtype.

    Args:
      actual: a tree of arrays.
      expected: a tree of arrays with the same leaves.
      dtype: the dtype whose rounding is allowed; the coarser of both by default.
    """
    ours, theirs = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        names = [dtype] if dtype else [str(x.dtype), str(y.dtype)]
        rtol = max(_TOLERANCE[str(jnp.dtype(n))] for n in names)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        scale = np.abs(y).max(initial=0.0)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale)


def assert_near(found, wanted, tolerance):
    """Asserts that leaves differ by at most so much of their largest entry."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max(initial=0))


def every_fold(dtype=jnp.float32):
    """Parameters with every kind of fold, at min_dim_size=8 and rank 4.

    Sketched: tall, wide, square, cut (16 x 32 from three axes), stack, conv. Dense:
    the others.
    """
    shapes = {
        "tall": (32, 16),
        "wide": (16, 24),
        "square": (16, 16),
        "cut": (16, 4, 8),
        "stack": (3, 16, 24),
        "conv": (3, 3, 8, 16),
        "bias": (16,),
        "scalar": (),
        "narrow": (16, 4),
        "long": (8, 200),
    }
    # By NumPy: jax would compile a program for each shape.
    rng = np.random.default_rng(7)
    return {
        name: jnp.asarray(rng.normal(size=shape), dtype)
        for name, shape in shapes.items()
    }


SKETCHED = {"tall", "wide", "square", "cut", "stack", "conv"}


_CACHED = []


def cached(function):
    """functools.cache for what holds compiled programs; see :func:`clear_caches`."""
    wrapped = functools.cache(function)
    _CACHED.append(wrapped)
    return wrapped


def clear_caches():
    """Lets go of all compiled programs, jax's own included."""
    for function in _CACHED:
        function.cache_clear()
    jax.clear_caches()


def process_environment(**variables):
    """The environment of a child process: as here, but on one device; and variables."""
    # For jax its own variable comes before the number of devices in XLA_FLAGS.
    own = {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return os.environ | own | variables


def step_temporaries(tx, params):
    """Temporary bytes of an update and its application, parameters and state donated.

    In a whole step, where the update can lie in the parameters' place.
    """

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    arguments = params, jax.eval_shape(tx.init, params), params
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes
