"""The table of optimizer steps on pods."""

import pathlib
from collections.abc import Callable
from typing import Any

from experiments.common import report
from experiments.common.methods import METHODS
from experiments.common.records import Row, read_rows

_CASE = ("model", "dtype", "pod", "layout", "rank")
_CAPTION = """\
Bytes on one chip for one update and its application, with parameters and state donated.
Arguments are parameters, state and gradients. Moved is what kernels read and write in
the chip's memory in every step, collectives' operands and results included, and besides
in some (a refresh, a transfer). The lower bound on the time of the kernels of a step
sums up the longer of memory and products for each, at published rates; the network's
time is not in it. Collectives are the optimizer's: the operands or the results of each,
whichever are larger; also as a multiple of the float32 sketches of all sketched
gradients, sharded over "tensor" alone. AdamW and Muon are optax's.
"""


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) beside the rows."""
    rows = read_rows(path)
    columns = {
        "optimizer": lambda row: METHODS[row["method"]].title,
        "arguments, GB": _compiled(lambda row: f"{row['arguments'] / 1e9:.3f}"),
        "temporaries, GB": _compiled(lambda row: f"{row['temporaries'] / 1e9:.3f}"),
        "moved, GB": _compiled(lambda row: f"{row['step'] / 1e9:.2f}"),
        "besides in some, GB": _compiled(lambda row: f"{row['besides'] / 1e9:.2f}"),
        "products, GFLOP": _compiled(lambda row: report.products(row["flops"])),
        "time bound, ms": _compiled(lambda row: f"{1e3 * row['seconds']:.2f}"),
        "sent by collectives, MB": _compiled(lambda row: _sent(row["sent"])),
        "over the sketches": _compiled(_over_sketches),
        "sent besides in some, MB": _compiled(lambda row: _sent(row["sent_besides"])),
        "largest of each kind, MB": _compiled(lambda row: _sent(row["largest"])),
        "largest sketch, MB": lambda row: _megabytes(row["largest_sketch"]),
        "compilation, processor s": _compiled(lambda row: f"{row['compilation']:.0f}"),
        "needed, if refused, GB": _refused,
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


def _refused(row: Row) -> str | None:
    return f"{row['refused'] / 1e9:.1f}" if "refused" in row else None


def _sent(kinds: dict[str, int]) -> str:
    return ", ".join(f"{_megabytes(size)} {kind}" for kind, size in kinds.items())


def _over_sketches(row: Row) -> str:
    return f"{sum(row['sent'].values()) / row['sketches']:.2f}"


def _megabytes(size: int) -> str:
    return report.megabytes(size, 1)


if __name__ == "__main__":
    report.main(write)
