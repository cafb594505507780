"""Tables and pictures of grids, by numbers that are right in one's head."""

import math

import pytest

from experiments.claims import report as claims_report
from experiments.claims import resampling as resampling_report
from experiments.family import report as family_report
from experiments.sweep import report as sweep_report
from experiments.sweep.report import Cell


def cell(losses, *, method="adamw", matrices=1_000_000, options="", **others):
    """A cell of the family with a loss for each of the seeds 0, 1, ..."""
    rows = tuple(
        {
            "seed": seed,
            "validation_loss": loss,
            "matrix_bytes": matrices,
            "state_bytes": matrices + 500_000,
            "trained_bytes": 3_000_000,
            "step_bytes": 9_000_000,
        }
        for seed, loss in enumerate(losses)
    )
    fields = {"projection": None, "rank": None, "b2": None, "learning_rate": 0.1}
    return Cell(
        method=method, options=options, rows=rows, step_seconds=0.02, **fields | others
    )


def test_statistics():
    """1, 2, 6: mean 3, variance (4 + 1 + 9)/2 = 7, standard error √(7/3)."""
    found = cell([1.0, 2.0, 6.0])
    assert found.statistics("validation_loss") == pytest.approx((3, math.sqrt(7 / 3)))
    assert (found.mean, found.error) == found.statistics("validation_loss")
    assert found.statistics("step_bytes") == (9_000_000, 0)
    assert (found.matrix_bytes, found.state_bytes) == (1_000_000, 1_500_000)
    assert cell([4.0]).statistics("validation_loss") == (4, 0)
    assert cell([1.0, None]).statistics("validation_loss") == (math.inf, 0)


def test_differences_are_of_the_same_seed():
    """Losses that vary by seed hide nothing: 0.5, 0.6 and 0.7 over AdamW."""
    cells = [
        cell([1.0, 3.0, 5.0], b2=0.99),
        cell([9.0, 9.0, 9.0], b2=0.9),  # the other AdamW, which is worse
        cell([0.0, 0.0, 0.0], b2=0.99, options="b1 0.95"),  # with options: no reference
        cell([1.5, 3.6, 5.7], method="muon", matrices=500_000),
        cell([1.5], method="galore", rank=8, matrices=250_000),
        cell([2.0, None, 4.0], method="fira", rank=8, matrices=250_000),
    ]
    lines = family_report.table(cells).splitlines()
    assert {line.count("|") for line in lines} == {11}
    # The standard deviation is 0.1, and 0.1/√3 = 0.058.
    assert (
        "| Muon |  |  | 0.1 | 3.600 ± 1.212 | +0.600 ± 0.058 | 0.50 | 0.500 | 1.00 "
        "| 20 |" in lines
    )
    assert (
        "| GaLore | 8 |  | 0.1 | 1.500 | +0.500 | 0.25 | 0.250 | 0.75 | 20 |" in lines
    )
    assert lines[2].startswith("| AdamW, b1 0.95 |  | 0.99 | 0.1 | 0.000 ± 0.000 | -3")
    assert lines[-1].startswith("| Fira | 8 |  | 0.1 | diverged |  | 0.25 |")


def test_a_seed_that_the_reference_has_not_finished_has_no_difference():
    """The same when AdamW itself diverged at it: 2 - 1, and 4 - 2."""
    reference = cell([1.0, None, 2.0])
    other = cell([2.0, 7.0, 4.0, 8.0], method="muon")
    assert family_report._difference(other, reference) == "+1.500 ± 0.500"
    assert family_report._difference(reference, reference) == ""
    assert family_report._difference(other, None) == ""


def test_pareto_front():
    sizes_and_losses = [(4, 1.0), (1, 3.0), (2, 3.5), (2, 2.0), (3, 2.0), (5, 1.5)]
    cells = [cell([loss], matrices=size) for size, loss in sizes_and_losses]
    front = [(found.matrix_bytes, found.mean) for found in family_report._front(cells)]
    assert front == [(1, 3.0), (2, 2.0), (4, 1.0)]
    assert family_report._front([]) == []


def test_a_seed_that_diverges_at_the_best_rate():
    rows = [
        {"method": "flora_momentum", "rank": 8, "projection": "SRHT", "seed": seed}
        | {"learning_rate": 0.1, "validation_loss": loss, "step_seconds": 0.1}
        for seed, loss in ((0, 4.0), (1, None))
    ]
    (found,) = sweep_report.summarise(rows)
    assert found.mean == float("inf")


def test_cells_with_other_options_are_other_cells():
    rows = [
        {"method": "flora", "rank": 8, "seed": 0, "learning_rate": rate}
        | {"validation_loss": loss, "step_seconds": 0.1}
        | ({} if options is None else {"options": options})
        for options, rate, loss in (
            (None, 0.1, 4.0),
            ({"reading": "residual"}, 0.1, 3.0),
            ({"reading": "residual"}, 0.2, 2.0),
            ({"reading": "paper", "resample_every": None}, 0.1, 5.0),
        )
    ]
    found = [
        (cell.options, cell.learning_rate, cell.mean)
        for cell in sweep_report.summarise(rows)
    ]
    assert found == [
        ("", 0.1, 4.0),
        ("reading residual", 0.2, 2.0),
        ("reading paper, resample_every None", 0.1, 5.0),
    ]


def test_best_rate_leaves_out_what_diverged():
    rows = [
        {"learning_rate": rate, "validation_loss": loss}
        for rate, loss in ((0.1, 5.0), (0.2, 4.0), (0.4, None))
    ]
    assert sweep_report.best_rate(rows) == 0.2


def test_claims(tmp_path):
    """Metrics that the rows have, the lowest loss first, and bytes in MB."""
    cells = [
        cell([2.0, 4.0], method="none"),
        cell([1.0, 3.0], method="lora_accumulation", rank=16, options="alpha 4"),
    ]
    lines = claims_report.table(cells).splitlines()
    assert lines[0] == (
        "| method | learning rate | validation loss | trained, MB | state, MB "
        "| step, MB |"
    )
    assert lines[2:] == [
        "| LoRA accumulation, alpha 4, r=16 | 0.1 | 2.000 ± 1.000 | 3.00 | 1.50 "
        "| 9.00 |",
        "| No accumulation | 0.1 | 3.000 ± 1.000 | 3.00 | 1.50 | 9.00 |",
    ]
    claims_report.draw(cells, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    cells.append(cell([None], method="full_momentum"))
    last = claims_report.table(cells).splitlines()[-1]
    assert last == "| Momentum | 0.1 | diverged | 3.00 | 1.50 | 9.00 |"
    claims_report.draw([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_resampling(tmp_path):
    """The limit in ln(16)/(2 ln(1/0.99)); and a picture."""
    assert resampling_report.stability_limit(0.99, 32, 512) == pytest.approx(
        137.9, 1e-3
    )
    cells = [cell([2.0, 3.0], method="flora_momentum", rank=8) for _ in range(3)]
    for found, every in zip(cells, (1, 10, None), strict=True):
        for row in found.rows:
            row |= {"options": {"resample_every": every}, "rank": 8, "momentum": 0.9}
            row |= {"model": {"width": 128}}
    resampling_report.draw(cells, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
