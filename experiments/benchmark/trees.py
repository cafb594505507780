"""Trees of parameters with GPT-2's shapes, made without a model's initialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import gpt2
from experiments.config import ModelConfig
from experiments.gpt2 import Params

_SIZES = {
    "gpt2": ModelConfig(12, 768, 12, 1024, 50257),
    "gpt2-xl": ModelConfig(48, 1600, 25, 1024, 50257),
}


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
    create = functools.partial(gpt2.create, _SIZES[size], 0)
    params = jax.eval_shape(lambda: create()[1])
    if name != size:
        params = _stack(params)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), params
    )


def _stack(params: Params) -> Params:
    layers = list(params["h"].values())
    stacked = jax.tree.map(
        lambda *leaves: jax.ShapeDtypeStruct(
            (len(leaves), *leaves[0].shape), leaves[0].dtype
        ),
        *layers,
    )
    return params | {"h": stacked}


def random_like(tree: Params, seed: int) -> Params:
    """Returns normal numbers of standard deviation 0.02 in the shapes of a tree."""
    generator = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = generator.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(0.02 * numbers, leaf.dtype)

    return jax.tree.map(draw, tree)
