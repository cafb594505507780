"""The memory command: known sizes of state, and what a step's account consists of."""

import re

import jax
import pytest

import flora_jax as fj
from experiments.common.methods import METHODS
from experiments.common.state_bytes import tree_bytes
from experiments.models.config import PUBLISHED, T5Config
from experiments.step_memory import __main__ as command
from experiments.step_memory.config import Config
from experiments.step_memory.run import measure, parameters

GIB = 2**30
# float32 accumulators under the paper's rules: matrices of an aspect up to 16.
KNOWN = {
    "t5-3b": {None: 10.62, 16: 0.287, 64: 0.779, 256: 2.75, 512: 5.37},
    "gpt2-xl": {None: 5.80, 16: 0.355, 64: 0.520, 256: 1.18, 512: 2.06},
}


@pytest.mark.full
@pytest.mark.parametrize(
    "name", [pytest.param("t5-3b", marks=pytest.mark.full), "gpt2-xl"]
)
def test_accumulators_have_the_known_sizes(name):
    method = METHODS["flora_accumulation"]
    _, params, _ = parameters(PUBLISHED[name], method, 16)
    found = {None: tree_bytes(params) / GIB}
    for rank in (16, 64, 256, 512):
        accumulator = fj.compressed_accumulator(fj.Sketch(rank))
        found[rank] = tree_bytes(jax.eval_shape(accumulator.init, params)) / GIB
    assert found == pytest.approx(KNOWN[name], rel=0.01)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PUBLISHED, "t5-small", T5Config(layers=1, decoder_layers=1))


@pytest.mark.full
def test_rows(tiny, tmp_path, capsys):
    arguments = (
        "--models t5-small --methods flora_accumulation --ranks 16 --source-length 16"
    )
    assert command.main([*arguments.split(), "--output-dir", str(tmp_path)]) == 0
    table = (tmp_path / "step_memory.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("\n") == 2 + 2 + 1
    assert (tmp_path / "step_memory.png").stat().st_size > 10_000


@pytest.mark.full
def test_the_account_adds_up(tiny):
    config = Config(source_length=16, target_length=8, scan=False, remat=False)
    adam, flora, sketched, lora = (
        measure(config, "t5-small", f"{name}_accumulation", rank)
        for name, rank in (
            ("adam", None),
            ("flora", 16),
            ("sketched", 16),
            ("lora", 16),
        )
    )
    for row in (adam, flora, sketched, lora):
        kept = row["parameters"] + row["optimizer"] + row["accumulator"]
        assert row["accumulate_step"] >= kept + row["accumulate_temporaries"]
        # Tokens in, loss out, and a pointer for each array: next to nothing else.
        assert row["accumulate_step"] < kept + row["accumulate_temporaries"] + 2000
        assert row["apply_step"] >= kept + row["apply_temporaries"]
        assert row["apply_step"] < kept + row["apply_temporaries"] + 2000
    assert adam["accumulator"] == adam["parameters"]
    assert adam["optimizer"] == pytest.approx(2 * adam["parameters"], rel=0.01)
    assert flora["accumulator"] < 0.8 * adam["accumulator"]
    assert sketched["accumulator"] == flora["accumulator"]
    less = sketched["accumulate_temporaries"]
    assert less < 0.95 * flora["accumulate_temporaries"]
    assert lora["trained"] == lora["accumulator"]
    assert lora["trained"] < 0.2 * lora["parameters"]


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
    assert command.main(arguments.split()) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert re.match("error: " + message, errors)
