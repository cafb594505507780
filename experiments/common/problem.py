"""One method's training problem: what it trains, its loss, its batches, its validation.

The same for pretraining and fine-tuning, which differ in the data alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.common import devices, lora
from experiments.common.checkpoints import State
from experiments.common.config import JobConfig
from experiments.common.methods import METHODS, Loss, settings_of
from experiments.data import batches
from experiments.models.build import Params, token_losses
from experiments.models.config import Config as ModelConfig
from experiments.models.t5 import PAD as T5_PAD

Batch = dict[str, np.ndarray]
Evaluate = Callable[[Params, Params], dict[str, float]]


class Problem(NamedTuple):
    """What is trained, on what, and how it is judged.

    Attributes:
        loss: of params, frozen, batch and key: nats per token, a scalar.
        value_and_grad: of the optimizer's state and the loss's arguments, see `Method`.
        frozen: parameters that are not trained; an empty tree where all are.
        batches: item i is the batch of update i + 1: NumPy arrays, (examples, ...).
        tokens: in a batch, padding included.
        evaluate: metrics of params and frozen; "validation_loss" among them.
        merged: of params and frozen, the parameters of the model without adapters.
    """

    loss: Loss
    value_and_grad: Callable[..., tuple[jax.Array, Any]]
    frozen: Any
    batches: Sequence[Batch]
    tokens: int
    evaluate: Evaluate
    merged: Callable[[Any, Any], Params]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What all methods of a job start from.

    Attributes:
        model: the sizes.
        graphdef: the model's static part.
        params: its parameters, on the host: each method takes a copy to the devices and
            gives it up.
        train: random access to the training examples.
        validation: the examples of the validation.
        tokens: in an example, padding included.
        fingerprint: identifies vocabulary and examples.
        pretrained: whether the parameters were read from a checkpoint.
    """

    model: ModelConfig
    graphdef: nnx.GraphDef
    params: Params
    train: Sequence[batches.Example]
    validation: Sequence[batches.Example]
    tokens: int
    fingerprint: str
    pretrained: bool = False


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """Divides a batch, of NumPy arrays, into equal parts."""
    parts = {name: np.split(rows, count) for name, rows in batch.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(count)]


def learning_rate(config: JobConfig, method: str) -> optax.Schedule:
    """Returns the learning rate of a method over the updates.

    A linear warm-up to the peak, then a cosine down to a tenth of it, or a constant.
    """
    peak, updates = config.peak(method), config.updates
    warmup = round(config.warmup_fraction * updates)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1),  # at 0 the first update would be lost
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(updates, warmup + 1),
        end_value=peak * {"cosine": 0.1, "constant": 1.0}[config.schedule],
    )


def build(
    config: JobConfig, data: Data, name: str, rank: int | None
) -> tuple[Problem, State, optax.GradientTransformationExtraArgs]:
    """Returns the problem of the method called `name`, its start, and its optimizer."""
    method, settings = METHODS[name], settings_of(config, rank)
    graphdef, trained, frozen = data.graphdef, data.params, {}
    if method.adapters:
        alpha = rank if config.lora_alpha is None else config.lora_alpha
        graphdef, params = lora.add(graphdef, trained, rank, alpha, config.seed)
        trained, frozen = lora.divide(params, tune_rest=config.lora_tune_rest)

    def loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> jax.Array:
        key = key if data.model.dropout else None
        losses, weights = token_losses(graphdef, lora.join(params, frozen), batch, key)
        return (losses * weights).sum() / batch["share"].sum()

    def merged(params: Any, frozen: Any) -> Params:
        params = lora.join(params, frozen)
        return lora.merge(params, rank, alpha) if method.adapters else params

    examples = batches.batched(data.train, config.batch_size, seed=config.seed)
    problem = Problem(
        loss=loss,
        value_and_grad=functools.partial(method.value_and_grad, loss, settings.sketch),
        frozen=frozen,
        batches=examples.map(_with_share),
        tokens=config.batch_size * data.tokens,
        evaluate=evaluation(config, data, graphdef),
        merged=merged,
    )
    tx = method.optimizer(learning_rate(config, name), settings)
    # A copy on the device: the step donates its state.
    trained = jax.tree.map(lambda x: jnp.array(x, copy=True), trained)
    return problem, State(trained, tx.init(trained)), tx


def _with_share(batch: Batch) -> Batch:
    """Adds each row's share of the batch's tokens to predict.

    Dividing by it, the mean over micro-batches is the mean over the batch, however the
    tokens are spread over them: accumulation has the objective of no accumulation.
    """
    if "target" in batch:
        weights = batch["target"] != T5_PAD
    else:
        weights = batch.get("weights", np.ones_like(batch["tokens"][:, 1:]))
    rows = len(weights)
    return batch | {"share": np.full(rows, weights.sum() / rows, np.float32)}


@functools.cache
def _sums_per_row(sharding: jax.sharding.Sharding) -> Callable[..., Any]:
    """Returns the compiled sums of losses and weights, shared by all methods."""

    @functools.partial(jax.jit, out_shardings=sharding)
    def sums(graphdef: nnx.GraphDef, params: Any, frozen: Any, batch: Any) -> Any:
        losses, weights = token_losses(graphdef, lora.join(params, frozen), batch)
        return (losses * weights).sum(axis=1), weights.sum(axis=1)

    return sums


def evaluation(config: JobConfig, data: Data, graphdef: nnx.GraphDef) -> Evaluate:
    """Returns a function of parameters: loss and perplexity per token.

    Args:
        config: whose batch size is taken.
        data: whose validation is taken.
        graphdef: static part of the model that has these parameters.
    """
    held_out = data.validation
    chunks = batches.in_order(held_out, min(config.batch_size, len(held_out)))

    def evaluate(params: Params, frozen: Params) -> dict[str, float]:
        sums = _sums_per_row(devices.on_all())
        total = count = 0.0
        for batch, real in chunks:
            parts = sums(graphdef, params, frozen, devices.split(batch))
            losses, weights = jax.device_get(parts)
            total += float(losses[:real].sum())
            count += float(weights[:real].sum())
        mean = total / count
        return {"validation_loss": mean, "perplexity": math.exp(min(mean, 700))}

    return evaluate
