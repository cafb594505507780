"""What every report is made of: mean ± standard error, and Markdown tables.

A report is a function of the file with the data: it writes table and pictures beside
it. `python -m experiments.<question>.report FILE` does so again without a measurement.
"""

import math
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.common import records

Columns = Mapping[str, Callable[[Any], Any]]
Write = Callable[[pathlib.Path], None]


def mean_and_error(values: Sequence[float | None]) -> tuple[float, float]:
    """Returns mean and standard error over seeds.

    Args:
        values: one for each seed, None where the run diverged.

    Returns:
        (infinity, 0) if one diverged; an error of 0 for a single seed.
    """
    if None in values:
        return math.inf, 0.0
    count = len(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else 0.0
    return statistics.fmean(values), error


def written(values: Sequence[float | None], digits: int = 3, sign: str = "") -> str:
    """Returns "mean ± error", without the error of a single seed, or "diverged"."""
    mean, error = mean_and_error(values)
    if not math.isfinite(mean):
        return "diverged"
    spread = f" ± {error:.{digits}f}" if len(values) > 1 else ""
    return f"{mean:{sign}.{digits}f}{spread}"


def markdown(columns: Columns, rows: Iterable[Any]) -> str:
    """Returns a Markdown table: a line for each row.

    Args:
        columns: from a row to each of its cells, by the heading. Those that hold
            numbers are aligned right; None is an empty cell.
        rows: of any type.
    """
    lines = cells(columns, rows)
    numeric = [_is_numeric(column) for column in zip(*lines, strict=True)]
    rules = ["---:" if right else "---" for right in numeric or [False] * len(columns)]
    lines = [list(columns), rules, *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(columns: Columns, rows: Iterable[Any]) -> list[list[str]]:
    """Returns the text of every cell, by rows; see `markdown`."""
    values = [[make(row) for make in columns.values()] for row in rows]
    return [["" if value is None else str(value) for value in row] for row in values]


def _is_numeric(column: Iterable[str]) -> bool:
    filled = [cell for cell in column if cell not in ("", "diverged")]
    return all(cell.lstrip("+-")[:1].isdigit() for cell in filled)


def megabytes(count: float, digits: int = 2) -> str:
    """Returns bytes in MB (10⁶)."""
    return f"{count / 1e6:.{digits}f}"


def products(flops: Mapping[str, float]) -> str:
    """Returns operations of products by their precision, in GFLOP."""
    return ", ".join(f"{n / 1e9:.0f} {precision}" for precision, n in flops.items())


def grouped(rows: Iterable[records.Row], *names: str) -> dict[Any, list[records.Row]]:
    """Returns the rows by what they have in some fields, in the order of the rows."""
    groups: dict[Any, list[records.Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def ranked(title: str, rank: int | None) -> str:
    """Returns a title with its rank, if there is one."""
    return title if rank is None else f"{title}, r={rank}"


def publish(
    path: pathlib.Path, config: Any, content: Mapping[str, Any], write: Write
) -> None:
    """Writes data with what made them, then their report, and prints its tables."""
    records.write_json(path, records.provenance(config) | dict(content))
    write(path)
    print(path.with_suffix(".md").read_text(), end="")
    print(f"Tables, pictures and data are in {path.parent}")


def main(write: Write) -> None:
    """Writes the reports of the files that the command line names."""
    for name in sys.argv[1:]:
        write(pathlib.Path(name))
