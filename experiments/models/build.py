"""Models as plain functions of plain trees, and their losses.

A training step is then a plain function too, which dispatches faster than a module,
and the tree is what optax and Orbax know best.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from experiments.models.blocks import Batch, losses
from experiments.models.config import (
    PUBLISHED,
    Config,
    GPT2Config,
    LlamaConfig,
    T5Config,
    validate,
)
from experiments.models.gpt2 import GPT2
from experiments.models.llama import Llama
from experiments.models.t5 import T5

_MODELS = {GPT2Config: GPT2, LlamaConfig: Llama, T5Config: T5}

Params = dict[str, Any]
"""Nested dicts of arrays; a path in it reads "h/0/attn/c_attn/kernel"."""


def create(config: Config, seed: int) -> tuple[nnx.GraphDef, Params]:
    """Builds a model and takes it apart: its static part, and its parameters.

    Of the largest model, `jax.eval_shape` gives the shapes without the memory.

    Args:
        config: the sizes; they decide which model it is.
        seed: of the initial parameters. `scan` does not change the numbers.

    Returns:
        What `nnx.merge` puts together again.

    Raises:
        ConfigError: the sizes make no sense.
    """
    validate(config)
    model = _MODELS[type(config)](config, rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def shapes(name: str, dtype: str) -> Params:
    """Returns a tree of ShapeDtypeStructs.

    Args:
        name: of a published size, with -stacked for one array per weight of all layers.
        dtype: of every leaf.
    """
    size = name.removesuffix("-stacked")
    config = dataclasses.replace(PUBLISHED[size], scan=name != size)
    return jax.eval_shape(lambda: optax.tree.cast(create(config, 0)[1], dtype))


def token_losses(
    graphdef: nnx.GraphDef, params: Params, batch: Batch, key: Array | None = None
) -> tuple[Array, Array]:
    """Cross-entropy of every token that the batch asks for.

    Args:
        graphdef: the model's static part.
        params: its parameters.
        batch: see `Batch`.
        key: dropout key; None drops nothing.

    Returns:
        float32 losses in nats and float32 weights, both (B, T); padding weighs 0.
    """
    model = nnx.merge(graphdef, params)
    x, labels, weights = model.training(batch, key)
    return losses(model.logits, x, labels), weights


def mean_loss(
    graphdef: nnx.GraphDef, params: Params, batch: Batch, key: Array | None = None
) -> Array:
    """Weighted mean of `token_losses`, in nats: a scalar, 0 if all weights are 0."""
    each, weights = token_losses(graphdef, params, batch, key)
    total = jnp.maximum(weights.sum(), jnp.finfo(jnp.float32).tiny)
    return (each * weights).sum() / total
