"""Texts to token ids and back: T5's SentencePiece and GPT-2's byte-level BPE.

Either is trained on the spot or read from the files in which pretrained models are
published. Nothing is downloaded.
"""

import hashlib
import io
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import sentencepiece as spm
from tokenizers import Tokenizer, models

from experiments.common.errors import ConfigError
from experiments.data import corpus

SEPARATOR = " =>"
"""Stands between source and target; the target then begins with a space."""

_ENDS = (corpus.END_OF_TEXT, "<|end_of_text|>", "</s>")
_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_TURNS = (
    f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n",
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)
_SETTINGS = "tokenizer_config.json"


class Frame(NamedTuple):
    """How a decoder-only model is asked.

    Attributes:
        before: tokens before the source.
        after: tokens between the source and the target.
        lead: text with which the target begins.
    """

    before: list[int]
    after: list[int]
    lead: str


class Vocabulary:
    """What batches and evaluation ask of a tokenizer.

    Attributes:
        size: number of tokens; every id is below it.
        pad: fills up rows; no part of a text.
        eos: ends a text.
        fingerprint: identifies the vocabulary by its content.
    """

    def __init__(self, size: int, pad: int, eos: int, content: bytes):
        """Takes the special tokens, and what the fingerprint is of."""
        self.size, self.pad, self.eos = size, pad, eos
        self.fingerprint = hashlib.sha256(content).hexdigest()[:12]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, without `eos`."""
        raise NotImplementedError

    def frame(self) -> Frame:
        """Returns what stands around the source."""
        return Frame([], self.encode([SEPARATOR])[0], " ")

    def save(self, folder: pathlib.Path) -> None:
        """Writes the file that the model's name for it goes by into `folder`."""
        raise NotImplementedError

    def decode(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """Returns the text of each row up to its first `eos`.

        `pad` is dropped, and so are ids beyond `size`, which a model may produce
        whose output layer is larger than the vocabulary.
        """
        raise NotImplementedError

    def _texts(self, rows: Iterable[Sequence[int]]) -> list[list[int]]:
        """Returns the ids of each row that stand for text, as ints."""
        rows = [itertools.takewhile(lambda i: i != self.eos, row) for row in rows]
        return [
            [int(i) for i in ids if i != self.pad and i < self.size] for ids in rows
        ]


class SentencePiece(Vocabulary):
    """A SentencePiece model with the special tokens of T5."""

    def __init__(self, proto: bytes):
        """Reads a serialized model, the content of a spiece.model."""
        self._proto = proto
        self._model = model = spm.SentencePieceProcessor(model_proto=proto)
        super().__init__(model.vocab_size(), model.pad_id(), model.eos_id(), proto)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Vocabulary`."""
        return self._model.encode(list(texts))

    def save(self, folder: pathlib.Path) -> None:
        """See `Vocabulary`: spiece.model."""
        (folder / "spiece.model").write_bytes(self._proto)

    def decode(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """See `Vocabulary`."""
        return [self._model.decode(ids) for ids in self._texts(rows)]


class BytePair(Vocabulary):
    """A byte-level BPE in which one token ends texts and fills up rows, as GPT-2's."""

    def __init__(self, tokenizer: Tokenizer, end_token: str = corpus.END_OF_TEXT):
        """Takes over a tokenizer that has the token which ends texts."""
        # "<|endoftext|>" in a text is text, never the end of it.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        end = tokenizer.token_to_id(end_token)
        content = tokenizer.to_str().encode()
        super().__init__(tokenizer.get_vocab_size(), end, end, content)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Vocabulary`."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def save(self, folder: pathlib.Path) -> None:
        """See `Vocabulary`: tokenizer.json."""
        self._tokenizer.save(str(folder / "tokenizer.json"))

    def decode(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """See `Vocabulary`."""
        return self._tokenizer.decode_batch(self._texts(rows))


class Chat(BytePair):
    """The tokenizer of a model that was trained to answer, in the format of ChatML."""

    def __init__(self, tokenizer: Tokenizer, template: str):
        """Takes over a tokenizer, and the template that its model was trained with.

        Args:
            tokenizer: one that has `<|im_start|>` and `<|im_end|>`.
            template: Jinja's; one with SmolLM's system prompt has a turn of the system.
        """
        self._template = template
        # Before they are text: see `BytePair`.
        parts = tokenizer.encode_batch(list(_TURNS), add_special_tokens=False)
        system, self._before, self._after = (part.ids for part in parts)
        if _SYSTEM in template:
            self._before = system + self._before
        super().__init__(tokenizer, "<|im_end|>")

    def frame(self) -> Frame:
        """See `Vocabulary`: turns of the system, the user and the assistant."""
        return Frame(self._before, self._after, "")

    def save(self, folder: pathlib.Path) -> None:
        """See `Vocabulary`: tokenizer.json, and the template for transformers."""
        super().save(folder)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": self._template,
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
        }
        text = json.dumps(settings, indent=2) + "\n"
        (folder / _SETTINGS).write_text(text, encoding="utf-8")


def sentencepiece(texts: Iterable[str], size: int) -> SentencePiece:
    """Trains a unigram model (Kudo, 2018) as T5's: pad 0, eos 1, unknown 2.

    Every character of the texts becomes a token, so that each of them can be written;
    others are unknown. Runs of white space count as one space.

    Args:
        texts: what to train on; the same texts always give the same model.
        size: tokens. Little text may yield fewer, never more.

    Raises:
        ConfigError: there is no text, or `size` is too small for its characters.
    """
    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            max_sentence_length=16384,  # bytes; longer texts are ignored
            minloglevel=2,
            **ids,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"`--vocab-size` {size} makes no SentencePiece vocabulary of these texts; "
            f"give more tokens, or more text ({error})"
        ) from error
    return SentencePiece(model.getvalue())


def load_sentencepiece(file: pathlib.Path) -> SentencePiece:
    """Reads the spiece.model of a T5.

    Raises:
        ConfigError: there is no such file, or it is no such model.
    """
    remedy = "give the spiece.model of a T5"
    if not file.is_file():
        raise ConfigError(f"`--tokenizer` {file} is no file; {remedy}")
    try:
        vocabulary = SentencePiece(file.read_bytes())
    except RuntimeError as error:
        raise ConfigError(f"{file} is no SentencePiece model; {remedy}") from error
    if vocabulary.pad != 0 or vocabulary.eos < 0:
        raise ConfigError(
            f"{file} has pad id {vocabulary.pad} and end {vocabulary.eos}, but T5 pads "
            f"with 0 and has an end; {remedy}"
        )
    return vocabulary


def byte_pair(texts: Iterable[str], size: int) -> BytePair:
    """Trains a byte-level BPE as GPT-2's; every text survives it unchanged.

    Args:
        texts: what to train on; the same texts always give the same vocabulary.
        size: tokens, at least the 256 bytes and the end of text. Little text may
            yield fewer, never more.

    Raises:
        ConfigError: `size` is too small for the bytes.
    """
    if size < 257:
        raise ConfigError(
            "`--vocab-size` must be at least 257 (the bytes and the end of text), got "
            f"{size}"
        )
    return BytePair(corpus.train_tokenizer(texts, size))


def load_byte_pair(path: pathlib.Path) -> BytePair:
    """Reads the vocabulary of a GPT-2 or a Llama.

    Args:
        path: a tokenizer.json, or a folder with one or with vocab.json and merges.txt.

    Raises:
        ConfigError: there are no such files, or they are no such vocabulary.
    """
    remedy = "give the tokenizer.json of a GPT-2 or a Llama, or a folder with it"
    file = path / "tokenizer.json" if path.is_dir() else path
    parts = [path / "vocab.json", path / "merges.txt"]
    if not file.is_file() and not all(part.is_file() for part in parts):
        raise ConfigError(
            f"{path} has neither tokenizer.json nor vocab.json and merges.txt; {remedy}"
        )
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        else:
            tokenizer = corpus.byte_level(models.BPE.from_file(*map(str, parts)))
            if tokenizer.token_to_id(corpus.END_OF_TEXT) is not None:
                tokenizer.add_special_tokens([corpus.END_OF_TEXT])
    except Exception as error:  # the library raises nothing more particular
        raise ConfigError(f"{path} is no byte-level BPE: {error}; {remedy}") from error
    settings = file.parent / _SETTINGS
    if settings.is_file():
        template = json.loads(settings.read_text("utf-8")).get("chat_template")
        if isinstance(template, str) and "<|im_start|>" in template:
            return Chat(tokenizer, template)
    for end in _ENDS:
        if tokenizer.token_to_id(end) is not None:
            return BytePair(tokenizer, end)
    raise ConfigError(f"{path} has none of the tokens {', '.join(_ENDS)}; {remedy}")
