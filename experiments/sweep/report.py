"""The report of a grid is that of the question that it answers."""

import importlib
import json
import pathlib

from experiments.common import report


def write(path: pathlib.Path) -> None:
    """Writes table and picture next to the runs, as the grid there says."""
    grid = json.loads(path.with_suffix(".json").read_text())
    importlib.import_module(f"experiments.{grid['report']}").write(path)


if __name__ == "__main__":
    report.main(write)
