"""The benchmark on a tree of two small layers: what it reports, not how fast it is."""

import json

import jax
import numpy as np
import optax
import pytest

import flora_jax as fj
from experiments.models import GPT2Config
from experiments.step_time import contenders, measure, plot, trees
from experiments.step_time.__main__ import main


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


@pytest.fixture
def three(monkeypatch):
    """Three optimizers in four programs."""
    kept = {"optax.adam", "optax.adamw", "galore(exact)"}
    for part in ("family_peers", "family"):
        whole = getattr(contenders, part)
        monkeypatch.setattr(
            contenders,
            part,
            lambda *given, whole=whole: (x for x in whole(*given) if x.name in kept),
        )


def test_family(small, three, tmp_path):
    """Refreshes are compared with steps; the lines of the table are measured rows."""
    output = tmp_path / "out"
    settings = "--contenders family --trees gpt2 --dtypes float32 --ranks 16 --rounds 2"
    arguments = [*settings.split(), "--compile-tree", "None", "--output-dir", output]
    assert main([str(word) for word in arguments]) == 0
    result = json.loads((output / "benchmark.json").read_text())
    rows = {(row["name"], row["kind"]): row for row in result["steps"]}
    assert len(rows) == len(result["steps"]) == 4
    assert rows["optax.adamw", "optimizer"]["over_adamw"] == 1
    step, refresh = (rows["galore(exact)", kind] for kind in ("optimizer", "refresh"))
    assert (step["steps"], refresh["steps"]) == (2, 1)
    assert refresh["over_step"] == refresh["milliseconds"] / step["milliseconds"]
    table = (output / "benchmark.md").read_text().splitlines()
    assert len(table) == 2 + 3
    (line,) = (line for line in table if "`galore(exact)`" in line)
    assert [cell.strip() for cell in line.split("|")[4:9]] == [
        "16",
        f"{step['milliseconds']:.0f}",
        f"{step['over_adamw']:.2f}",
        f"{refresh['milliseconds']:.0f}",
        f"{refresh['over_step']:.1f}",
    ]
    assert (output / "benchmark.png").stat().st_size > 10_000


def test_all_of_the_family_keep_less(small):
    params = trees.shapes("gpt2", "float32")
    peers = list(contenders.family_peers(False, "float32"))
    adamw = contenders.state_bytes(peers[0], params)
    ours = list(contenders.family((16,)))
    assert (peers[0].name, len(peers), len(ours)) == ("optax.adamw", 5, 2 * 9 + 3)
    for contender in ours:
        assert contenders.state_bytes(contender, params) < adamw


def test_a_refresh_is_one(small):
    """The state in which a refresh is timed gets another basis, and a step does not."""
    params = trees.random_like(trees.shapes("gpt2", "float32"), 0)
    params = {"c_fc": params["h"][0]["mlp"]["c_fc"]}
    pair = [x for x in contenders.family((16,)) if x.name == "galore(randomized)"]
    step = jax.jit(pair[0].step)
    _, first = step(params, pair[0].init(params), params)
    other = jax.tree.map(jax.numpy.flip, params)
    _, second = step(params, first, other)
    _, renewed = step(params, pair[1].before(first), other)
    bases = [optax.tree.get(state, "basis") for state in (first, second, renewed)]
    jax.tree.map(np.testing.assert_array_equal, bases[0], bases[1])
    kernels = [tree["c_fc"]["kernel"] for tree in bases]
    assert not np.allclose(kernels[1], kernels[2], atol=1e-2)
    assert [contender.kind for contender in pair] == ["optimizer", "refresh"]


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
