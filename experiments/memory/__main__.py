"""Command line: `python -m experiments.memory`."""

import dataclasses
import sys
from collections.abc import Sequence

import tyro

from experiments.config import ConfigError
from experiments.memory.config import RANKED, Config

_DESCRIPTION = """\
Tells what a training step needs, for any published model and without allocating it:
parameters, optimizer state, gradient accumulator, and the compiler's account of the
step that accumulates a micro-batch and of the step that applies the update."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: in place of the command line's own.

    Returns:
        The exit status: 0, or 2 for settings that make no sense.
    """
    config = tyro.cli(
        Config,
        prog="python -m experiments.memory",
        description=_DESCRIPTION,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        config.validate()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _run(config)
    return 0


def _run(config: Config) -> None:
    # Only now the heavy imports: a refused command line answers at once.
    import jax
    from rich.progress import Progress

    from experiments import records
    from experiments.memory import measure, report
    from experiments.run import versions

    wanted = [
        (model, method, rank)
        for model in config.model
        for method in config.method
        for rank in (config.ranks() if method in RANKED else (None,))
    ]
    rows = []
    with Progress() as progress:
        bar = progress.add_task("compiling", total=len(wanted))
        for model, method, rank in wanted:
            progress.update(bar, description=f"compiling {model} {method} {rank or ''}")
            rows.append(measure.measure(config, model, method, rank))
            progress.advance(bar)
    folder = config.output_dir
    settings = dataclasses.asdict(config) | {"output_dir": str(folder)}
    content = {
        "config": settings,
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    records.write_json(folder / "memory.json", content)
    text = report.table(config, rows)
    (folder / "memory.md").write_text(text)
    report.draw(rows, folder / "memory.png")
    print(text, end="")
    print(f"Table, picture and data are in {folder}")


if __name__ == "__main__":
    sys.exit(main())
