"""One method's training problem: its loss, its batches and its validation."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import devices, gradients, loop, lora
from experiments.common.checkpoints import State
from experiments.data import batches
from experiments.finetune import methods
from experiments.finetune.config import Config
from experiments.finetune.methods import METHODS
from experiments.finetune.prepare import Prepared
from experiments.models import token_losses
from experiments.models.t5 import PAD as T5_PAD


def build(
    config: Config, prepared: Prepared, name: str, rank: int | None
) -> tuple[loop.Problem, State, Any]:
    """Returns the problem of the method called `name`, its start, and its optimizer."""
    graphdef, trained, frozen = prepared.graphdef, prepared.params, {}
    if METHODS[name].adapters:
        graphdef, params = lora.add(
            graphdef, trained, rank, config.alpha(rank), config.seed
        )
        trained, frozen = lora.divide(params, tune_rest=config.lora_tune_rest)

    def loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> jax.Array:
        key = key if config.dropout else None
        losses, weights = token_losses(graphdef, lora.join(params, frozen), batch, key)
        return (losses * weights).sum() / batch["share"].sum()

    examples = batches.batched(prepared.train, config.batch_size, seed=config.seed)
    problem = loop.Problem(
        loss=loss,
        frozen=frozen,
        batches=examples.map(_with_share),
        tokens=config.batch_size * (config.source_length + config.target_length),
        evaluate=_evaluation(config, prepared, graphdef),
        gradient=gradients.of(methods.recipe(config, name, rank)),
    )
    tx = methods.optimizer(config, name, rank)
    # A copy on the device: the step donates its state.
    trained = jax.tree.map(lambda x: jnp.array(x, copy=True), trained)
    return problem, State(trained, tx.init(trained)), tx


def _with_share(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds each row's share of the batch's tokens to predict.

    Dividing by it, the mean over micro-batches is the mean over the batch, however the
    tokens are spread over them: accumulation has the objective of no accumulation.
    """
    weights = batch["weights"] if "weights" in batch else batch["target"] != T5_PAD
    rows = len(weights)
    return batch | {"share": np.full(rows, weights.sum() / rows, np.float32)}


def _evaluation(config: Config, prepared: Prepared, graphdef: Any) -> Any:
    """Returns a function of parameters: loss and perplexity per token."""
    held_out = prepared.validation
    chunks = batches.in_order(held_out, min(config.batch_size, len(held_out)))

    @functools.partial(jax.jit, out_shardings=devices.on_all())
    def sums(params: Any, frozen: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        losses, weights = token_losses(graphdef, lora.join(params, frozen), batch)
        return (losses * weights).sum(axis=1), weights.sum(axis=1)

    def evaluate(params: Any, frozen: Any) -> dict[str, float]:
        total = count = 0.0
        for batch, real in chunks:
            parts = sums(params, frozen, devices.split(batch))
            losses, weights = jax.device_get(parts)
            total += float(losses[:real].sum())
            count += float(weights[:real].sum())
        mean = total / count
        return {"validation_loss": mean, "perplexity": math.exp(min(mean, 700))}

    return evaluate
