"""The grid of short trainings: what it runs, and what it does not run again."""

import argparse
import hashlib
import json
import os
import pathlib

import pytest

from experiments.common import records
from experiments.common.errors import ConfigError
from experiments.family import recipes as family
from experiments.finetune.config import Config as FinetuneConfig
from experiments.sweep import report as sweep_report
from experiments.sweep import run as sweep
from experiments.sweep.tasks import Sources, config_of
from tests.experiments.job import TINY

EXPERIMENTS = pathlib.Path(sweep.__file__).parent.parent
GRIDS = [
    EXPERIMENTS / f"{name}.json"
    for name in (
        "projections/results/projections",
        "family/results/pareto",
        "family/results/longer",
        "family/results/ablations",
        "claims/results/momentum",
        "claims/results/resampling",
        "claims/results/accumulation",
        "claims/results/gpt2",
        "claims/results/t5",
    )
]
SETTINGS = {
    "model": vars(TINY.model),
    "updates": 3,
    "batch_size": TINY.batch_size,
    "micro_batches": TINY.micro_batches,
    "eval_examples": 4,
}


def grid(tmp_path, **changes):
    content = {
        "report": "projections",
        "methods": ["adafactor_momentum", "flora_accumulation"],
        "projections": ["CountSketch"],
        "ranks": [TINY.rank],
        "learning_rates": [0.01, 0.1],
        "seeds": [0, 1],
        "settings": SETTINGS,
    } | changes
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(content))
    return path


def test_cells():
    cells = sweep.cells(
        {
            "methods": ["full_accumulation", "flora_momentum"],
            "projections": ["Gaussian", "SRHT"],
            "ranks": [8, 16],
        }
    )
    assert cells[0] == {"method": "full_accumulation"}
    assert [(cell["projection"], cell["rank"]) for cell in cells[1:]] == [
        ("Gaussian", 8),
        ("Gaussian", 16),
        ("SRHT", 8),
        ("SRHT", 16),
    ]


def test_cells_of_the_family():
    """A decay for each; no projection; a rank only where one is chosen."""
    grid = {
        "groups": [
            {"methods": ["adamw", "galore"], "b2": [0.9, 0.99]},
            {"methods": ["flora", "flora_momentum"], "ranks": [4]},
        ],
        "ranks": [8, 16],
        "projections": ["SRHT"],
    }
    first, second = (sweep.cells(part) for part in sweep.parts(grid))
    assert first[:2] == [{"method": "adamw", "b2": b2} for b2 in (0.9, 0.99)]
    assert [(cell["rank"], cell["b2"]) for cell in first[2:]] == [
        (8, 0.9),
        (8, 0.99),
        (16, 0.9),
        (16, 0.99),
    ]
    assert second == [
        {"method": "flora", "rank": 4},
        {"method": "flora_momentum", "projection": "SRHT", "rank": 4},
    ]


def test_cells_with_options():
    """Each of them for every method, those without a rank included; and titles."""
    cells = sweep.cells(
        {
            "methods": ["none", "muon", "lora_momentum", "flora"],
            "ranks": [4, 8],
            "options": [{}, {"reading": "residual", "resample_every": None}],
        }
    )
    options = [{}, {"reading": "residual", "resample_every": None}]
    assert cells == [
        {"method": method} | rank | {"options": option}
        for method, ranks in (
            ("none", [{}]),
            ("muon", [{}]),
            ("lora_momentum", [{"rank": 4}, {"rank": 8}]),
            ("flora", [{"rank": 4}, {"rank": 8}]),
        )
        for rank in ranks
        for option in options
    ]
    assert [sweep.title(cell) for cell in cells[-2:]] == [
        "flora rank 8",
        "flora rank 8 reading residual resample_every None",
    ]


@pytest.mark.parametrize(
    "path", GRIDS, ids=lambda path: path.stem
)
def test_grids_make_sense(path):
    """Found out before the hours that they take."""
    grid = json.loads(path.read_text())
    assert grid["report"] in sweep._REPORTS
    settings = dict(grid["settings"])
    settings.pop("dense_learning_rate", None)
    tuned = "dataset" in settings
    for part in sweep.parts(grid):
        assert part["learning_rates"]
        assert part["seeds"]
        for cell in sweep.cells(part):
            options = cell.get("options", {})
            if cell["method"] in family.FAMILY:
                setting = family.Setting(cell.get("rank", 1), 10, 0, 0.9, options)
                assert family.FAMILY[cell["method"]].make(0.1, setting)
            elif tuned:
                FinetuneConfig(**settings | options).validate()
            else:
                known = "projection", "rank"
                own = {name: cell[name] for name in known if name in cell}
                config_of(settings | own | options).validate()


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_results_in_the_repository_are_those_of_their_grid(path):
    grid = json.loads(path.read_text())
    known = [cell for part in sweep.parts(grid) for cell in sweep.cells(part)]
    rows = records.read_rows(path.with_suffix(".jsonl"))
    axes = ("method", "projection", "rank", "b2", "options")
    found = [{key: row[key] for key in axes if key in row} for row in rows]
    assert all(cell in known for cell in found)
    assert all(cell in found for cell in known)
    shared = grid["settings"]
    assert all(
        row[key] == shared[key] for row in rows for key in shared if key not in axes
    )


def test_hash_of_a_run_stays():
    """Of the row's settings, in any order; the results of earlier runs are found."""
    settings = {"updates": 60, "model": {"layers": 2}, "learning_rate": 0.03}
    text = b'{"learning_rate": 0.03, "model": {"layers": 2}, "updates": 60}'
    assert sweep.run_id(settings) == hashlib.sha256(text).hexdigest()[:12]


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
    assert sweep_report.beyond(rates, best) == expected


def test_a_best_rate_at_the_end_is_followed_by_one_more(monkeypatch):
    """Once; the other seeds run at the best of all."""

    class Bench:
        def __init__(self, task):
            pass

        def train(self, rate, seed):
            return {"validation_loss": 1 / rate}  # The higher the better.

    monkeypatch.setattr(sweep, "Bench", Bench)
    grid = {"learning_rates": [0.1, 0.2], "seeds": [0, 1], "settings": {}}
    cell = {"method": "adamw"}
    sources = argparse.Namespace(fingerprint="", task=lambda cell: None)

    def runs(**extra):
        rows = sweep.run_cell(cell, grid | extra, sources, {})
        return [(row["learning_rate"], row["seed"]) for row in rows]

    assert runs() == [(0.1, 0), (0.2, 0), (0.2, 1)]
    assert runs(extensions=1) == [(0.1, 0), (0.2, 0), (0.4, 0), (0.4, 1)]
    assert runs(extensions=2)[-2:] == [(0.8, 0), (0.8, 1)]


def test_is_resumed_after_a_kill(tmp_path, tiny):
    """A cut last line is run again, with the same numbers; all others stay."""
    output = tmp_path / "results.jsonl"
    arguments = grid(tmp_path), output, tiny.data_dir, tiny.corpus_dir
    sweep.sweep(*arguments)
    rows = records.read_rows(output)
    assert len(rows) == 2 * 3  # two rates at one seed, and the better at the other
    assert len({row["id"] for row in rows}) == 6
    assert {row["seed"] for row in rows} == {0, 1}
    for method in ("adafactor_momentum", "flora_accumulation"):
        mine = [row for row in rows if row["method"] == method]
        assert mine[2]["learning_rate"] == sweep_report.best_rate(mine[:2])
        assert mine[0]["validation_loss"] != mine[1]["validation_loss"]
        assert mine[2]["validation_loss"] > 0

    cells = sweep_report.summarise(rows)
    assert [len(cell.rows) for cell in cells] == [2, 2]
    table = output.with_suffix(".md").read_text()
    assert f"| CountSketch | {TINY.rank} |" in table
    assert f"{cells[1].mean:.3f} ± {cells[1].error:.3f}" in table
    assert output.with_suffix(".png").stat().st_size > 10_000

    text = output.read_text()
    output.write_text(text[: len(text) - 40])
    sweep.sweep(*arguments)
    again = records.read_rows(output)
    assert again[:5] == rows[:5]
    assert again[5]["id"] == rows[5]["id"]
    assert again[5]["validation_loss"] == rows[5]["validation_loss"]


def test_sketched_gradients_are_no_axis(tmp_path, tiny):
    settings = {"sketched_gradients": True}
    with pytest.raises(ConfigError, match="`sketched_gradients` of the grid changes"):
        Sources(settings, tiny.data_dir, tiny.corpus_dir)


def test_a_cell_that_always_diverges(tmp_path, tiny, monkeypatch):
    """Its rows say so, its other seeds are not tried, and the rest goes on."""

    def diverge(self, rate, seed):
        return {"validation_loss": None, "step_seconds": 0.1}

    monkeypatch.setattr(sweep.Bench, "train", diverge)
    output = tmp_path / "results.jsonl"
    grid_path = grid(tmp_path, methods=["flora_momentum", "flora_accumulation"])
    sweep.sweep(grid_path, output, tiny.data_dir, tiny.corpus_dir)
    rows = records.read_rows(output)
    assert [row["seed"] for row in rows] == [0] * 4
    cells = sweep_report.summarise(rows)
    assert [cell.written() for cell in cells] == ["diverged"] * 2
    assert output.with_suffix(".md").read_text().count("diverged") == 2


def test_only_what_is_asked_for(tmp_path, tiny, monkeypatch, capsys):
    """A text in no title is one line; another leaves the other cells alone."""

    def train(self, rate, seed):
        return {"validation_loss": rate, "step_seconds": 0.1}

    monkeypatch.setattr(sweep.Bench, "train", train)
    arguments = grid(tmp_path), tmp_path / "out.jsonl", tiny.data_dir, tiny.corpus_dir
    assert sweep.main(*arguments, only="rank 17") == 2
    message = "error: `--only` 'rank 17' is in the title of no cell of the grid\n"
    assert capsys.readouterr().err == message
    assert sweep.main(*arguments, only=f"rank {TINY.rank}") == 0
    rows = records.read_rows(tmp_path / "out.jsonl")
    assert {row["method"] for row in rows} == {"flora_accumulation"}
    # A whole title is one cell, though it is the beginning of another.
    options = [{"momentum": 0.5}, {"momentum": 0.5, "resample_every": 2}]
    again = grid(tmp_path, methods=["adafactor_momentum"], options=options)
    whole = "adafactor_momentum momentum 0.5"
    assert sweep.main(again, *arguments[1:], only=whole) == 0
    new = records.read_rows(tmp_path / "out.jsonl")[len(rows) :]
    assert [row["options"] for row in new] == [options[0]] * len(new) != []


@pytest.mark.parametrize("workers", [0, 10_000])
def test_a_worker_needs_a_core(workers, tmp_path):
    """One without would wait for its core for ever."""
    with pytest.raises(ConfigError, match=rf"`--workers` must be .* got {workers}"):
        sweep.sweep(grid(tmp_path), tmp_path / "out.jsonl", tmp_path, workers=workers)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core for each worker")
def test_two_workers_find_what_one_does(tmp_path, tiny, monkeypatch):
    """Other processes, and rows in any order."""
    path = grid(tmp_path, learning_rates=[0.1], seeds=[0])
    # As the processes of this test compile: for one device, and quickly.
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    found = []
    for workers in (1, 2):
        output = tmp_path / f"{workers}.jsonl"
        sweep.sweep(path, output, tiny.data_dir, tiny.corpus_dir, workers=workers)
        rows = sorted(records.read_rows(output), key=lambda row: row["method"])
        for row in rows:
            for name in ("seconds", "step_seconds", "compile_seconds"):
                del row[name]
        found.append(rows)
        assert output.with_suffix(".png").stat().st_size > 10_000
    assert len(found[0]) == 2
    for one, two in zip(*found, strict=True):
        for name in ("train_loss", "validation_loss"):
            # Sums on other numbers of threads.
            assert two.pop(name) == pytest.approx(one.pop(name), rel=1e-5)
        assert one == two
