"""The grid of short trainings: what it runs, and what it does not run again."""

import json

from experiments import records, sweep, sweep_report
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
