"""A grid of short trainings, one JSON line each: `python -m experiments.sweep`.

The grid is a file. For each method, projection and rank in it, every learning rate is
run at the first seed, and the best of them at the other seeds. Methods with rates of
their own stand in groups. A run that stands in the results is not run again: interrupt
it at any moment, and the same command goes on. At the end a table and a picture are
written beside the results.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import optax
import tyro
from rich.progress import Progress

from experiments import (
    family,
    family_report,
    loop,
    methods,
    records,
    state_bytes,
    sweep_report,
)
from experiments.checkpoints import State
from experiments.config import Config, ConfigError
from experiments.data import Data, batches, load
from experiments.family import FAMILY
from experiments.methods import METHODS
from experiments.models import GPT2Config, create
from experiments.run import versions
from experiments.training import problem

Cell = dict[str, Any]


def parts(grid: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the groups of a grid, each with what the whole grid says."""
    if "groups" not in grid:
        return [grid]
    shared = {key: value for key, value in grid.items() if key != "groups"}
    return [shared | group for group in grid["groups"]]


def cells(grid: dict[str, Any]) -> list[Cell]:
    """Returns the combinations of method, projection, rank and decay in a group.

    Uncompressed methods have neither projection nor rank, and come once; members of the
    family have no projection to choose.
    """
    found = []
    for method in grid["methods"]:
        axes = {"projection": grid.get("projections"), "rank": grid.get("ranks")}
        if method in FAMILY:
            ranks = grid["ranks"] if FAMILY[method].ranked else None
            axes = {"rank": ranks, "b2": grid.get("b2")}
        elif not METHODS[method].compressed:
            axes = {}
        axes = {name: values for name, values in axes.items() if values is not None}
        found += [
            {"method": method} | dict(zip(axes, values, strict=True))
            for values in itertools.product(*axes.values())
        ]
    return found


def config_of(settings: dict[str, Any]) -> Config:
    """Returns the settings that all runs of a grid share."""
    fields = dict(settings)
    model = GPT2Config(**fields.pop("model", {}))
    return Config(model=model, **fields)


def run_id(settings: dict[str, Any]) -> str:
    """Returns a hash of a run's settings; versions stand in its row."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Bench:
    """The compiled step of one cell; learning rate and seed are its arguments."""

    def __init__(self, cell: Cell, settings: dict[str, Any], data: Data):
        """Compiles the step."""
        chosen = {key: cell[key] for key in ("projection", "rank") if key in cell}
        self._cell = cell
        if cell["method"] in METHODS:
            chosen["methods"] = (cell["method"],)
        # At a peak of 1: updates are linear in the learning rate, which comes later.
        self.config = dataclasses.replace(
            config_of(settings), learning_rate=1.0, **chosen
        )
        self.config.validate()
        self._data = data
        state, graphdef = self.start(0)
        self.parts = 1
        if cell["method"] in FAMILY:
            tx = self._optimizer(self.config, 1.0)
            self.bytes = family.measure(tx, self.config, state.params)
        else:
            method = METHODS[cell["method"]]
            self.parts = method.micro_batches(self.config)
            found = state_bytes.measure(method, self.config, *state)
            self.bytes = found.state, found.compressible
        self._problem = problem(self.config, data, graphdef)
        started = time.perf_counter()
        tokens = self._problem.batches[0]
        step = jax.jit(self._step, donate_argnums=0)
        part = tokens[: len(tokens) // self.parts]
        self._compiled = step.lower(state, part, 0.1).compile()
        self.compile_seconds = time.perf_counter() - started

    def start(self, seed: int) -> tuple[State, Any]:
        """Returns the state that a training starts from, and the model's graph."""
        config = dataclasses.replace(self.config, seed=seed)
        tx = self._optimizer(config, 1.0)
        graphdef, params = create(config.model, seed)
        return State(params, tx.init(params)), graphdef

    def _optimizer(
        self, config: Config, rate: jax.typing.ArrayLike
    ) -> optax.GradientTransformation:
        name = self._cell["method"]
        if name in FAMILY:
            setting = family.Setting(
                rank=config.rank,
                refresh_every=config.resample_every,
                seed=config.seed,
                b2=self._cell.get("b2", 0.999),
            )
            tx = FAMILY[name].make(methods.schedule(config, name), setting)
        else:
            tx = methods.optimizer(config, name)
        return optax.chain(tx, optax.scale(rate))

    def _step(
        self, state: State, tokens: jax.Array, rate: float
    ) -> tuple[State, jax.Array]:
        tx = self._optimizer(self.config, rate)
        key = jax.random.key(0)  # There is no dropout here.
        return loop.training_step(self._problem.loss, tx, state, {}, tokens, key)

    def train(self, rate: float, seed: int) -> dict[str, Any]:
        """Trains once; losses are None if it diverged."""
        state, _ = self.start(seed)
        order = batches(self._data, self.config.batch_size, seed)
        losses, seconds = [], []
        for number in range(self.config.updates):
            started = time.perf_counter()
            parts = order[number].reshape(self.parts, -1, order[number].shape[-1])
            total = 0.0
            for tokens in parts:
                state, loss = self._compiled(state, tokens, rate)
                total += float(loss)
            losses.append(total / self.parts)
            seconds.append(time.perf_counter() - started)
        tenth = max(1, len(losses) // 10)
        return {
            "train_loss": _finite(statistics.mean(losses[-tenth:])),
            "validation_loss": _finite(
                self._problem.evaluate(state.params, {})["validation_loss"]
            ),
            "step_seconds": statistics.median(seconds),
            "compile_seconds": self.compile_seconds,
            "state_bytes": self.bytes[0],
            "matrix_bytes": self.bytes[1],
        }


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def run_cell(
    cell: Cell, grid: dict[str, Any], data: Data, done: dict[str, records.Row]
) -> Iterator[records.Row]:
    """Yields the rows of one cell, those already done included."""
    bench: list[Bench] = []

    def run(rate: float, seed: int) -> records.Row:
        settings = grid["settings"] | cell | {"learning_rate": rate, "seed": seed}
        name = run_id(settings | {"corpus": data.fingerprint})
        if name in done:
            return done[name]
        if not bench:
            bench.append(Bench(cell, grid["settings"], data))
        started = time.perf_counter()
        result = bench[0].train(float(rate), seed)
        seconds = time.perf_counter() - started
        return {"id": name} | settings | result | {"seconds": seconds} | versions()

    first, *others = grid["seeds"]
    tuned = []
    rates = list(grid["learning_rates"])
    for rate in rates:
        tuned.append(run(rate, first))
        yield tuned[-1]
    if all(row["validation_loss"] is None for row in tuned):
        return  # Every rate diverged: the rows say so, and the other cells go on.
    for _ in range(grid.get("extensions", 0)):
        further = sweep_report.beyond(rates, sweep_report.best_rate(tuned))
        if further is None:
            break
        rates = sorted([*rates, further])
        tuned.append(run(further, first))
        yield tuned[-1]
    for seed in others:
        yield run(sweep_report.best_rate(tuned), seed)


def sweep(
    grid_path: pathlib.Path,
    output: pathlib.Path,
    data_dir: pathlib.Path,
    corpus_dir: pathlib.Path | None = None,
) -> None:
    """Runs a grid and appends to its results.

    Args:
        grid_path: JSON with methods, projections, ranks, learning_rates, seeds, and the
            settings of `python -m experiments` that all runs share; or with groups,
            each of which says some of these for itself. Members of the family have
            values of b2 for Adam's decay. With extensions, how often a best rate at an
            end of its grid is followed by the next one outwards.
        output: JSON lines, one per run; a table and a picture go beside it.
        data_dir: where the packed corpus is kept.
        corpus_dir: Python sources in place of the standard library.
    """
    grid = json.loads(grid_path.read_text())
    done = {row["id"]: row for row in records.resume_rows(output)}
    shared = config_of(grid["settings"])
    data = load(dataclasses.replace(shared, data_dir=data_dir, corpus_dir=corpus_dir))
    todo = [(part, cell) for part in parts(grid) for cell in cells(part)]
    with Progress() as progress:
        bar = progress.add_task("cells", total=len(todo))
        for part, cell in todo:
            label = " ".join(str(value) for value in cell.values())
            progress.update(bar, description=label)
            for row in run_cell(cell, part, data, done):
                if row["id"] not in done:
                    done[row["id"]] = row
                    records.append_row(output, row)
            progress.advance(bar)
    found = sweep_report.summarise(list(done.values()))
    report = family_report if "groups" in grid else sweep_report
    output.with_suffix(".md").write_text(report.table(found))
    report.draw(found, output.with_suffix(".png"))


def main(
    grid: pathlib.Path,
    output: pathlib.Path,
    data_dir: pathlib.Path = pathlib.Path("runs/data"),
    corpus_dir: pathlib.Path | None = None,
) -> int:
    """Runs a grid of short trainings; finished runs are skipped.

    Args:
        grid: JSON file of the grid, for example experiments/sweeps/projections.json.
        output: JSON-lines file of the results, appended to; a table (.md) and a picture
            (.png) are written beside it.
        data_dir: where the tokenizer and the packed examples are kept.
        corpus_dir: folder of Python sources in place of the standard library.
    """
    try:
        sweep(grid, output, data_dir, corpus_dir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m experiments.sweep"))
