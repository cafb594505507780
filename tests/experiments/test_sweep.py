"""The grid of short trainings: what it runs, and what it does not run again."""

import argparse
import hashlib
import json
import pathlib

import jax
import pytest

from experiments import family, records, sweep, sweep_report
from experiments.models import create
from tests.experiments.job import TINY


def grid(tmp_path, **changes):
    content = {
        "methods": ["adafactor_momentum", "flora_accumulation"],
        "projections": ["CountSketch"],
        "ranks": [TINY.rank],
        "learning_rates": [0.01, 0.1],
        "seeds": [0, 1],
        "settings": {
            "model": vars(TINY.model),
            "updates": 3,
            "batch_size": TINY.batch_size,
            "micro_batches": TINY.micro_batches,
            "eval_examples": 4,
        },
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


@pytest.mark.parametrize(
    ("name", "results"),
    [("projections", "projections/projections"), ("family", "family/quality")],
)
def test_results_in_the_repository_are_those_of_their_grid(name, results):
    folder = pathlib.Path(sweep.__file__).parent
    grid = json.loads((folder / f"sweeps/{name}.json").read_text())
    sweep.config_of(grid["settings"]).validate()
    known = [cell for part in sweep.parts(grid) for cell in sweep.cells(part)]
    rows = records.read_rows(folder / f"results/{results}.jsonl")
    found = [
        {key: row[key] for key in ("method", "projection", "rank", "b2") if key in row}
        for row in rows
    ]
    assert all(cell in known for cell in found)
    assert all(cell in found for cell in known)
    assert all(
        row[key] == grid["settings"][key] for row in rows for key in grid["settings"]
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


def test_a_best_rate_at_the_end_is_followed_by_one_more(monkeypatch, tiny):
    """Once; the other seeds run at the best of all."""

    class Bench:
        def __init__(self, cell, settings, data):
            pass

        def train(self, rate, seed):
            return {"validation_loss": 1 / rate}  # The higher the better.

    monkeypatch.setattr(sweep, "Bench", Bench)
    grid = {"learning_rates": [0.1, 0.2], "seeds": [0, 1], "settings": {}}
    cell, data = {"method": "adamw"}, argparse.Namespace(fingerprint="")

    def runs(**extra):
        rows = sweep.run_cell(cell, grid | extra, data, {})
        return [(row["learning_rate"], row["seed"]) for row in rows]

    assert runs() == [(0.1, 0), (0.2, 0), (0.2, 1)]
    assert runs(extensions=1) == [(0.1, 0), (0.2, 0), (0.4, 0), (0.4, 1)]
    assert runs(extensions=2)[-2:] == [(0.8, 0), (0.8, 1)]


def test_trains_the_family(tmp_path, tiny):
    """One member, from the grid to table and picture; bytes are counted by hand."""
    content = {
        "groups": [{"methods": ["flora_adamw"], "learning_rates": [0.02]}],
        "b2": [0.9],
        "ranks": [TINY.rank],
        "seeds": [0, 1],
        "settings": {
            "model": vars(TINY.model),
            "updates": 3,
            "batch_size": TINY.batch_size,
            "eval_examples": 4,
            "resample_every": 2,
        },
    }
    path, output = tmp_path / "grid.json", tmp_path / "results.jsonl"
    path.write_text(json.dumps(content))
    sweep.sweep(path, output, tiny.data_dir, tiny.corpus_dir)
    rows = records.read_rows(output)
    assert [(row["learning_rate"], row["seed"]) for row in rows] == [
        (0.02, 0),
        (0.02, 1),
    ]
    first, second = (row["validation_loss"] for row in rows)
    assert first != second
    assert max(first, second) < 5.7  # log(300) = 5.70 at the start
    width, rank = TINY.model.width, TINY.rank
    longer = 3 * width + width + 4 * width + 4 * width  # qkv, output, up and down
    kept = 2 * 4 * rank * longer
    assert 0 <= rows[0]["matrix_bytes"] - kept < 400  # counts, keys, limiters
    saved = measured("adamw").state_bytes - rows[0]["state_bytes"]
    assert 0 <= 2 * 4 * width * longer - kept - saved < 400

    (cell,) = sweep_report.summarise(rows)
    assert (cell.b2, cell.matrix_bytes) == (0.9, rows[0]["matrix_bytes"])
    assert (
        f"| FLORA-AdamW | {rank} | 0.9 | 0.02 | {cell.mean:.3f} ± {cell.error:.3f} "
        f"| {cell.state_bytes / 1e6:.2f} | {cell.matrix_bytes / 1e6:.2f} |"
    ) in output.with_suffix(".md").read_text().splitlines()
    assert output.with_suffix(".png").stat().st_size > 10_000


def measured(name):
    tx = family.FAMILY[name].make(1.0, family.Setting(TINY.rank, 2, 0, 0.9))
    params = jax.eval_shape(lambda: create(TINY.model, 0)[1])
    state, matrices = family.measure(tx, TINY, params)
    return argparse.Namespace(state_bytes=state, matrix_bytes=matrices)


def test_bytes_of_adamw():
    """Two numbers of four bytes for each parameter."""
    found = measured("adamw")
    width = TINY.model.width
    assert 0 <= found.matrix_bytes - 2 * 4 * 12 * width**2 < 50  # a count or two
    params = jax.eval_shape(lambda: create(TINY.model, 0)[1])
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 0 <= found.state_bytes - 2 * 4 * numbers < 50


def test_best_rate_leaves_out_what_diverged():
    rows = [
        {"learning_rate": rate, "validation_loss": loss}
        for rate, loss in ((0.1, 5.0), (0.2, 4.0), (0.4, None))
    ]
    assert sweep_report.best_rate(rows) == 0.2


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
    assert [len(cell.losses) for cell in cells] == [2, 2]
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
    assert sweep_report.summarise(rows) == []
    assert output.with_suffix(".md").read_text().count("\n") == 2


def test_a_seed_that_diverges_at_the_best_rate():
    rows = [
        {"method": "flora_momentum", "rank": 8, "projection": "SRHT", "seed": seed}
        | {"learning_rate": 0.1, "validation_loss": loss, "step_seconds": 0.1}
        for seed, loss in ((0, 4.0), (1, None))
    ]
    (cell,) = sweep_report.summarise(rows)
    assert cell.mean == float("inf")
