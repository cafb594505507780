"""Token arrays of fixed shapes out of pairs of texts, and batches of them.

In the shapes below S and T are the source and target lengths and L = S + T.

A decoder-only model reads source, separator, target and end in one row:

    prefix source =>  target <eos> <pad> ... <pad>

The parts are tokenized apart, so that the prompt of a generation is, token by token,
what stood before the target in training.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from experiments.common.errors import ConfigError
from experiments.data.pairs import Pair
from experiments.data.vocabulary import Vocabulary

SEPARATOR = " =>"
"""Stands between source and target; the target then begins with a space."""

Example = dict[str, np.ndarray]


def encoder_decoder(
    pairs: Sequence[Pair],
    vocabulary: Vocabulary,
    *,
    prefix: str,
    source_length: int,
    target_length: int,
) -> list[Example]:
    """Returns the examples of a model such as T5.

    Args:
        pairs: the texts.
        vocabulary: tokenizes both sides.
        prefix: text that says the task, before each source.
        source_length: S; longer sources lose their end.
        target_length: T; longer targets lose their end.

    Returns:
        int32 "source" (S,) and "target" (T,), right-padded; both end in `eos`.
    """
    sources = vocabulary.encode([prefix + pair.source for pair in pairs])
    targets = vocabulary.encode([pair.target for pair in pairs])
    return [
        {
            "source": _ended(source, source_length, vocabulary),
            "target": _ended(target, target_length, vocabulary),
        }
        for source, target in zip(sources, targets, strict=True)
    ]


def decoder_only(
    pairs: Sequence[Pair],
    vocabulary: Vocabulary,
    *,
    prefix: str,
    source_length: int,
    target_length: int,
) -> list[Example]:
    """Returns the examples of a model such as GPT-2.

    Args:
        pairs: the texts.
        vocabulary: tokenizes both sides.
        prefix: text that says the task, before each source.
        source_length: S, for source and separator; longer sources lose their end.
        target_length: T, for target and `eos`; longer targets lose their end.

    Returns:
        int32 "tokens" (L + 1,), right-padded, of which all but the last are inputs and
        all but the first are labels; float32 "weights" (L,) of the labels: 1 for the
        tokens of the target and its `eos`, 0 elsewhere.

    Raises:
        ConfigError: `source_length` is too small.
    """
    heads = _prompts(pairs, vocabulary, prefix, source_length)
    targets = vocabulary.encode([" " + pair.target for pair in pairs])
    length = source_length + target_length
    examples = []
    for head, target in zip(heads, targets, strict=True):
        tail = [*target[: target_length - 1], vocabulary.eos]
        weights = np.zeros(length, np.float32)
        # Label i is token i + 1.
        weights[len(head) - 1 : len(head) + len(tail) - 1] = 1
        tokens = _padded([*head, *tail], length + 1, vocabulary.pad)
        examples.append({"tokens": tokens, "weights": weights})
    return examples


def prompts(
    pairs: Sequence[Pair], vocabulary: Vocabulary, *, prefix: str, source_length: int
) -> list[Example]:
    """Returns what a decoder-only model continues with the target.

    Args:
        pairs: the texts; targets are not looked at.
        vocabulary: tokenizes the sources.
        prefix: as in training.
        source_length: S, as in training.

    Returns:
        int32 "prompt" (S,), left-padded so that all prompts end at the same place;
        bool "prompt_mask" (S,), False on the padding, which a mask alone tells apart
        from an end of text.

    Raises:
        ConfigError: `source_length` is too small.
    """
    examples = []
    for head in _prompts(pairs, vocabulary, prefix, source_length):
        prompt = _padded(head[::-1], source_length, vocabulary.pad)[::-1]
        mask = np.arange(source_length) >= source_length - len(head)
        examples.append({"prompt": prompt.copy(), "prompt_mask": mask})
    return examples


def _prompts(
    pairs: Sequence[Pair], vocabulary: Vocabulary, prefix: str, length: int
) -> list[list[int]]:
    """Returns prefix, source and separator of each pair, at most `length` tokens."""
    [separator] = vocabulary.encode([SEPARATOR])
    if length <= len(separator):
        raise ConfigError(
            f"`--source-length` must be at least {len(separator) + 1} (the separator "
            f"and a token), got {length}"
        )
    sources = vocabulary.encode([prefix + pair.source for pair in pairs])
    return [source[: length - len(separator)] + separator for source in sources]


def _ended(ids: Sequence[int], length: int, vocabulary: Vocabulary) -> np.ndarray:
    return _padded([*ids[: length - 1], vocabulary.eos], length, vocabulary.pad)


def _padded(ids: Sequence[int], length: int, pad: int) -> np.ndarray:
    row = np.full(length, pad, np.int32)
    row[: len(ids)] = ids
    return row


def batched(
    examples: Sequence[Example], batch_size: int, *, seed: int
) -> grain.MapDataset:
    """Returns the training batches: item i is update i's.

    Item i is a pure function of the arguments and i, so that to resume is to go on
    with the next number. Epochs follow one another without end, each in another
    order.

    Args:
        examples: the same in every process.
        batch_size: examples in a batch, on all devices together.
        seed: of the order.

    Raises:
        ConfigError: there is no example.
    """
    _check_any(examples)
    endless = grain.MapDataset.source(examples).shuffle(seed=seed).repeat()
    return endless.batch(batch_size)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Returns `count` items from all over a sequence, or all if there are fewer."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)
    return [items[int(i)] for i in places]


def in_order(
    examples: Sequence[Example], batch_size: int
) -> list[tuple[dict[str, Any], int]]:
    """Returns all examples once, in order, for evaluation.

    Returns:
        Batches of one size, each with the number of its rows that are real: the last
        batch is filled up by repeating its last example.

    Raises:
        ConfigError: there is no example.
    """
    _check_any(examples)
    batches = []
    for start in range(0, len(examples), batch_size):
        rows = list(examples[start : start + batch_size])
        real = len(rows)
        rows += rows[-1:] * (batch_size - real)
        batches.append(({k: np.stack([r[k] for r in rows]) for k in rows[0]}, real))
    return batches


def _check_any(examples: Sequence[Example]) -> None:
    if not examples:
        raise ConfigError("there is no example to make batches of; give more data")
