"""The memory command: known sizes of state, and what the chips' compilers accepted."""

import pathlib
import types

import jax
import pytest

import flora_jax as fj
from experiments.common import chips, records
from experiments.common.methods import METHODS
from experiments.common.records import not_measured
from experiments.common.state_bytes import tree_bytes
from experiments.models.config import PUBLISHED, T5Config
from experiments.step_memory import __main__ as command
from experiments.step_memory import report
from experiments.step_memory.config import Config
from experiments.step_memory.run import _cases, measure, optimizer, parameters
from tests.experiments.commands import assert_refused, assert_same_table

GIB = 2**30
RESULTS = pathlib.Path(report.__file__).parent / "results" / "steps.jsonl"
# float32 accumulators under the paper's rules: matrices of an aspect up to 16.
KNOWN = {
    "t5-3b": {None: 10.62, 16: 0.287, 64: 0.779, 256: 2.75, 512: 5.37},
    "gpt2-xl": {None: 5.80, 16: 0.355, 64: 0.520, 256: 1.18, 512: 2.06},
}


@pytest.mark.full
@pytest.mark.parametrize("name", ["t5-3b", "gpt2-xl"])
def test_accumulators_have_the_known_sizes(name):
    method = METHODS["flora_accumulation"]
    _, params, _ = parameters(PUBLISHED[name], method, 16)
    found = {None: tree_bytes(params) / GIB}
    for rank in (16, 64, 256, 512):
        tx = optimizer(method, fj.Sketch(rank))
        acc = jax.eval_shape(tx.init, params).acc_grads
        found[rank] = tree_bytes(acc) / GIB
    assert found == pytest.approx(KNOWN[name], rel=0.01)


def rows(**fields):
    found = [x for x in records.read_rows(RESULTS) if x.items() >= fields.items()]
    assert found
    return found


@pytest.mark.parametrize(("model", "gib"), [("t5-3b", 11.7), ("gpt2-xl", 8.2)])
@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_a_full_cycle_fits_beside_the_parameters(model, gib, chip):
    (row,) = rows(
        chip=chip,
        model=model,
        method="sketched_accumulation",
        rank=16,
        embeddings=False,
        rounding="nearest",
    )
    assert row["total"] <= gib * GIB
    held = row["parameters"] + row["state"] + row["temporaries"]
    # The tokens, and what tiles of the chip add to odd sizes.
    assert held <= row["total"] <= 1.02 * held


def test_a_chip_refuses_what_does_not_fit():
    for name in ("adam", "full_accumulation"):
        (row,) = rows(chip="v5e", model="t5-3b", method=name)
        assert row["refused"] > 15.75 * GIB
        assert "total" not in row


def test_the_committed_table_is_that_of_the_rows(tmp_path):
    assert_same_table(report, RESULTS, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ranks 0", "`--ranks` must be at least 1, got 0"),
        ("--models", "`--models` must name at least one, got none"),
        (
            "--models gpt2 --source-length 1000",
            "`--source-length` and `--target-length` together must be at most 1024",
        ),
        ("--batch-size 0", "`--batch-size` must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_one_line(arguments, message, capsys):
    assert_refused(command.main, arguments.split(), message, capsys)


def test_without_a_compiler_the_command_says_what_to_install(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(chips, "installed", lambda module: False)
    assert command.main(f"--chips h100 --output-dir {tmp_path}".split()) == 2
    assert "'jax-cuda13-plugin[with-cuda]'" in capsys.readouterr().err


@pytest.mark.full
def test_the_account_adds_up(monkeypatch, tmp_path):
    """For the CPU that is there; sketched gradients take less than full ones."""
    size = T5Config(layers=2, decoder_layers=2, width=256, hidden=1024, vocab_size=256)
    monkeypatch.setitem(PUBLISHED, "t5-small", size)
    here = types.SimpleNamespace(devices=jax.devices())
    monkeypatch.setattr(chips, "topology", lambda *_: here)
    names = ("adam", "flora_accumulation", "sketched_accumulation", "lora_accumulation")
    config = Config(models=("t5-small",), methods=names, ranks=(16,), remat=False)
    found = {case["method"]: measure(case) for case in _cases(config)}
    adam, flora, sketched, lora = (found[name] for name in names)
    for row in found.values():
        held = row["parameters"] + row["state"] + row["temporaries"]
        # Tokens in, loss out, and a pointer for each array: next to nothing else.
        assert held <= row["total"] < held + 10_000
    assert adam["state"] == pytest.approx(2 * adam["parameters"], rel=0.01)
    assert flora["state"] == sketched["state"] < 0.3 * adam["state"]
    assert sketched["temporaries"] < 0.9 * flora["temporaries"]
    assert lora["trained"] < 0.3 * lora["parameters"]


def test_rows_are_not_measured_twice():
    config = Config(ranks=(16,), models=("t5-3b",), methods=("adam", "galore"))
    assert len(_cases(config)) == 2
    measured = rows(chip="v5e", model="t5-3b")
    assert not_measured(measured, _cases(config)) == []


DOCUMENT = pathlib.Path(report.__file__).parents[2] / "docs/benchmarks/memory.md"
# What its first table calls them; of others sketches are not taken of embeddings.
DOCUMENTED = {
    "SGD, no state": {"method": "none"},
    "Adam": {"method": "adam"},
    "Full accumulation": {"method": "full_accumulation"},
    "GaLore": {"method": "galore"},
    "LoRA": {"method": "lora_accumulation"},
    "`flora`, without accumulation": {"method": "flora"},
    "FLORA": {"method": "flora_accumulation"},
    "FLORA, sketched gradients": {"embeddings": False},
    "… embeddings too": {"embeddings": True},
    "… accumulators in bfloat16": {"embeddings": True, "accumulator_dtype": "bfloat16"},
    "… stochastic rounding": {"embeddings": True, "rounding": "stochastic"},
}
CASES = [
    {"model": model, "chip": chip}
    for model in ("t5-3b", "gpt2-xl", "llama-2-7b")
    for chip in ("v5e", "h100")
]


def documented_cells(label, rank):
    fields = {"method": "sketched_accumulation", "accumulator_dtype": "float32"}
    fields |= {"rounding": "nearest", "rank": int(rank) if rank else None}
    fields |= DOCUMENTED[label]
    cells = []
    for case in CASES:
        found = [
            x
            for x in records.read_rows(RESULTS)
            if x.items() >= (fields | case).items()
        ]
        gib = [(x.get("total", x.get("refused")) / GIB, "refused" in x) for x in found]
        cells += [f"({size:.1f})" if no else f"{size:.1f}" for size, no in gib] or [""]
    return cells


def test_the_table_of_the_documentation_is_that_of_the_rows():
    lines = [x for x in DOCUMENT.read_text().splitlines() if x.startswith("| ")]
    count = next(i for i, x in enumerate(lines[2:]) if x.startswith("| | "))
    for line in lines[3 : 2 + count]:
        label, rank, *cells = (x.strip() for x in line.strip("|").split("|"))
        assert cells == documented_cells(label, rank), label
