"""Which grids of runs there are, what their files describe, where results go.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any

from experiments.common.errors import ConfigError
from experiments.common.methods import METHODS

# What a grid varies: method, projection, rank, b2, options.
Cell = dict[str, Any]
_EXPERIMENTS = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Config:
    """Which grids to run; runs that are already in the results are not repeated."""

    grids: tuple[str, ...]
    """Grids, by the names of the files experiments/*/results/NAME.json, or paths of
    others; the README of experiments.sweep says what they hold."""
    output_dir: pathlib.Path = pathlib.Path("runs/sweep")
    """Where NAME.jsonl goes, a line for each run, with its table and picture."""
    data_dir: pathlib.Path = pathlib.Path("runs/data")
    """Where the tokenizer and the packed examples are kept."""
    corpus_dir: pathlib.Path | None = None
    """Folder of Python sources in place of the standard library."""
    only: str = ""
    """Run the cell that has this title, for example "adamw b2 0.99", or else all that
    have it in their titles; all of the grid if it is empty."""
    workers: int = 1
    """Cells that run at a time, each in a process on a core of its own."""

    def validate(self) -> None:
        """Refuses settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        self.paths()
        cores = os.cpu_count() or 1
        if not 1 <= self.workers <= cores:
            raise ConfigError(
                f"`--workers` must be from 1 to {cores} cores, got {self.workers}"
            )

    def paths(self) -> list[pathlib.Path]:
        """Returns the files of the grids."""
        known = {path.stem: path for path in _EXPERIMENTS.glob("*/results/*.json")}
        paths = [known.get(name, pathlib.Path(name)) for name in self.grids]
        for path in paths:
            if not path.is_file():
                raise ConfigError(
                    f"`--grids` must be files, or names of those in experiments/*/"
                    f"results, got {str(path)!r}"
                )
        return paths


def parts(grid: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the groups of a grid, each with what the whole grid says."""
    shared = {key: value for key, value in grid.items() if key != "groups"}
    return [shared | group for group in grid.get("groups", [{}])]


def cells(grid: dict[str, Any]) -> list[Cell]:
    """Returns the combinations of method, projection, rank and so on in a group.

    Methods that keep nothing compressed have neither projection nor rank, and come
    once for each of the other settings.
    """
    found = []
    for method in grid["methods"]:
        if method not in METHODS:
            raise ConfigError(
                f"`methods` of the grid must be of {', '.join(METHODS)}, got {method!r}"
            )
        keys = {"options": "options", "b2": "b2"}
        if METHODS[method].ranked:
            keys = {"projection": "projections", "rank": "ranks"} | keys
        axes = {axis: grid[key] for axis, key in keys.items() if key in grid}
        found += [
            {"method": method} | dict(zip(axes, values, strict=True))
            for values in itertools.product(*axes.values())
        ]
    return found


def title(cell: Cell) -> str:
    """Returns a cell in words, for example "flora_adamw rank 16 b2 0.99"."""
    settings = {key: cell[key] for key in cell if key not in ("method", "options")}
    pairs = (settings | cell.get("options", {})).items()
    return " ".join([cell["method"], *(f"{name} {value}" for name, value in pairs)])


def run_id(settings: dict[str, Any]) -> str:
    """Returns a hash of a run's settings; versions stand in its row."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
