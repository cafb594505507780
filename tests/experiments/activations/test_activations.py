"""What sketches in place of activations save, as committed, and the command."""

import pathlib
import types

import jax
import pytest

from experiments.activations import __main__ as command
from experiments.activations import report
from experiments.activations.run import measure
from experiments.common import chips, records
from experiments.models.config import PUBLISHED, GPT2Config
from tests.experiments.commands import assert_refused, assert_same_table

RESULTS = pathlib.Path(report.__file__).parent / "results" / "gradients.jsonl"


def row(**fields):
    found = [x for x in records.read_rows(RESULTS) if x.items() >= fields.items()]
    assert len(found) == 1
    return found[0]


def case(**fields):
    """Full and sketched gradients of one program, compared."""
    cases = report.pairs(records.read_rows(RESULTS))
    (found,) = [x for x in cases if x.items() >= fields.items()]
    return found


@pytest.mark.parametrize(("model", "most"), [("gpt2", 0.75), ("smollm2-135m", 0.78)])
@pytest.mark.parametrize("layers", ["scanned", "unrolled"])
def test_sketches_take_less_than_activations_on_a_gpu(model, layers, most):
    found = case(chip="h100", model=model, layers=layers, precision="default")
    assert found["ratio"] <= most


@pytest.mark.parametrize("model", ["gpt2", "smollm2-135m"])
@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_where_activations_are_recomputed_sketches_take_no_more(chip, model):
    found = case(chip=chip, model=model, layers="recomputed", precision="default")
    assert found["ratio"] <= 1


def test_products_in_float32_leave_a_tpu_as_much_to_save():
    found = case(chip="v5e", model="gpt2", layers="scanned", precision="highest")
    assert found["ratio"] <= 0.75


@pytest.mark.parametrize("model", ["gpt2", "smollm2-135m"])
def test_sketches_save_operations(model):
    found = case(chip="v5e", model=model, layers="unrolled", precision="default")
    assert found["operations"] < 1


def test_the_committed_table_is_that_of_the_rows(tmp_path):
    assert_same_table(report, RESULTS, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rank 1", "`--rank` must be above 0 and below 1, got 1.0"),
        ("--models", "`--models` must name at least one, got none"),
        ("--models gpt2 --length 1025", "`--length` must be at most 1024"),
        ("--batch-size 0", "`--batch-size` must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_one_line(arguments, message, capsys):
    assert_refused(command.main, arguments.split(), message, capsys)


def test_without_a_compiler_the_command_says_what_to_install(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(chips, "installed", lambda module: False)
    assert command.main(f"--output-dir {tmp_path}".split()) == 2
    assert "pip install -e '.[tpu-compiler]'" in capsys.readouterr().err


@pytest.mark.full
def test_the_command_compiles_what_is_missing(tmp_path, monkeypatch):
    """For the CPU that is there."""
    small = GPT2Config(2, 256, 4, 64, 256)
    monkeypatch.setitem(PUBLISHED, "gpt2", small)
    here = types.SimpleNamespace(devices=jax.devices())
    monkeypatch.setattr(chips, "topology", lambda *_: here)
    monkeypatch.setattr(chips, "versions", lambda _: {})
    line = "--models gpt2 --layers scanned --batch-size 2 --length 64"
    arguments = [*line.split(), "--output-dir", str(tmp_path)]
    assert command.main(arguments) == 0
    rows = records.read_rows(tmp_path / "gradients.jsonl")
    full, sketched = rows
    assert (full["gradients"], sketched["gradients"]) == ("full", "sketched")
    # Sketches of gradients come out, of embeddings all of it.
    assert sketched["outputs"] < 0.5 * full["outputs"]
    assert measure(full)["temporaries"] == full["temporaries"]
    assert command.main(arguments) == 0
    assert records.read_rows(tmp_path / "gradients.jsonl") == rows
    assert "## 2 x 64 tokens" in (tmp_path / "gradients.md").read_text()
