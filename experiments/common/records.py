"""What a run leaves behind in JSON: a line per update, and what made the numbers."""

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

Row = dict[str, Any]


class MetricsFile:
    """A JSON-lines file with one row per update, written as training goes."""

    def __init__(self, path: pathlib.Path, *, keep_until: int, write: bool = True):
        """Opens the file and drops what a lost stretch of the run had written.

        Args:
            path: the file; made if it does not exist.
            keep_until: the update from which training continues; -1 to start empty.
            write: False only reads what stands there and keeps new rows in memory; of
                several processes one writes.
        """
        self.path = path
        self._write = write
        rows = read_rows(path) if path.exists() else []
        self.rows = [row for row in rows if row["update"] <= keep_until]
        if write:
            write_rows(path, self.rows)

    def append(self, row: Row) -> None:
        """Adds a row, on disk at once."""
        self.rows.append(row)
        if self._write:
            append_row(self.path, row)


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def write_rows(path: pathlib.Path, rows: list[Row]) -> None:
    """Writes a JSON-lines file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(map(_line, rows)))
    temporary.replace(path)  # a kill leaves the old rows or the new ones


def read_rows(path: pathlib.Path) -> list[Row]:
    """Reads a JSON-lines file; a last line cut off by a kill is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def resume_rows(path: pathlib.Path) -> list[Row]:
    """Reads a JSON-lines file that will be appended to; makes it if there is none.

    Without a last line that a kill has cut off: the next would be glued to it.
    """
    rows = read_rows(path) if path.exists() else []
    write_rows(path, rows)
    return rows


def combinations(axes: Mapping[str, Iterable[Any]]) -> list[Row]:
    """Returns one case for each combination of the values that each field has."""
    return [dict(zip(axes, each, strict=True)) for each in product(*axes.values())]


def not_measured(rows: list[Row], cases: Iterable[Row]) -> list[Row]:
    """Returns the cases that have no row."""
    return [x for x in cases if not any(row.items() >= x.items() for row in rows)]


def append_row(path: pathlib.Path, row: Row) -> None:
    """Adds a row to a JSON-lines file, on disk at once."""
    with path.open("a") as file:
        file.write(_line(row))


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes `content`, in which paths become text, as readable JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, allow_nan=False, default=os.fspath)
    path.write_text(text + "\n")


def final_loss(losses: list[float]) -> float:
    """Returns the mean of the last tenth of the updates: one batch says little."""
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def finite(loss: float) -> float | None:
    """Returns None, which JSON has, for a loss that is not finite."""
    return loss if math.isfinite(loss) else None


def provenance(config: Any) -> Row:
    """Returns what made a result: the settings, the versions, the device."""
    return {
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that make the numbers."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version()} | found
