"""What a grid found: each of its cells at its best learning rate."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.common.methods import METHODS, Method
from experiments.common.records import Row, read_rows
from experiments.common.report import mean_and_error, ranked

# Of options, where their own would be long.
_WORDS = {
    "orthogonal True": "orthogonalized",
    "state_dtype int8": "int8",
    "nesterov False": "without look-ahead",
    "method RowNormalization": "row-normalized",
    "lora_tune_rest False": "adapters alone",
    "rounding nearest": "bfloat16 rounded to nearest",
    "rounding stochastic": "bfloat16 rounded stochastically",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One combination of what a grid varies, at its best learning rate.

    Attributes:
        method: what is trained.
        settings: what the grid varies besides: projection, rank, b2, options.
        learning_rate: the best one.
        rows: the runs of the seeds at that learning rate.
        step_seconds: median over the runs of the median wall time of an update.
    """

    method: Method
    settings: dict[str, Any]
    learning_rate: float
    rows: tuple[Row, ...]
    step_seconds: float

    @property
    def rank(self) -> int | None:
        """Of the sketches or adapters."""
        return self.settings.get("rank")

    @property
    def title(self) -> str:
        """Name of the method, with the options that were set."""
        options = self.settings.get("options", {})
        words = [f"{name} {_object(value)}" for name, value in options.items()]
        return ", ".join([self.method.title, *(_WORDS.get(x, x) for x in words)])

    @property
    def ranked_title(self) -> str:
        """The title and the rank."""
        return ranked(self.title, self.rank)

    def values(self, metric: str = "validation_loss") -> list[float | None]:
        """Returns a metric at each seed; None where the run diverged."""
        return [row[metric] for row in self.rows]

    @property
    def mean(self) -> float:
        """Mean validation loss, in nats per token; infinite if a seed diverged."""
        return mean_and_error(self.values())[0]

    def of_first(self, name: str) -> Any:
        """Returns what is the same at all seeds, for example the bytes of the state."""
        return self.rows[0][name]


def _object(value: Any) -> Any:
    """{"Fira": {"limiter": None}} as Python writes it."""
    if not isinstance(value, dict):
        return value
    ((name, arguments),) = value.items()
    return f"{name}({', '.join(f'{key}={x}' for key, x in arguments.items())})"


def summarize(rows: Sequence[Row]) -> list[Result]:
    """Returns each cell at its best learning rate."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        axes = ("method", "projection", "rank", "b2", "options")
        settings = {axis: row[axis] for axis in axes if row.get(axis) is not None}
        groups.setdefault(json.dumps(settings), []).append(row)
    results = []
    for key, group in groups.items():
        settings = json.loads(key)
        tuned = [row for row in group if row["seed"] == group[0]["seed"]]
        best = best_learning_rate(tuned)
        chosen = tuple(row for row in group if row["learning_rate"] == best)
        seconds = statistics.median(row["step_seconds"] for row in group)
        method = METHODS[settings.pop("method")]
        results.append(Result(method, settings, best, chosen, seconds))
    return results


def finished(results: Sequence[Result]) -> list[Result]:
    """Returns those of which no seed diverged, the lowest loss first."""
    found = [result for result in results if result.mean < float("inf")]
    return sorted(found, key=lambda result: result.mean)


def read(path: pathlib.Path) -> list[Result]:
    """Returns what a JSON-lines file of runs found."""
    return summarize(read_rows(path))


def best_learning_rate(rows: Sequence[Row]) -> float:
    """Returns the learning rate of the lowest loss, the lowest of all if none ended."""
    ended = [row for row in rows if row["validation_loss"] is not None]
    if not ended:
        return min(row["learning_rate"] for row in rows)
    return min(ended, key=lambda row: row["validation_loss"])["learning_rate"]


def beyond(learning_rates: Sequence[float], best: float) -> float | None:
    """Returns the next learning rate outwards if the best is the first or the last."""
    ordered = sorted(learning_rates)
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return None
    inner = ordered[1] if best == ordered[0] else ordered[-2]
    return float(f"{best * best / inner:.3g}")
