"""The grid of short runs: what it runs, and what it does not run again."""

import argparse
import dataclasses
import json
import os
import pathlib

import pytest

from experiments.common import records
from experiments.sweep import run as sweep
from experiments.sweep.__main__ import main
from experiments.sweep.config import Config
from experiments.sweep.results import best_learning_rate, beyond, read
from tests.common import process_environment
from tests.experiments.commands import assert_refused
from tests.experiments.job import TINY

RANK = 16
SETTINGS = {
    "model": vars(TINY.model),
    "updates": 3,
    "batch_size": TINY.batch_size,
    "micro_batches": TINY.micro_batches,
    "eval_examples": 4,
}


def config(tmp_path, tiny, **changes):
    """Of a run of a small grid; its results are in out/grid.jsonl."""
    content = {
        "report": "projections.report",
        "methods": ["full_momentum", "flora_accumulation"],
        "projections": ["CountSketch"],
        "ranks": [RANK],
        "learning_rates": [0.01, 0.1],
        "seeds": [0, 1],
        "settings": SETTINGS,
    } | changes
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(content))
    return Config((str(path),), tmp_path / "out", tiny.data_dir, tiny.corpus_dir)


def fake(monkeypatch, result):
    """Nothing is trained; the results are those of a function of the learning rate."""

    class Bench:
        def __init__(self, task):
            del task

        def train(self, rate, seed):
            del seed
            return result(rate)

    monkeypatch.setattr(sweep, "Bench", Bench)


@pytest.mark.parametrize(
    ("rates", "best", "expected"),
    [
        ([0.001, 0.002, 0.004], 0.004, 0.008),
        ([0.001, 0.002, 0.004], 0.001, 0.0005),
        ([0.001, 0.002, 0.004], 0.002, None),
        ([0.03, 0.1, 0.3], 0.03, 0.009),
        ([0.4, 0.1], 0.4, 1.6),
        ([0.1], 0.1, None),
    ],
)
def test_beyond_the_grid(rates, best, expected):
    assert beyond(rates, best) == expected


def test_a_best_rate_at_the_end_is_followed_by_one_more(monkeypatch):
    """Once; the other seeds run at the best of all."""

    # The higher the better.
    fake(monkeypatch, lambda rate: {"validation_loss": 1 / rate})
    grid = {"learning_rates": [0.1, 0.2], "seeds": [0, 1], "settings": {}}
    sources = argparse.Namespace(fingerprint="", task=lambda cell: None)

    def runs(**extra):
        rows = sweep.run_cell({"method": "adamw"}, grid | extra, sources, {})
        return [(row["learning_rate"], row["seed"]) for row in rows]

    assert runs() == [(0.1, 0), (0.2, 0), (0.2, 1)]
    assert runs(extensions=1) == [(0.1, 0), (0.2, 0), (0.4, 0), (0.4, 1)]
    assert runs(extensions=2)[-2:] == [(0.8, 0), (0.8, 1)]


@pytest.mark.full
def test_is_resumed_after_a_kill(tmp_path, tiny):
    """A truncated last line is run again, with the same numbers; all others stay."""
    settings = config(tmp_path, tiny)
    output = settings.output_dir / "grid.jsonl"
    sweep.run(settings)
    rows = records.read_rows(output)
    assert len(rows) == 2 * 3  # two rates at one seed, and the better at the other
    assert len({row["id"] for row in rows}) == 6
    assert {row["seed"] for row in rows} == {0, 1}
    for method in ("full_momentum", "flora_accumulation"):
        mine = [row for row in rows if row["method"] == method]
        assert mine[2]["learning_rate"] == best_learning_rate(mine[:2])
        assert mine[0]["validation_loss"] != mine[1]["validation_loss"]
        assert mine[2]["validation_loss"] > 0

    results = read(output)
    assert [len(result.rows) for result in results] == [2, 2]
    table = output.with_suffix(".md").read_text()
    assert f"| CountSketch | {RANK} |" in table
    assert f"| {results[1].mean:.3f} ± " in table
    assert output.with_suffix(".png").stat().st_size > 10_000

    text = output.read_text()
    output.write_text(text[: len(text) - 40])
    sweep.run(settings)
    again = records.read_rows(output)
    assert again[:5] == rows[:5]
    assert again[5]["id"] == rows[5]["id"]
    assert again[5]["validation_loss"] == rows[5]["validation_loss"]


@pytest.mark.full
def test_a_cell_that_always_diverges(tmp_path, tiny, monkeypatch):
    """Its rows say so, its other seeds are not tried, and the rest goes on."""

    fake(monkeypatch, lambda rate: {"validation_loss": None, "step_seconds": 0.1})
    methods = ["flora_momentum", "flora_accumulation"]
    sweep.run(config(tmp_path, tiny, methods=methods))
    output = tmp_path / "out/grid.jsonl"
    rows = records.read_rows(output)
    assert [row["seed"] for row in rows] == [0] * 4
    assert [result.mean for result in read(output)] == [float("inf")] * 2
    assert output.with_suffix(".md").read_text().count("diverged") == 2


@pytest.mark.full
def test_only_what_is_asked_for(tmp_path, tiny, monkeypatch, capsys):
    """A text in no title is one line; another leaves the other cells alone."""

    fake(monkeypatch, lambda rate: {"validation_loss": rate, "step_seconds": 0.1})
    output = tmp_path / "out/grid.jsonl"

    def command(only, **changes):
        settings = dataclasses.asdict(config(tmp_path, tiny, **changes))
        words = [settings.pop("grids")[0], "--only", only]
        for name in ("output_dir", "data_dir", "corpus_dir"):
            words += ["--" + name.replace("_", "-"), str(settings[name])]
        return main(["--grids", *words])

    assert command("rank 17") == 2
    message = "error: `--only` 'rank 17' is in the title of no cell of the grid\n"
    assert capsys.readouterr().err == message
    assert command(f"rank {RANK}") == 0
    rows = records.read_rows(output)
    assert {row["method"] for row in rows} == {"flora_accumulation"}
    # A whole title is one cell, though it is the beginning of another.
    options = [{"momentum": 0.5}, {"momentum": 0.5, "resample_every": 2}]
    again = {"methods": ["full_momentum"], "options": options}
    assert command("full_momentum momentum 0.5", **again) == 0
    new = records.read_rows(output)[len(rows) :]
    assert [row["options"] for row in new] == [options[0]] * len(new) != []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workers 0", "`--workers` must be from 1 to"),  # It would wait for ever.
        ("--workers 10000", "`--workers` must be from 1 to"),
        ("--grids nothing", "`--grids` must be files, or names of those in experim"),
    ],
)
def test_bad_settings_are_one_line(arguments, message, capsys):
    assert_refused(main, ["--grids", "pareto", *arguments.split()], message, capsys)


def test_questions_that_are_grids():
    """Each runs its own, by the names of its files."""
    from experiments.claims import __main__ as claims
    from experiments.family import __main__ as family
    from experiments.projections import __main__ as projections

    for question in (claims, family, projections):
        folder = pathlib.Path(question.__file__).parent / "results"
        paths = Config(question.GRIDS).paths()
        assert {path.parent for path in paths} == {folder}
        assert set(paths) == {path.with_suffix(".json") for path in folder.glob("*.md")}


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core for each worker")
def test_two_workers_find_what_one_does(tmp_path, tiny, monkeypatch):
    """Other processes, and rows in any order."""
    settings = config(tmp_path, tiny, learning_rates=[0.1], seeds=[0])
    for name, value in process_environment().items():  # Which workers inherit.
        monkeypatch.setenv(name, value)
    found = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        sweep.run(dataclasses.replace(settings, output_dir=folder, workers=workers))
        rows = records.read_rows(folder / "grid.jsonl")
        rows.sort(key=lambda row: row["method"])
        for row in rows:
            for name in ("seconds", "step_seconds", "compile_seconds"):
                del row[name]
        found.append(rows)
        assert (folder / "grid.png").stat().st_size > 10_000
    assert len(found[0]) == 2
    for one, two in zip(*found, strict=True):
        for name in ("train_loss", "validation_loss"):
            # Sums on other numbers of threads.
            assert two.pop(name) == pytest.approx(one.pop(name), rel=1e-5)
        assert one == two
