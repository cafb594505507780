"""The library's own S for the oracles, and runs of whole transformations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import flora_jax as fj
from flora_jax.random.keys import leaf_keys
from tests.reference.folds import RANKS, width

_SKETCH = {field.name for field in dataclasses.fields(fj.Sketch)}


def sketch_and_rest(rank, settings):
    """A Sketch of those settings that are its own, and the others."""
    own = {name: x for name, x in settings.items() if name in _SKETCH}
    rest = {name: x for name, x in settings.items() if name not in _SKETCH}
    return fj.Sketch(rank, **own), rest


@functools.cache
def _matrix(projection, seed, name, path, rank, size, epoch):
    (key,) = leaf_keys(jnp.array([0, seed], jnp.uint32), name, [path], epoch)
    return np.asarray(projection.matrix(key, rank, size), np.float64)


def sampled_matrix(projection, seed, name, path, side):
    """The function epoch -> S of one leaf of ``folds.SHAPES``."""
    return functools.partial(
        _matrix, projection, seed, name, path, RANKS[path], width(path, side)
    )


def case_id(value):
    """How a projection, a tuple of leaves or a function reads in a test's name."""
    if isinstance(value, fj.Projection):
        return f"{type(value).__name__}-{value.normalization}"
    if callable(value):
        return value.__name__
    return "-".join(value) if isinstance(value, tuple) else None


def run(tx, gradients, params=None):
    """Updates of all steps, by one jitted update called step by step; last state."""
    step = jax.jit(tx.update)
    state = tx.init(gradients[0] if params is None else params)
    outputs = []
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        outputs.append(updates)
    return outputs, state
