"""Which grids are run, and where their results go.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import os
import pathlib

from experiments.common.errors import ConfigError

_EXPERIMENTS = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run of a grid; runs that stand in the results are not run again."""

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
