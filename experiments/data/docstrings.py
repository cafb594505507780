"""Summaries that every machine has: the first lines of docstrings.

The body of a docstring is the source and its first paragraph is the target. The
docstrings are those of the standard library and of `PACKAGES`, as far as they are
installed; their files are parsed, never imported. This is a smoke-scale task. It
says whether a summarizer learns, and is no substitute for XSum.
"""

import ast
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import warnings
from collections.abc import Iterable, Iterator

from experiments.data import corpus
from experiments.data.pairs import Pair, Splits, split_pairs

PACKAGES = ("numpy", "scipy", "jax", "flax", "optax", "chex")
"""Packages besides the standard library whose docstrings are mined."""

BODY_LENGTHS = (40, 2000)
"""Characters: shorter bodies are left out, longer ones are cut."""

SUMMARY_LENGTHS = (10, 300)
"""Characters: shorter and longer first paragraphs are no summaries."""

# Has to change with anything above or below that changes the pairs: it tells the
# files of stored pairs apart.
_VERSION = 1

_DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def load(data_dir: pathlib.Path, download: bool = False) -> Splits:
    """Returns the pairs of this installation, mined once and kept in `data_dir`.

    A summary decides the split of its pairs, so that functions which share one (the
    same method of several classes) are not spread over the splits.
    """
    del download  # nothing to fetch
    file = data_dir / f"docstrings-{_fingerprint()}.jsonl"
    if not file.exists():
        lines = [json.dumps(pair) + "\n" for pair in mine(_folders())]
        data_dir.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text("".join(lines), encoding="utf-8")
        unfinished.replace(file)
    with file.open(encoding="utf-8") as stored:
        pairs = [Pair(*json.loads(line)) for line in stored]
    return split_pairs(pairs, key=lambda pair: pair.target)


def mine(folders: Iterable[pathlib.Path]) -> list[Pair]:
    """Returns the pairs of all Python sources below `folders`, each body once."""
    pairs: dict[str, Pair] = {}
    for folder in folders:
        for text in corpus.read_documents(folder):
            for pair in pairs_of(text):
                pairs.setdefault(pair.source, pair)
    return list(pairs.values())


def pairs_of(text: str) -> Iterator[Pair]:
    """Yields the pairs of one Python source.

    Files that this Python cannot parse have none: templates, and tests of syntax
    errors, carry the same suffix.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escape sequences
        try:
            tree = ast.parse(text)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            pair = _pair(ast.get_docstring(node))  # dedented by inspect.cleandoc
            if pair is not None:
                yield pair


def _pair(docstring: str | None) -> Pair | None:
    paragraph, _, rest = (docstring or "").partition("\n\n")
    summary, body = " ".join(paragraph.split()), rest.strip()
    shortest, longest = SUMMARY_LENGTHS
    if not shortest <= len(summary) <= longest or len(body) < BODY_LENGTHS[0]:
        return None
    return Pair(body[: BODY_LENGTHS[1]].rstrip(), summary)


def _folders() -> list[pathlib.Path]:
    folders = [corpus.standard_library()]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # of a top-level name: no import
        if spec is not None and spec.submodule_search_locations:
            folders += map(pathlib.Path, spec.submodule_search_locations)
    return folders


def _fingerprint() -> str:
    versions = [str(_VERSION), platform.python_version()]
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return corpus.content_hash("\n".join(versions))[:12]
