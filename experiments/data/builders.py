"""The data sets that TensorFlow Datasets describes, without TensorFlow.

They are written as array_record, which is what can be read without TensorFlow. The
whole of a data set is held in memory (XSum: about 0.6 GB).
"""

import json
import pathlib
import re
import tarfile
from collections.abc import Iterator
from typing import Any

import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core import DatasetBuilder
from tensorflow_datasets.summarization import xsum  # registers it

from experiments.common.errors import ConfigError
from experiments.data.pairs import Pair, Splits, split_pairs

OPUS = "opus/IT"
"""GNOME, KDE4, PHP, Ubuntu and OpenOffice: the smallest of the German corpora."""

ARTICLES = "xsum-extracts-from-downloads.tar.gz"
"""One `<id>.data` file per article; TFDS expects this name as well."""

SPLIT_IDS = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
"""The ids of the articles in each split."""

_SPLITS = ("train", "validation", "test")
_README = "https://github.com/EdinburghNLP/XSum/blob/master/XSum-Dataset/README.md"
_SECTION = re.compile(r"\[XSUM\]([A-Z]+)\[XSUM\]")
# Left-overs of the web page, which version 1.1.0 of the data set leaves out.
_WIDGET = re.compile(
    "Share this with|Email|Facebook|Messenger|Twitter|Pinterest|WhatsApp|Linked[iI]n"
    "|Copy this link|These are external links and will open in a new window"
)


class Xsum(xsum.Xsum, skip_registration=True):
    """XSum as TFDS describes it, but prepared without its calls to TensorFlow."""

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Any]:
        folder = pathlib.Path(dl_manager.manual_dir)
        ids = json.loads((folder / SPLIT_IDS).read_text(encoding="utf-8"))
        return {
            split: self._generate_examples(frozenset(ids[split]), folder / ARTICLES)
            for split in _SPLITS
        }

    def _generate_examples(
        self, split_ids: frozenset[str], path: pathlib.Path
    ) -> Iterator[tuple[str, dict[str, str]]]:
        # Reads the archive once for each split; on disk it would be 200,000 files.
        found = False
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                file = pathlib.PurePosixPath(member.name)
                content = archive.extractfile(member)
                known = file.suffix == ".data" and file.stem in split_ids
                if known and content is not None:
                    found = True
                    yield file.stem, article(content.read().decode())
        if not found:  # a few are missing from every archive: pages go
            raise ConfigError(
                f"{path} has none of the {len(split_ids)} articles of a split of "
                f"{SPLIT_IDS}; make it again, see {_README}"
            )


def article(text: str) -> dict[str, str]:
    """Takes an extracted web page apart.

    Args:
        text: its address, its introduction and its body, each below a line that
            reads [XSUM]URL[XSUM], [XSUM]INTRODUCTION[XSUM] or [XSUM]RESTBODY[XSUM].

    Returns:
        The body as "document" and the introduction as "summary".

    Raises:
        ConfigError: the text is not of this form.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    kept = "\n".join(line for line in lines if not _WIDGET.fullmatch(line))
    _, *parts = _SECTION.split(kept)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    if not {"INTRODUCTION", "RESTBODY"} <= sections.keys():
        raise ConfigError(
            f"an article in {ARTICLES} lacks [XSUM]INTRODUCTION[XSUM] or "
            f"[XSUM]RESTBODY[XSUM]: {text[:80]!r}; make the file again, see {_README}"
        )
    document, summary = sections["RESTBODY"], sections["INTRODUCTION"]
    return {"document": document.strip(), "summary": summary.strip()}


def load_xsum(data_dir: pathlib.Path, download: bool = False) -> Splits:
    """Returns XSum, prepared in `data_dir` from files that only people can fetch.

    Raises:
        ConfigError: it is not prepared, and a file is missing.
    """
    del download
    builder = Xsum(data_dir=data_dir, file_format="array_record")
    if not builder.data_path.exists():
        folder = data_dir / "manual" / "xsum"
        missing = [n for n in (ARTICLES, SPLIT_IDS) if not (folder / n).exists()]
        if missing:
            raise ConfigError(
                f"`--data-dir` {data_dir} lacks {' and '.join(missing)}; {_README} "
                f"says how to make the articles, pack their folder as {ARTICLES}; "
                f"{SPLIT_IDS} lies next to that page; put both into {folder}"
            )
        _prepare(builder, data_dir, folder)
    return {split: _pairs(builder, split, "document", "summary") for split in _SPLITS}


def load_billsum(data_dir: pathlib.Path, download: bool) -> Splits:
    """Returns BillSum's federal bills.

    It comes without a validation split: a twentieth of the training pairs is one.

    Raises:
        ConfigError: it is not prepared, and `download` is False.
    """
    builder = _builder("billsum", data_dir, download)
    pairs = _pairs(builder, "train", "text", "summary")
    parts = split_pairs(pairs, key=lambda pair: pair.source)
    return {
        "train": parts["train"] + parts["test"],
        "validation": parts["validation"],
        "test": _pairs(builder, "test", "text", "summary"),
    }


def load_opus(data_dir: pathlib.Path, download: bool) -> Splits:
    """Returns the pairs of `OPUS`, whose one split is split by the German text.

    Raises:
        ConfigError: it is not prepared, and `download` is False.
    """
    builder = _builder(OPUS, data_dir, download)
    pairs = _pairs(builder, "train", "de", "en")
    return split_pairs(pairs, key=lambda pair: pair.source)


def _builder(name: str, data_dir: pathlib.Path, download: bool) -> DatasetBuilder:
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    if not builder.data_path.exists():
        if not download:
            raise ConfigError(
                f"`--data-dir` {data_dir} has no {name}; give `--download` to fetch "
                "and prepare it there, once"
            )
        _prepare(builder, data_dir)
    return builder


def _prepare(
    builder: DatasetBuilder, data_dir: pathlib.Path, manual: pathlib.Path | None = None
) -> None:
    config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
    try:
        downloads = data_dir / "downloads"
        builder.download_and_prepare(download_dir=downloads, download_config=config)
    except requests.exceptions.RequestException as error:
        raise ConfigError(
            f"`--download` could not fetch {builder.name} ({error}); try again with a "
            f"network, or copy a prepared {builder.data_path} from where there is one"
        ) from error


def _pairs(builder: DatasetBuilder, split: str, source: str, target: str) -> list[Pair]:
    """Reads a whole split; pairs of which one side is empty are left out."""
    examples = builder.as_data_source(split=split)
    pairs = (Pair(_text(each[source]), _text(each[target])) for each in examples)
    return [pair for pair in pairs if pair.source and pair.target]


def _text(value: bytes | str) -> str:
    # Without TensorFlow text comes back as bytes; tfds.testing.mock_data has strings.
    return (value.decode() if isinstance(value, bytes) else value).strip()
