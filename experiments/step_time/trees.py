"""Trees of parameters with GPT-2's shapes, made without a model's initialisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import PUBLISHED, create
from experiments.models.build import Params

_SIZES = {name: PUBLISHED[name] for name in ("gpt2", "gpt2-xl")}


def shapes(name: str, dtype: str) -> Params:
    """Returns the tree's ShapeDtypeStructs.

    Args:
        name: gpt2 or gpt2-xl, with -stacked for one array per weight of all layers.
        dtype: of every leaf.

    Raises:
        ValueError: there is no such tree.
    """
    size = name.removesuffix("-stacked")
    if size not in _SIZES:
        raise ValueError(f"`trees` must be of {', '.join(_SIZES)}, got {name!r}")
    config = dataclasses.replace(_SIZES[size], scan=name != size)
    params = jax.eval_shape(lambda: create(config, 0)[1])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), params
    )


def random_like(tree: Params, seed: int) -> Params:
    """Returns normal numbers of standard deviation 0.02 in the shapes of a tree."""
    generator = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = generator.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(0.02 * numbers, leaf.dtype)

    return jax.tree.map(draw, tree)
