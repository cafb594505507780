"""The committed account of a step on one chip, and the command without a compiler."""

import pathlib

import pytest

from experiments.accelerators import report
from experiments.accelerators.__main__ import main
from experiments.common import chips, records
from experiments.common.chips import CHIPS
from tests.experiments.commands import assert_same_table

RESULTS = pathlib.Path(report.__file__).parent / "results" / "steps.jsonl"


def rows(**fields):
    fields = {"calls": "one", **fields}
    return {
        row["method"]: row
        for row in records.read_rows(RESULTS)
        if all(row[name] == value for name, value in fields.items())
    }


# Bytes moved in a step, in sizes of the parameters, of AdamW 7; and temporaries.
MOST = {
    "v5e": {
        "adamw_int8": (5.7, 0.1),
        "flora": (6.4, 0.15),
        "flora_adamw": (4.9, 0.15),
        "flora_adamw_int8": (4.9, 0.15),
        "apollo": (4.6, 0.15),
        "galore": (4.0, 0.15),
        "fira": (4.9, 0.15),
        "flora_accumulation": (1.15, 1.1),
    },
    "h100": {
        "adamw_int8": (5.7, 0.1),
        "flora": (7.6, 0.15),
        "flora_adamw": (5.1, 0.15),
        "flora_adamw_int8": (5.7, 0.3),
        "apollo": (4.6, 0.15),
        # Parts of the products of a refresh, by a compiler that could not tune them.
        "galore": (4.0, 0.2),
        "flora_accumulation": (1.15, 0.15),
    },
}
CASES = [(chip, method) for chip, methods in MOST.items() for method in methods]


@pytest.mark.parametrize(("chip", "method"), CASES)
def test_a_step_moves_little_and_holds_no_copy(chip, method):
    row = rows(chip=chip, problem="leaf", dtype="float32")[method]
    moved, held = MOST[chip][method]
    assert row["step"] <= moved * row["parameters"]
    assert row["temporaries"] <= held * row["parameters"]


# Bounds on the time, over AdamW's, where it is not at most that.
SLOWER = {
    ("v5e", "bfloat16"): {"galore": 1.21, "fira": 1.25},
    ("v6e", "bfloat16"): {"adamw_int8": 1.15},
    ("h100", "float32"): {"flora": 1.06, "fira": 1.57},
    ("h100", "bfloat16"): {
        "adamw_int8": 1.3,
        "flora": 1.1,
        "galore": 1.63,
        "fira": 2.56,
    },
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chip", CHIPS)
def test_a_step_takes_as_long_as_adamws(chip, dtype):
    found = rows(chip=chip, problem="leaf", dtype=dtype)
    slower = SLOWER.get((chip, dtype), {})
    for method in MOST["v5e"]:
        most = slower.get(method, 1.001) * found["adamw"]["seconds"]
        assert found[method]["seconds"] <= most, method


def test_the_committed_table_is_that_of_the_rows(tmp_path):
    assert_same_table(report, RESULTS, tmp_path)
    for chip in CHIPS:
        adamw = rows(chip=chip, problem="leaf", dtype="float32")["adamw"]
        assert adamw["step"] == pytest.approx(7 * adamw["parameters"], rel=1e-3)


DOCUMENT = pathlib.Path(report.__file__).parents[2] / "docs/benchmarks/accelerators.md"
# What its table calls them.
DOCUMENTED = {
    "`optax.adamw`": "adamw",
    "`optax.adafactor(momentum=0.9)`": "adafactor_momentum",
    "`flora`": "flora",
    "`flora`, `Gaussian`": "flora_gaussian",
    "`flora`, `Orthogonal`": "flora_orthogonal",
    "`flora`, `SRHT`": "flora_srht",
    "`flora_adamw`": "flora_adamw",
    "`flora_adamw`, int8": "flora_adamw_int8",
    "`apollo`": "apollo",
    "`apollo_mini`": "apollo_mini",
    "`galore`, between refreshes": "galore",
    "`fira`, between refreshes": "fira",
    "`quantize_state(adamw)`": "adamw_int8",
    "`optax.contrib.muon`": "muon",
    "`flora_muon`": "flora_muon",
    '`flora_muon(method=fj.NewtonSchulz(dtype="bfloat16"))`': "flora_muon_bfloat16",
    "`flora_muon(method=fj.RowNormalization())`": "flora_muon_rows",
    "`optax.MultiSteps(adafactor)`, 16": "full_accumulation",
    "`compressed_accumulation(adafactor)`, 16": "flora_accumulation",
    "… with `update` and `apply_updates`": "flora_accumulation",
}


def test_the_table_of_the_documentation_is_that_of_the_rows():
    lines = [x for x in DOCUMENT.read_text().splitlines() if x.startswith("| ")]
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in cells] == list(DOCUMENTED)
    for name, *given in cells:
        expected = []
        for chip in ("v5e", "h100"):
            fields = {"chip": chip, "problem": "leaf", "dtype": "float32"}
            adamw = rows(**fields)["adamw"]
            found = [rows(**fields, calls=calls) for calls in ("two", "one")]
            if name.startswith("…"):
                found.reverse()
            row = {**found[0], **found[1]}[DOCUMENTED[name]]
            size = row["parameters"]
            expected += [
                f"{row['step'] / size:.2f}",
                f"{row['temporaries'] / size:.3f}",
                f"{row['seconds'] / adamw['seconds']:.2f}",
            ]
        assert given[:6] == expected, name


def test_the_least_time_is_that_of_memory_or_of_products():
    chip = CHIPS["v5e"]
    assert chip.seconds(819e9, 0, "") == 1
    # Six products in bfloat16 for one in float32.
    assert chip.seconds(819e9, 197e12, "highest") == pytest.approx(6)
    assert chip.seconds(819e9, 197e12, "bfloat16") == 1


@pytest.mark.parametrize(
    ("chip", "module"), [("v5e", "libtpu"), ("h100", "jax_plugins.xla_cuda13")]
)
def test_a_missing_compiler_is_one_line(chip, module, tmp_path, capfd):
    if chips.installed(module):
        pytest.skip(f"{module} is installed")
    out = tmp_path / "out"
    arguments = ["--chips", chip, "--methods", "adamw", "--output-dir", str(out)]
    assert main(arguments) == 2
    assert "compiler is missing" in capfd.readouterr().err
