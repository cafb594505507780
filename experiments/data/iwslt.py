"""The IWSLT 2017 translations of TED talks, German to English, from local files.

The archive holds two aligned files of training lines, among them lines with tags
(title, speaker, ...), and the development and test sets as XML with one <seg> per
line of text.
"""

import html
import pathlib
import re

from experiments.common.errors import ConfigError
from experiments.data.pairs import Pair, Splits

_SOURCE, _TARGET = "de", "en"
_DEVELOPMENT = "IWSLT17.TED.dev2010.de-en"
_TESTS = "IWSLT17.TED.tst20*.de-en"
_TAGGED = re.compile(r"</?[a-z]+[ >]")
# Not an XML parser: published files have bare ampersands, which one would refuse.
_SEGMENT = re.compile(r"<seg\b[^>]*>(.*?)</seg>", re.DOTALL)


def load(data_dir: pathlib.Path, download: bool = False) -> Splits:
    """Reads the training lines, dev2010, and all the test sets in one.

    Args:
        data_dir: the files are looked for in its folder manual/iwslt2017/de-en.
        download: of no use: only people can fetch it.

    Raises:
        ConfigError: a file is missing, or the two languages do not go together.
    """
    del download
    folder = data_dir / "manual" / "iwslt2017" / "de-en"
    train = [folder / f"train.tags.de-en.{end}" for end in (_SOURCE, _TARGET)]
    development = _xml_files(folder / _DEVELOPMENT)
    tests = [
        _xml_files(path.with_name(path.name.removesuffix(f".{_SOURCE}.xml")))
        for path in sorted(folder.glob(f"{_TESTS}.{_SOURCE}.xml"))
    ]
    wanted = [*train, *development, *(file for files in tests for file in files)]
    missing = [path.name for path in wanted if not path.exists()]
    if not tests:
        missing.append(f"{_TESTS}.{_SOURCE}.xml")
    if missing:
        raise ConfigError(
            f"`--data-dir` {data_dir} lacks {', '.join(missing)} of IWSLT 2017; fetch "
            "de-en.tgz of the TED task (2017-01-trnted/texts/de/en/de-en.tgz, linked "
            f"from https://wit3.fbk.eu) and put the files that it holds into {folder}"
        )
    return {
        "train": _aligned(train, [_training_lines(path) for path in train]),
        "validation": _segment_pairs(development),
        "test": [pair for files in tests for pair in _segment_pairs(files)],
    }


def _xml_files(stem: pathlib.Path) -> list[pathlib.Path]:
    return [stem.with_name(f"{stem.name}.{end}.xml") for end in (_SOURCE, _TARGET)]


def _training_lines(path: pathlib.Path) -> list[str]:
    # Splits at "\n" alone: some lines contain the separator U+2028.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    lines = [line.strip() for line in lines if not _TAGGED.match(line)]
    return [html.unescape(line) for line in lines]


def _segment_pairs(paths: list[pathlib.Path]) -> list[Pair]:
    texts = [_SEGMENT.findall(path.read_text(encoding="utf-8")) for path in paths]
    lines = [[html.unescape(text).strip() for text in side] for side in texts]
    return _aligned(paths, lines)


def _aligned(paths: list[pathlib.Path], sides: list[list[str]]) -> list[Pair]:
    sources, targets = sides
    if len(sources) != len(targets) or not sources:
        raise ConfigError(
            f"{paths[0]} has {len(sources)} lines of text and {paths[1].name} has "
            f"{len(targets)}; both must have the same number, so unpack them again"
        )
    pairs = map(Pair, sources, targets)
    return [pair for pair in pairs if pair.source and pair.target]
