"""The data sets by name.

Loading imports what a data set needs; naming and describing it imports nothing.
"""

import importlib
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

from experiments.data.pairs import Splits

# The words with which T5 was trained.
_SUMMARIZE = "summarize: "
_TRANSLATE = "translate German to English: "

ROUGE = ("rouge1", "rouge2", "rougeL")


Load = Callable[..., Splits]
"""Reads a data set, having prepared it if need be: `load(data_dir, download=False)`.

`data_dir` is where data sets are kept, and files that were fetched by hand looked for.
Without `download`, and with nothing there, a `ConfigError` says what to do.
"""


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


def _loader(module: str, function: str = "load") -> Load:
    """Returns a function that imports what a data set needs when it is called."""

    def load(data_dir: pathlib.Path, download: bool = False) -> Splits:
        home = importlib.import_module(f"experiments.data.{module}")
        return getattr(home, function)(data_dir, download)

    return load


_DATASETS = (
    Dataset(
        "docstrings",
        "A smoke-scale task, not XSum: the first lines of docstrings of the standard "
        "library and of installed packages, from the rest of them.",
        _SUMMARIZE,
        ROUGE,
        _loader("docstrings"),
    ),
    Dataset(
        "phrases",
        "A smoke-scale task, not IWSLT: names, dates, amounts and lists as Unicode's "
        "CLDR writes them in German and in English.",
        _TRANSLATE,
        ("exact_match", "bleu", "chrf"),
        _loader("phrases"),
    ),
    Dataset(
        "xsum",
        "BBC articles and their one-sentence summaries (Narayan et al., 2018), fetched "
        "by hand.",
        _SUMMARIZE,
        ROUGE,
        _loader("builders", "load_xsum"),
    ),
    Dataset(
        "billsum",
        "Bills of the US Congress and their summaries (Kornilova and Eidelman, 2019), "
        "downloaded.",
        _SUMMARIZE,
        ROUGE,
        _loader("builders", "load_billsum"),
    ),
    Dataset(
        "iwslt2017",
        "German and English subtitles of TED talks (Cettolo et al., 2017), fetched by "
        "hand.",
        _TRANSLATE,
        ("bleu", "chrf"),
        _loader("iwslt"),
    ),
    Dataset(
        "opus",
        "German and English texts of free software (Tiedemann, 2012), downloaded.",
        _TRANSLATE,
        ("bleu", "chrf"),
        _loader("builders", "load_opus"),
    ),
)
DATASETS = {dataset.name: dataset for dataset in _DATASETS}
"""The data sets that can be asked for."""
