"""What a trained model writes, and how good it is."""

import dataclasses
from typing import Any

from experiments.common.problem import evaluation
from experiments.data import batches, metrics
from experiments.data.pairs import Pair
from experiments.finetune.config import Config
from experiments.finetune.prepare import Prepared
from experiments.models import decode
from experiments.models.config import T5Config


def evaluate(
    config: Config, prepared: Prepared, params: Any
) -> tuple[dict[str, float], list[tuple[Pair, str]]]:
    """Decodes part of the test set, and measures the loss on the other data sets.

    Args:
        config: the settings.
        prepared: data and model.
        params: of the model without adapters.

    Returns:
        The data set's metrics in percent and the losses, as "prose_loss", in nats per
        token; and the first pairs with their outputs, none of plain texts.
    """
    scores = {}
    for name, examples in prepared.eval_datasets.items():
        other = dataclasses.replace(prepared, validation=examples)
        found = evaluation(config, other, prepared.graphdef)(params, {})
        scores[f"{name}_loss"] = found["validation_loss"]
    if prepared.dataset.prefix is None:
        return scores, []
    pairs = batches.spread(prepared.splits["test"], config.decode_examples)
    texts, targets = _decode(config, prepared, params, pairs), [x.target for x in pairs]
    scores |= metrics.score(prepared.dataset.metrics, texts, targets)
    return scores, list(zip(pairs, texts, strict=True))[: config.samples]


def _decode(config: Config, prepared: Prepared, params: Any, pairs: Any) -> list[str]:
    vocabulary, layout = prepared.vocabulary, prepared.layout
    is_t5 = isinstance(prepared.model, T5Config)
    inputs = layout.encoder_decoder(pairs) if is_t5 else layout.prompts(pairs)
    search, limits = decode.greedy, {"length": config.target_length}
    limits |= {"eos": vocabulary.eos, "pad": vocabulary.pad}
    if config.beams > 1:
        search, limits = decode.beam, limits | {"beams": config.beams}
    texts = []
    for batch, real in batches.in_order(inputs, min(config.batch_size, len(pairs))):
        rows = search(prepared.graphdef, params, batch, **limits)
        texts += vocabulary.decode(rows[:real].tolist())
    return texts
