"""Grids: their cells, and that those in the repository make sense."""

import hashlib
import importlib
import json
import pathlib

import pytest

from experiments.common import records
from experiments.common.errors import ConfigError
from experiments.common.methods import METHODS, settings_of
from experiments.pretrained import __main__ as pretrained
from experiments.sweep import config as grids
from experiments.sweep.config import Config, cells, parts, run_id, title
from experiments.sweep.tasks import config_of, split

EXPERIMENTS = pathlib.Path(grids.__file__).parent.parent
GRIDS = [path.with_suffix(".json") for path in EXPERIMENTS.glob("*/results/*.jsonl")]
GRIDS = sorted(path for path in GRIDS if path.exists())
# Grids that take days: the rest of their runs is still missing.
UNFINISHED = {"tuning"}


def test_cells():
    found = cells(
        {
            "methods": ["full_accumulation", "flora_momentum"],
            "projections": ["Gaussian", "SRHT"],
            "ranks": [8, 16],
        }
    )
    assert found[0] == {"method": "full_accumulation"}
    assert [(cell["projection"], cell["rank"]) for cell in found[1:]] == [
        ("Gaussian", 8),
        ("Gaussian", 16),
        ("SRHT", 8),
        ("SRHT", 16),
    ]


def test_cells_of_groups():
    """A decay for each; a rank only where one is chosen."""
    grid = {
        "groups": [
            {"methods": ["adamw", "galore"], "b2": [0.9, 0.99]},
            {"methods": ["flora"], "ranks": [4]},
        ],
        "ranks": [8, 16],
    }
    first, second = (cells(part) for part in parts(grid))
    assert first[:2] == [{"method": "adamw", "b2": b2} for b2 in (0.9, 0.99)]
    assert [(cell["rank"], cell["b2"]) for cell in first[2:]] == [
        (8, 0.9),
        (8, 0.99),
        (16, 0.9),
        (16, 0.99),
    ]
    assert second == [{"method": "flora", "rank": 4}]


def test_cells_with_options():
    """Each of them for every method, those without a rank included; and titles."""
    options = [{}, {"estimator": "residual", "resample_every": None}]
    found = cells(
        {
            "methods": ["none", "muon", "lora_momentum", "flora"],
            "ranks": [4, 8],
            "options": options,
        }
    )
    assert found == [
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
    assert [title(cell) for cell in found[-2:]] == [
        "flora rank 8",
        "flora rank 8 estimator residual resample_every None",
    ]


def test_refuses_an_unknown_method():
    with pytest.raises(ConfigError, match="`methods` of the grid must be of none, .*"):
        cells({"methods": ["adamv"]})


def test_hash_of_a_run_stays():
    """Of the row's settings, in any order; the results of earlier runs are found."""
    settings = {"updates": 60, "model": {"layers": 2}, "learning_rate": 0.03}
    text = b'{"learning_rate": 0.03, "model": {"layers": 2}, "updates": 60}'
    assert run_id(settings) == hashlib.sha256(text).hexdigest()[:12]


def test_grids_are_there():
    assert {path.stem for path in GRIDS} == {
        *("pareto", "longer", "ablations", "bases", "polar", "polar_longer"),
        *("codes", "rows", "rounding", "rounding_llama", "rounding_llama_low"),
        "projections",
        *UNFINISHED,
        *("gpt2", "t5", "accumulation", "momentum", "resampling"),
    }
    assert Config(tuple(path.stem for path in GRIDS)).paths() == GRIDS


@pytest.mark.parametrize(
    "path",
    sorted({*GRIDS, *Config(pretrained.GRIDS).paths()}),
    ids=lambda path: path.stem,
)
def test_grids_make_sense(path):
    """Found out before the hours that they take."""
    grid = json.loads(path.read_text())
    assert importlib.import_module(f"experiments.{grid['report']}").write
    shared, _ = config_of(grid["settings"])
    for part in parts(grid):
        assert part["learning_rates"]
        assert part["seeds"]
        for cell in cells(part):
            config, settings = split(shared, cell)
            config.validate()
            settings = settings_of(config, cell.get("rank"), **settings)
            assert METHODS[cell["method"]].optimizer(0.1, settings)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_results_in_the_repository_are_those_of_their_grid(path):
    grid = json.loads(path.read_text())
    known = [cell for part in parts(grid) for cell in cells(part)]
    rows = records.read_rows(path.with_suffix(".jsonl"))
    axes = ("method", "projection", "rank", "b2", "options")
    found = [{key: row[key] for key in axes if key in row} for row in rows]
    assert all(cell in known for cell in found)
    assert path.stem in UNFINISHED or all(cell in found for cell in known)
    shared = grid["settings"]
    assert all(
        row[key] == shared[key] for row in rows for key in shared if key not in axes
    )
