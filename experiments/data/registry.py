"""The data sets by name.

Loading imports what a data set needs; naming and describing it imports nothing.
"""

import functools
import pathlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from experiments.data.pairs import Splits

ROUGE = ("rouge1", "rouge2", "rougeL")


Load = Callable[..., Splits]
"""Reads a data set, having prepared it if need be: `load(data_dir, download=False)`.

`data_dir` is where data sets are kept, and files that were fetched by hand looked for.
Without `download`, and with nothing there, a `ConfigError` says what to do.
"""


@dataclass(frozen=True)
class Dataset:
    """One data set that can be asked for.

    Attributes:
        description: for people.
        load: reads it.
        prefix: text that stands before each source and tells the model its task; None
            for plain texts, which are targets without sources.
        metrics: names that `experiments.data.metrics.score` knows.
    """

    description: str
    load: Load
    prefix: str | None
    metrics: tuple[str, ...]


def _loader(name: str) -> Load:
    """Returns a function that imports what a data set needs when it is called."""

    def load(data_dir: pathlib.Path, download: bool = False) -> Splits:
        return pkgutil.resolve_name(f"experiments.data.{name}")(data_dir, download)

    return load


# The prefixes are the words with which T5 was trained.
_summaries = functools.partial(Dataset, prefix="summarize: ", metrics=ROUGE)
_translations = functools.partial(
    Dataset, prefix="translate German to English: ", metrics=("bleu", "chrf")
)

DATASETS = {
    "docstrings": _summaries(
        "A smoke-scale task, not XSum: the first lines of docstrings of the standard "
        "library and of installed packages, from the rest of them.",
        _loader("docstrings:load"),
    ),
    "phrases": _translations(
        "A smoke-scale task, not IWSLT: names, dates, amounts and lists as Unicode's "
        "CLDR writes them in German and in English.",
        _loader("phrases:load"),
        metrics=("exact_match", "bleu", "chrf"),
    ),
    "verses": Dataset(
        "The verses of the King James Bible, and of a modern one: archaic English to "
        "modern English, from two packages.",
        _loader("verses:load"),
        prefix="Rewrite in modern English: ",
        metrics=("bleu", "chrf"),
    ),
    "prose": Dataset(
        "Plain English to continue: Python's language reference.",
        _loader("texts:load_prose"),
        prefix=None,
        metrics=(),
    ),
    "code": Dataset(
        "Plain code to continue: the sources of the installed jax.",
        _loader("texts:load_code"),
        prefix=None,
        metrics=(),
    ),
    "xsum": _summaries(
        "BBC articles and their one-sentence summaries (Narayan et al., 2018), fetched "
        "by hand.",
        _loader("builders:load_xsum"),
    ),
    "billsum": _summaries(
        "Bills of the US Congress and their summaries (Kornilova and Eidelman, 2019), "
        "downloaded.",
        _loader("builders:load_billsum"),
    ),
    "iwslt2017": _translations(
        "German and English subtitles of TED talks (Cettolo et al., 2017), fetched by "
        "hand.",
        _loader("iwslt:load"),
    ),
    "opus": _translations(
        "German and English texts of free software (Tiedemann, 2012), downloaded.",
        _loader("builders:load_opus"),
    ),
}
"""The data sets that can be asked for, by name."""
