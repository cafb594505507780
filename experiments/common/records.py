"""What a training leaves behind in JSON: a line per update, and a summary."""

import dataclasses
import json
import pathlib
import statistics
from typing import Any

from experiments.common.state_bytes import StateBytes

Row = dict[str, Any]


class MetricsFile:
    """A JSON-lines file with one row per update, written as training goes."""

    def __init__(self, path: pathlib.Path, *, keep_until: int, write: bool = True):
        """Opens the file and drops what a lost stretch of training had written.

        Args:
            path: the file; made if it does not exist.
            keep_until: the update from which training goes on; -1 to start empty.
            write: False only reads what stands there and keeps new rows in memory; of
                several processes one writes.
        """
        self.path = path
        self._write = write
        rows = read_rows(path) if path.exists() else []
        self.rows = [row for row in rows if row["update"] <= keep_until]
        if write:
            _rewrite(path, self.rows)

    def append(self, row: Row) -> None:
        """Adds a row, on disk at once."""
        self.rows.append(row)
        if self._write:
            append_row(self.path, row)


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _rewrite(path: pathlib.Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".tmp")
    whole.write_text("".join(map(_line, rows)))
    whole.replace(path)  # a kill leaves the old rows or the new ones


def read_rows(path: pathlib.Path) -> list[Row]:
    """Reads a JSON-lines file; a last line cut off by a kill is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def resume_rows(path: pathlib.Path) -> list[Row]:
    """Reads a JSON-lines file that will be appended to; makes it if there is none.

    Without a last line that a kill has cut off: the next would be glued to it.
    """
    rows = read_rows(path) if path.exists() else []
    _rewrite(path, rows)
    return rows


def append_row(path: pathlib.Path, row: Row) -> None:
    """Adds a row to a JSON-lines file, on disk at once."""
    with path.open("a") as file:
        file.write(_line(row))


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes `content` as readable JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


@dataclasses.dataclass(frozen=True)
class Summary:
    """One training in a dozen numbers; losses in nats per token."""

    method: str
    title: str
    kind: str
    compressed: bool
    learning_rate: float
    updates: int
    micro_batches: int
    tokens_per_update: int
    train_loss: float
    """Mean over the last tenth of the updates."""
    validation_loss: float
    """After the last update."""
    step_seconds: float
    """Median wall time of an update, compilation not included."""
    tokens_per_second: float
    """At that median."""
    compile_seconds: float
    step_peak_bytes: int
    """The compiler's account of one (micro-)step: state, gradients, activations."""
    bytes: StateBytes
    metrics: tuple[Row, ...] = dataclasses.field(repr=False)
    """The rows of metrics.jsonl."""

    def as_json(self) -> Row:
        """Returns the summary without the rows, which have their own file."""
        fields = dataclasses.asdict(dataclasses.replace(self, metrics=()))
        del fields["metrics"]
        fields["bytes"] |= {
            "buffer": self.bytes.buffer,
            "kept_of_compressible": str(self.bytes.kept),
        }
        return fields


def final_train_loss(rows: list[Row]) -> float:
    """Mean training loss of the last tenth of the updates; one batch says little."""
    losses = [row["loss"] for row in rows if "loss" in row]
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def last_validation_loss(rows: list[Row]) -> float:
    """The latest validation loss."""
    return [row["validation_loss"] for row in rows if "validation_loss" in row][-1]


def median_seconds(rows: list[Row]) -> float:
    """Median wall time of an update."""
    return statistics.median(row["seconds"] for row in rows if "seconds" in row)
