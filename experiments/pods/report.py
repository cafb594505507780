"""The table of optimizer steps on pods."""

import pathlib
import re
from collections.abc import Callable
from typing import Any

from experiments.common import report
from experiments.common.methods import METHODS
from experiments.common.records import Row, read_rows

_CASE = ("model", "dtype", "pod", "layout", "rank")
_CAPTION = """\
One update and its application, parameters and state donated; on one chip.
Arguments are parameters, state and gradients. Collectives are those of the optimizer
alone: the bytes of each array on a chip before or after it, whichever is larger, and
their sum in sketches (the float32 sketches of all sketched gradients, sharded over
"tensor" alone). Those of a refresh come on top in the steps that refresh. AdamW and
Muon are those of optax.
"""


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) beside the rows."""
    rows = read_rows(path)
    columns = {
        "optimizer": lambda row: METHODS[row["method"]].title,
        "arguments, GB": _compiled(lambda row: f"{row['arguments'] / 1e9:.3f}"),
        "temporaries, GB": _compiled(lambda row: f"{row['temporaries'] / 1e9:.3f}"),
        "collectives, MB": _compiled(lambda row: _sent(row["step"])),
        "in sketches": _compiled(_in_sketches),
        "of a refresh, MB": _compiled(lambda row: _sent(row["refresh"])),
        "largest all-gather, MB": _compiled(lambda row: _megabytes(row["gathered"])),
        "largest sketch, MB": lambda row: _megabytes(row["largest_sketch"]),
        "compilation, processor s": _compiled(lambda row: f"{row['compilation']:.0f}"),
        "refused": _refused,
    }
    text = _CAPTION
    for (model, dtype, pod, layout, rank), group in report.grouped(
        rows, *_CASE
    ).items():
        text += f"\n## {model} in {dtype} on {pod}, {layout}, rank {rank}\n\n"
        text += report.markdown(columns, group)
    path.with_suffix(".md").write_text(text)


def _compiled(cell: Callable[[Row], Any]) -> Callable[[Row], Any]:
    return lambda row: None if "refused" in row else cell(row)


def _sent(kinds: dict[str, int]) -> str:
    return ", ".join(f"{_megabytes(size)} {kind}" for kind, size in kinds.items())


def _in_sketches(row: Row) -> str:
    return f"{sum(row['step'].values()) / row['sketches']:.2f}"


def _megabytes(size: int) -> str:
    return report.megabytes(size, 1)


def _refused(row: Row) -> str | None:
    """What the compiler said of the memory, without the size of the program."""
    found = re.search(r"Used [\d.]+\w of [\d.]+\w hbm", row.get("refused", ""))
    return found[0] if found else row.get("refused")


if __name__ == "__main__":
    report.main(write)
