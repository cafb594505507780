"""The data sets by name.

Loading imports what a data set needs; naming and describing it imports nothing.
"""

import pathlib
from dataclasses import dataclass
from typing import Protocol

from experiments.data.pairs import Splits

# The words with which T5 was trained.
_SUMMARIZE = "summarize: "
_TRANSLATE = "translate German to English: "

ROUGE = ("rouge1", "rouge2", "rougeL")


class Load(Protocol):
    """Reads a data set, having prepared it if need be."""

    def __call__(self, data_dir: pathlib.Path, download: bool = False) -> Splits:
        """Returns the pairs.

        Args:
            data_dir: where data sets are kept, and files that were fetched by hand
                looked for.
            download: whether the network may be used. Without it, and with nothing
                in `data_dir`, a `ConfigError` says what to do.
        """
        ...


@dataclass(frozen=True)
class Dataset:
    """One data set, by the name under which it is asked for."""

    name: str
    description: str
    prefix: str
    """Text that stands before each source and tells the model its task."""
    metrics: tuple[str, ...]
    """Names that `experiments.data.metrics.score` knows."""
    load: Load


def _docstrings(data_dir: pathlib.Path, download: bool = False) -> Splits:
    from experiments.data import docstrings

    del download  # nothing to fetch
    return docstrings.load(data_dir)


def _phrases(data_dir: pathlib.Path, download: bool = False) -> Splits:
    from experiments.data import phrases

    del data_dir, download  # made from what is installed
    return phrases.load()


def _xsum(data_dir: pathlib.Path, download: bool = False) -> Splits:
    from experiments.data import builders

    del download  # only people can fetch it
    return builders.load_xsum(data_dir)


def _billsum(data_dir: pathlib.Path, download: bool = False) -> Splits:
    from experiments.data import builders

    return builders.load_billsum(data_dir, download)


def _iwslt2017(data_dir: pathlib.Path, download: bool = False) -> Splits:
    from experiments.data import iwslt

    del download  # only people can fetch it
    return iwslt.load(data_dir)


def _opus(data_dir: pathlib.Path, download: bool = False) -> Splits:
    from experiments.data import builders

    return builders.load_opus(data_dir, download)


def _table(*datasets: Dataset) -> dict[str, Dataset]:
    return {dataset.name: dataset for dataset in datasets}


DATASETS: dict[str, Dataset] = _table(
    Dataset(
        "docstrings",
        "A smoke-scale task, not XSum: the first lines of docstrings of the standard "
        "library and of installed packages, from the rest of them.",
        _SUMMARIZE,
        ROUGE,
        _docstrings,
    ),
    Dataset(
        "phrases",
        "A smoke-scale task, not IWSLT: names, dates, amounts and lists as Unicode's "
        "CLDR writes them in German and in English.",
        _TRANSLATE,
        ("exact_match", "bleu", "chrf"),
        _phrases,
    ),
    Dataset(
        "xsum",
        "BBC articles and their one-sentence summaries (Narayan et al., 2018), fetched "
        "by hand.",
        _SUMMARIZE,
        ROUGE,
        _xsum,
    ),
    Dataset(
        "billsum",
        "Bills of the US Congress and their summaries (Kornilova and Eidelman, 2019), "
        "downloaded.",
        _SUMMARIZE,
        ROUGE,
        _billsum,
    ),
    Dataset(
        "iwslt2017",
        "German and English subtitles of TED talks (Cettolo et al., 2017), fetched by "
        "hand.",
        _TRANSLATE,
        ("bleu", "chrf"),
        _iwslt2017,
    ),
    Dataset(
        "opus",
        "German and English texts of free software (Tiedemann, 2012), downloaded.",
        _TRANSLATE,
        ("bleu", "chrf"),
        _opus,
    ),
)
"""The data sets that can be asked for."""
