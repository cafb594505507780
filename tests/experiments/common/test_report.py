"""Means, errors and tables, by numbers that are right in one's head."""

import math

import pytest

from experiments.common import plots, report


def test_mean_and_error():
    """1, 2, 6: mean 3, variance (4 + 1 + 9)/2 = 7, standard error √(7/3)."""
    found = report.mean_and_error([1.0, 2.0, 6.0])
    assert found == pytest.approx((3, math.sqrt(7 / 3)))
    assert report.mean_and_error([4.0]) == (4, 0)
    assert report.mean_and_error([1.0, None]) == (math.inf, 0)


def test_written():
    assert report.written([1.0, 3.0]) == "2.000 ± 1.000"
    assert report.written([1.0, 3.0], 1, "+") == "+2.0 ± 1.0"
    assert report.written([1.5]) == "1.500"
    assert report.written([1.0, None]) == "diverged"


def test_markdown():
    """Names to the left, numbers to the right, nothing for None."""
    columns = {"method": lambda row: row[0], "rank": lambda row: row[1]}
    table = report.markdown(columns, [("FLORA", 16), ("Adam", None)])
    assert table == ("| method | rank |\n| --- | ---: |\n| FLORA | 16 |\n| Adam |  |\n")
    assert report.markdown(columns, []) == "| method | rank |\n| --- | --- |\n"


def test_units():
    assert report.megabytes(1_234_567) == "1.23"
    assert [report.ranked("FLORA", rank) for rank in (8, None)] == [
        "FLORA, r=8",
        "FLORA",
    ]


def test_main(tmp_path, monkeypatch):
    """A report is written again for each file that is named."""
    found = []
    monkeypatch.setattr("sys.argv", ["report", "a.json", "b.json"])
    report.main(found.append)
    assert [path.name for path in found] == ["a.json", "b.json"]


def test_points_of_a_single_seed_are_hollow(tmp_path):
    with plots.picture(tmp_path / "picture.png") as panels:
        plots.points(panels[0, 0], [1, 2], [[1.0, 3.0], [2.0]], 0, label="FLORA")
        line, hollow = panels[0, 0].get_lines()[0], panels[0, 0].get_lines()[-1]
        assert list(line.get_ydata()) == [2, 2]
        assert list(hollow.get_xdata()) == [2]
        assert hollow.get_markerfacecolor() == "white"
    assert (tmp_path / "picture.png").stat().st_size > 5_000
