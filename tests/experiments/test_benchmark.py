"""The benchmark on a tree of two small layers: what it reports, not how fast it is."""

import jax
import pytest

import flora_jax as fj
from experiments.benchmark import contenders, measure, plot, trees
from experiments.benchmark.__main__ import main
from experiments.models import GPT2Config


@pytest.fixture
def small(monkeypatch):
    size = GPT2Config(layers=2, width=128, heads=2, context=256, vocab_size=512)
    monkeypatch.setitem(trees._SIZES, "gpt2", size)
    monkeypatch.setattr(
        contenders, "PROJECTIONS", (fj.CountSketch(), fj.CountSketch("isometric"))
    )


def test_trees_have_the_published_sizes():
    count = {
        name: sum(leaf.size for leaf in jax.tree.leaves(trees.shapes(name, "float32")))
        for name in ("gpt2", "gpt2-stacked", "gpt2-xl")
    }
    assert count == {
        "gpt2": 124_439_808,
        "gpt2-stacked": 124_439_808,
        "gpt2-xl": 1_557_611_200,
    }
    stacked = trees.shapes("gpt2-stacked", "bfloat16")
    assert stacked["h"]["mlp"]["c_fc"]["kernel"].shape == (12, 768, 3072)
    with pytest.raises(ValueError, match="`trees` must be of gpt2.*got 'gpt3'"):
        trees.shapes("gpt3", "float32")


@pytest.mark.parametrize(("tree", "dtype"), [("gpt2", "float32")])
def test_rows(small, tree, dtype, tmp_path):
    rows = measure.time_all(tree, dtype, (16,), 2, lambda line: None)
    names = [row["name"] for row in rows]
    assert names.count("optax.adam") == 1
    assert names.count("flora(CountSketch)") == 4  # steps, and steps that resample
    adam = next(row for row in rows if row["name"] == "optax.adam")
    assert adam["over_adam"] == 1
    for row in rows:
        assert row["quartiles"][0] <= row["milliseconds"] <= row["quartiles"][1]
        assert row["over_floor"] > 0
    sketched = next(row for row in rows if row["name"] == "flora(CountSketch)")
    momentum = next(row for row in rows if row["name"] == "optax.adafactor(momentum)")
    assert sketched["state_bytes"] < momentum["state_bytes"]
    machine = {"device": "test", "cores": 2}
    plot.draw({"steps": rows, "machine": machine}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_compile_times_allocate_nothing(small):
    adafactor = next(iter(contenders.compiled_only()))
    (row,) = measure.compile_times("gpt2", [adafactor])
    assert row["compile_seconds"] > 0
    assert row["temp_bytes"] >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rounds 1", "`--rounds` must be at least 2, for a median and quartiles, g"),
        ("--ranks 16 0", "`--ranks` must be at least 1, got (16, 0)"),
        ("--other-ranks -1", "`--other-ranks` must be at least 1, got (-1,)"),
    ],
)
def test_bad_settings_are_one_line(arguments, message, capsys):
    assert main(arguments.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1
