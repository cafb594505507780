"""Tables and pictures of grids, by numbers that are right in one's head."""

import dataclasses
import json

import pytest

import experiments.projections.report as projections_report
from experiments.claims import report as claims_report
from experiments.claims import resampling
from experiments.common.methods import METHODS
from experiments.family import report as family_report
from experiments.sweep.results import Result, best_learning_rate, finished, summarize


def result(
    losses, *, method="adamw", matrices=1_000_000, learning_rate=0.1, **settings
):
    """A method with a loss for each of the seeds 0, 1, ..."""
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
    return Result(METHODS[method], settings, learning_rate, rows, 0.02)


def test_differences_are_of_the_same_seed():
    """Losses that vary by seed hide nothing: 0.5, 0.6 and 0.7 over AdamW."""
    results = [
        result([1.0, 3.0, 5.0], b2=0.99),
        result([9.0, 9.0, 9.0], b2=0.9),  # the other AdamW, which is worse
        result([0.0, 0.0, 0.0], b2=0.99, options={"b1": 0.95}),  # no reference
        result([1.5, 3.6, 5.7], method="muon", matrices=500_000),
        result([1.5], method="galore", rank=8, matrices=250_000),
        result([2.0, None, 4.0], method="fira", rank=8, matrices=250_000),
    ]
    lines = family_report.table(results).splitlines()
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
    reference = result([1.0, None, 2.0])
    other = result([2.0, 7.0, 4.0, 8.0], method="muon")
    assert family_report.difference(other, reference) == "+1.500 ± 0.500"
    assert family_report.difference(reference, reference) == ""
    assert family_report.difference(other, None) == ""


def test_pareto_front(tmp_path):
    sizes_and_losses = [(4, 1.0), (1, 3.0), (2, 3.5), (2, 2.0), (3, 2.0), (5, 1.5)]
    results = [result([loss], matrices=size) for size, loss in sizes_and_losses]
    front = [(x.of_first("matrix_bytes"), x.mean) for x in family_report.front(results)]
    assert front == [(1, 3.0), (2, 2.0), (4, 1.0)]
    assert family_report.front([]) == []
    family_report.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_seed_that_diverges_at_the_best_rate():
    rows = [
        {"method": "flora_momentum", "rank": 8, "projection": "SRHT", "seed": seed}
        | {"learning_rate": 0.1, "validation_loss": loss, "step_seconds": 0.1}
        for seed, loss in ((0, 4.0), (1, None))
    ]
    (found,) = summarize(rows)
    assert found.mean == float("inf")
    assert finished([found]) == []


def test_other_options_are_other_results():
    rows = [
        {"method": "flora", "rank": 8, "seed": 0, "learning_rate": rate}
        | {"validation_loss": loss, "step_seconds": 0.1}
        | ({} if options is None else {"options": options})
        for options, rate, loss in (
            (None, 0.1, 4.0),
            ({"estimator": "residual"}, 0.1, 3.0),
            ({"estimator": "residual"}, 0.2, 2.0),
            ({"estimator": "paper", "resample_every": None}, 0.1, 5.0),
        )
    ]
    found = [(x.ranked_title, x.learning_rate, x.mean) for x in summarize(rows)]
    assert found == [
        ("FLORA, r=8", 0.1, 4.0),
        ("FLORA, estimator residual, r=8", 0.2, 2.0),
        ("FLORA, estimator paper, resample_every None, r=8", 0.1, 5.0),
    ]


def test_titles_of_options():
    """Objects as Python writes them; short words for what is often set."""
    options = {"residual": {"Fira": {"limiter": None}}, "state_dtype": "int8"}
    found = result([1.0], method="flora_adamw", options=options | {"orthogonal": True})
    assert found.title == (
        "AdamW on sketches, residual Fira(limiter=None), int8, orthogonalized"
    )


def test_best_rate_leaves_out_what_diverged():
    rows = [
        {"learning_rate": rate, "validation_loss": loss}
        for rate, loss in ((0.1, 5.0), (0.2, 4.0), (0.4, None))
    ]
    assert best_learning_rate(rows) == 0.2
    assert best_learning_rate(rows[2:]) == 0.4


def test_claims(tmp_path):
    """Metrics that the rows have, the lowest loss first, and bytes in MB."""
    options = {"lora_alpha": 4}
    results = [
        result([2.0, 4.0], method="none"),
        result([1.0, 3.0], method="lora_accumulation", rank=16, options=options),
    ]
    lines = claims_report.table(results).splitlines()
    assert lines[0] == (
        "| method | learning rate | validation loss | trained, MB | state, MB "
        "| step, MB |"
    )
    assert lines[2:] == [
        "| LoRA accumulation, lora_alpha 4, r=16 | 0.1 | 2.000 ± 1.000 | 3.00 | 1.50 "
        "| 9.00 |",
        "| No accumulation | 0.1 | 3.000 ± 1.000 | 3.00 | 1.50 | 9.00 |",
    ]
    claims_report.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    results.append(result([None], method="full_momentum"))
    last = claims_report.table(results).splitlines()[-1]
    assert last == "| Full momentum | 0.1 | diverged | 3.00 | 1.50 | 9.00 |"
    claims_report.draw([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_claims_about_a_pretrained_model():
    """What was forgotten, and what happened to the weights."""
    seen = {"prose_loss": 2.5, "effective_rank": 33.33, "intruders": 0.5}
    found = result([1.0, 3.0], method="adamw")
    rows = tuple(row | seen | {"relative_change": 0.0123} for row in found.rows)
    lines = claims_report.table([dataclasses.replace(found, rows=rows)]).splitlines()
    assert lines[0].split(" | ")[3:7] == [
        "loss on prose",
        "effective rank",
        "intruder dimensions",
        "relative change",
    ]
    assert lines[2].split(" | ")[3:7] == [
        "2.500 ± 0.000",
        "33.3 ± 0.0",
        "0.50 ± 0.00",
        "0.0123 ± 0.0000",
    ]


def write_rows(path, rows):
    shared = {"seed": 0, "learning_rate": 0.1, "step_seconds": 0.1}
    shared |= {"trained_bytes": 1, "state_bytes": 1, "step_bytes": 1}
    path.write_text("".join(json.dumps(shared | row) + "\n" for row in rows))


def test_resampling(tmp_path):
    """The limit in ln(16)/(2 ln(1/0.99)); a table; a picture, unless all diverged."""
    assert resampling.stability_limit(0.99, 32, 512) == pytest.approx(137.9, 1e-3)
    shared = {"method": "flora_momentum", "rank": 8, "momentum": 0.9}
    shared |= {"model": {"width": 128}}
    for losses in ([2.0, 3.0, 2.5], [None] * 3):
        path = tmp_path / f"{losses[0]}.jsonl"
        every = zip((1, 10, None), losses, strict=True)
        rows = [
            {"options": {"resample_every": x}, "validation_loss": y} for x, y in every
        ]
        write_rows(path, [shared | row for row in rows])
        resampling.write(path)
        assert "| FLORA momentum, resample_every None, r=8 | 0.1 |" in (
            path.with_suffix(".md").read_text()
        )
        assert path.with_suffix(".png").exists() == (losses[0] is not None)


def test_projections(tmp_path):
    """A panel for momentum and one for accumulation."""
    rows = [{"method": f"full_{kind}"} for kind in ("momentum", "accumulation")]
    rows += [
        {"method": f"flora_{kind}", "projection": projection, "rank": rank}
        for kind in ("momentum", "accumulation")
        for projection in ("Gaussian", "SRHT")
        for rank in (4, 8)
    ]
    write_rows(
        tmp_path / "rows.jsonl", [row | {"validation_loss": 2.0} for row in rows]
    )
    projections_report.write(tmp_path / "rows.jsonl")
    table = (tmp_path / "rows.md").read_text()
    assert table.count("\n") == 2 + 10
    assert "| FLORA momentum | SRHT | 4 | 0.1 | 2.000 | 100 |" in table
    assert (tmp_path / "rows.png").stat().st_size > 10_000
