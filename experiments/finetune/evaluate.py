"""What a trained model writes, and how good it is."""

from typing import Any, NamedTuple

from experiments.data import batches, metrics
from experiments.finetune.config import Config
from experiments.finetune.prepare import Prepared
from experiments.models import decode
from experiments.models.config import T5Config


class Sample(NamedTuple):
    """One decoded output."""

    source: str
    reference: str
    prediction: str


def evaluate(
    config: Config,
    prepared: Prepared,
    params: Any,
) -> tuple[dict[str, float], list[Sample]]:
    """Decodes part of the test set.

    Args:
        config: the settings.
        prepared: data and model.
        params: of the model without adapters.

    Returns:
        The data set's metrics in percent, and the first outputs.
    """
    pairs = batches.spread(prepared.splits["test"], config.decode_examples)
    predictions = _decode(config, prepared, params, pairs)
    scores = metrics.score(
        prepared.dataset.metrics, predictions, [pair.target for pair in pairs]
    )
    samples = [
        Sample(*pair, text)
        for pair, text in zip(
            pairs[: config.samples], predictions[: config.samples], strict=True
        )
    ]
    return scores, samples


def _decode(config: Config, prepared: Prepared, params: Any, pairs: Any) -> list[str]:
    vocabulary = prepared.vocabulary
    is_t5 = isinstance(prepared.model, T5Config)
    lengths = {"source_length": config.source_length}
    if is_t5:
        lengths["target_length"] = config.target_length
    make = batches.encoder_decoder if is_t5 else batches.prompts
    inputs = make(pairs, vocabulary, prefix=prepared.dataset.prefix, **lengths)
    limits = {
        "length": config.target_length,
        "eos": vocabulary.eos,
        "pad": vocabulary.pad,
    }
    texts = []
    for batch, real in batches.in_order(inputs, min(config.batch_size, len(pairs))):
        if config.beams == 1:
            rows = decode.greedy(prepared.graphdef, params, batch, **limits)
        else:
            rows = decode.beam(
                prepared.graphdef, params, batch, **limits, beams=config.beams
            )
        texts += vocabulary.decode(rows[:real].tolist())
    return texts
