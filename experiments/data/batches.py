"""Token arrays of fixed shapes out of pairs of texts, and batches of them.

In the shapes below S and T are the source and target lengths and L = S + T.

A decoder-only model reads source, separator, target and end in one row:

    prefix source =>  target <eos> <pad> ... <pad>

or, of a model that was trained to answer, in its own format of a conversation. The
parts are tokenized apart, so that the prompt of a generation is, token by token, what
stood before the target in training.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from experiments.common.errors import ConfigError
from experiments.data.pairs import Pair
from experiments.data.vocabulary import Vocabulary

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How pairs become rows of token ids.

    Attributes:
        vocabulary: tokenizes both sides.
        prefix: text that says the task, before each source; None for plain texts.
        source_length: S; longer sources lose their end. Of a decoder-only model it
            counts what stands around them as well.
        target_length: T, with `eos`; longer targets lose their end.
    """

    vocabulary: Vocabulary
    prefix: str | None
    source_length: int
    target_length: int

    def encoder_decoder(self, pairs: Sequence[Pair]) -> list[Example]:
        """Returns the examples of a model such as T5.

        Args:
            pairs: sources and targets as text, one pair for each example.

        Returns:
            int32 "source" (S,) and "target" (T,), right-padded; both end in `eos`.
        """
        targets = self.vocabulary.encode([pair.target for pair in pairs])
        sides = zip(self._sources(pairs), targets, strict=True)
        return [
            {
                "source": self._ended(source, self.source_length),
                "target": self._ended(target, self.target_length),
            }
            for source, target in sides
        ]

    def decoder_only(self, pairs: Sequence[Pair]) -> list[Example]:
        """Returns the examples of a model such as GPT-2.

        Args:
            pairs: sources and targets as text, one pair for each example.

        Returns:
            int32 "tokens" (L + 1,), right-padded, of which all but the last are inputs
            and all but the first are labels; int32 "first", the label with which the
            target begins, and float32 "weights" (T,) of the labels from there on: 1 for
            the target and its `eos`, 0 behind them. Plain texts have neither prompt nor
            `eos`, lose what is beyond L + 1 tokens, and have "weights" (L,).

        Raises:
            ConfigError: `source_length` is too small.
        """
        vocabulary, length = self.vocabulary, self.source_length + self.target_length
        if self.prefix is None:
            texts = vocabulary.encode([pair.target for pair in pairs])
            return [self._plain(text, length) for text in texts]
        lead = vocabulary.frame().lead
        targets = vocabulary.encode([lead + pair.target for pair in pairs])
        examples = []
        for head, target in zip(self._prompts(pairs), targets, strict=True):
            tail = [*target[: self.target_length - 1], vocabulary.eos]
            first = np.int32(len(head) - 1)  # Label i is token i + 1.
            weights = (np.arange(self.target_length) < len(tail)).astype(np.float32)
            tokens = _padded([*head, *tail], length + 1, vocabulary.pad)
            examples.append({"tokens": tokens, "first": first, "weights": weights})
        return examples

    def prompts(self, pairs: Sequence[Pair]) -> list[Example]:
        """Returns what a decoder-only model continues with the target.

        Args:
            pairs: of which the sources are read, one for each example.

        Returns:
            int32 "prompt" (S,), left-padded so that all prompts end at the same place;
            bool "prompt_mask" (S,), False on the padding, which a mask alone tells
            apart from an end of text.

        Raises:
            ConfigError: `source_length` is too small.
        """
        length, examples = self.source_length, []
        for head in self._prompts(pairs):
            prompt = _padded(head[::-1], length, self.vocabulary.pad)[::-1]
            mask = np.arange(length) >= length - len(head)
            examples.append({"prompt": prompt.copy(), "prompt_mask": mask})
        return examples

    def _plain(self, text: list[int], length: int) -> Example:
        weights = (np.arange(1, length + 1) < len(text)).astype(np.float32)
        tokens = _padded(text[: length + 1], length + 1, self.vocabulary.pad)
        return {"tokens": tokens, "weights": weights}

    def _sources(self, pairs: Sequence[Pair]) -> list[list[int]]:
        prefix = self.prefix or ""
        return self.vocabulary.encode([prefix + pair.source for pair in pairs])

    def _prompts(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Returns all that stands before the target of each pair, at most S tokens."""
        before, after, _ = self.vocabulary.frame()
        room = self.source_length - len(before) - len(after)
        if room <= 0:
            raise ConfigError(
                f"`--source-length` must be at least {self.source_length - room + 1} "
                "(what stands around a source, and a token of it), got "
                f"{self.source_length}"
            )
        return [before + source[:room] + after for source in self._sources(pairs)]

    def _ended(self, ids: Sequence[int], length: int) -> np.ndarray:
        end = self.vocabulary.eos
        return _padded([*ids[: length - 1], end], length, self.vocabulary.pad)


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
