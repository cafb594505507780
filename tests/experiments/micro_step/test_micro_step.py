"""Operations, buffers and time of a micro-step with sketched gradients."""

import json

import pytest

from experiments.micro_step import __main__ as command
from experiments.micro_step.run import buffers
from experiments.models.config import PUBLISHED, GPT2Config, T5Config
from tests.experiments.commands import assert_refused

PROGRAM = """
%fused (p: f32[768,3072]) -> f32[3072,768] {
  %p = f32[768,3072]{1,0} parameter(0)
  ROOT %t = f32[3072,768]{0,1} transpose(%p), dimensions={1,0}
}
ENTRY %main (x: f32[480,768]) -> (f32[768,3072], f32[]) {
  %x = f32[480,768]{1,0} parameter(0)
  %b = f32[768,3072]{1,0} bitcast(%x)
  %d = bf16[1,768,3072]{2,1,0} dot(%x, %x), lhs_contracting_dims={0}
  %f = (f32[768,3072]{1,0}, f32[16,3072]{1,0}) fusion(%d), kind=kLoop, calls=%fused
  ROOT %r = (f32[768,3072]{1,0}, f32[]) tuple(%f, %x)
}
"""


def test_buffers_of_a_weights_shape():
    found = buffers(PROGRAM, {(768, 3072)})
    assert found == {"dot": 1, "fusion": 1, "transpose": 1}
    assert buffers(PROGRAM, {(768, 768)}) == {}


@pytest.fixture
def tiny(monkeypatch):
    gpt2 = GPT2Config(width=128, heads=2, context=80)
    t5 = T5Config(width=128, hidden=256, head_width=64, heads=2)
    monkeypatch.setitem(PUBLISHED, "gpt2", gpt2)
    monkeypatch.setitem(PUBLISHED, "t5-small", t5)


@pytest.mark.full
@pytest.mark.parametrize(
    "model", ["gpt2", pytest.param("t5-small", marks=pytest.mark.slow)]
)
def test_rows_table_and_picture(model, tiny, tmp_path, capsys):
    arguments = f"--models {model} --ranks 4 --projections CountSketch --rounds 2"
    arguments += " --length 80"
    assert command.main([*arguments.split(), "--output-dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "micro_step.json").read_text())["rows"]
    full = rows[0]
    assert len(rows) == 1 + 2
    for row in rows:
        assert row["milliseconds"] > 0
        assert row["flops_ratio"] == row["flops"] / full["flops"]
        if row["method"] == "sketched_accumulation":
            assert row["flops_ratio"] < 0.85
            assert row["weight_shaped_buffers"] == {}
            assert row["gradient_output_bytes"] < 0.7 * full["gradient_output_bytes"]
        else:
            assert row["flops_ratio"] == pytest.approx(1, abs=1e-3)
            assert row["weight_shaped_buffers"]
    table = (tmp_path / "micro_step.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("\n") == 2 + len(rows)
    assert (tmp_path / "micro_step.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ranks 0", "`--ranks` must be at least 1, got 0"),
        ("--ranks", "`--ranks` must name at least one, got none"),
        ("--rounds 1", "`--rounds` must be at least 2"),
        ("--length 1025", "`--length` must be at most 1024, the context of gpt2"),
    ],
)
def test_bad_settings_are_one_line(arguments, message, capsys):
    assert_refused(command.main, arguments.split(), message, capsys)
