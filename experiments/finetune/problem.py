"""One method's training problem: its loss, its batches and its validation."""

import math
from typing import Any

import jax

from experiments import loop, lora
from experiments.checkpoints import State
from experiments.config import ConfigError
from experiments.datasets import batches
from experiments.finetune import methods
from experiments.finetune.config import Config
from experiments.finetune.methods import METHODS
from experiments.finetune.prepare import Prepared
from experiments.models import T5Config, mean_loss, token_losses


def examples(config: Config, prepared: Prepared, split: str) -> Any:
    """Returns the tokenised examples of a split, at fixed lengths."""
    is_t5 = isinstance(prepared.model, T5Config)
    make = batches.encoder_decoder if is_t5 else batches.decoder_only
    return make(
        prepared.splits[split],
        prepared.vocabulary,
        prefix=prepared.dataset.prefix,
        source_length=config.source_length,
        target_length=config.target_length,
    )


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
        return mean_loss(graphdef, lora.join(params, frozen), batch, key)

    hosts = jax.process_count()
    _check_devices(config, METHODS[name].micro_batches(config))
    problem = loop.Problem(
        loss=loss,
        frozen=frozen,
        batches=batches.batched(
            examples(config, prepared, "train"),
            config.batch_size // hosts,
            seed=config.seed,
            shard=(jax.process_index(), hosts),
        ),
        tokens=config.batch_size * (config.source_length + config.target_length),
        evaluate=_evaluation(config, prepared, graphdef, frozen),
    )
    tx = methods.optimizer(config, name, rank)
    # A copy: the step donates its state, and the next method starts from here too.
    trained = jax.tree.map(lambda x: x.copy(), trained)
    return problem, State(trained, tx.init(trained)), tx


def _check_devices(config: Config, parts: int) -> None:
    count = jax.device_count()
    if config.batch_size % (parts * count):
        raise ConfigError(
            f"`--batch-size` must be a multiple of {parts * count} for {parts} "
            f"micro-batches on {count} devices, got {config.batch_size}"
        )


def _evaluation(config: Config, prepared: Prepared, graphdef: Any, frozen: Any) -> Any:
    """Returns a function of trained parameters: loss and perplexity per token."""
    held_out = examples(config, prepared, "validation")[: config.eval_examples]
    chunks = batches.in_order(held_out, min(config.batch_size, len(held_out)))

    @jax.jit
    def sums(params: Any, frozen: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        losses, weights = token_losses(graphdef, lora.join(params, frozen), batch)
        return (losses * weights).sum(axis=1), weights.sum(axis=1)

    def evaluate(params: Any) -> dict[str, float]:
        total = count = 0.0
        for batch, real in chunks:
            losses, weights = sums(params, frozen, batch)
            total += float(losses[:real].sum())
            count += float(weights[:real].sum())
        mean = total / count
        return {"validation_loss": mean, "perplexity": math.exp(min(mean, 700))}

    return evaluate
