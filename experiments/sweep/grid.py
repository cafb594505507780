"""A grid of runs as its file describes it."""

import hashlib
import itertools
import json
from typing import Any

from experiments.common.errors import ConfigError
from experiments.common.methods import METHODS

Cell = dict[str, Any]
"""What a grid varies: method, projection, rank, b2, options."""


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
