"""The benchmark on a tree of two small layers: what it reports, not how fast it is."""

import json

import jax
import numpy as np
import optax
import pytest

from experiments.common.state_bytes import tree_bytes
from experiments.models.build import shapes
from experiments.models.config import PUBLISHED, GPT2Config
from experiments.step_time import report
from experiments.step_time import run as step_time
from experiments.step_time.__main__ import main
from experiments.step_time.config import Config
from tests.experiments.commands import assert_refused


@pytest.fixture
def small(monkeypatch):
    size = GPT2Config(layers=2, width=128, heads=2, context=256, vocab_size=512)
    monkeypatch.setitem(PUBLISHED, "gpt2", size)
    monkeypatch.setattr(step_time, "PROJECTIONS", ("CountSketch", "Gaussian"))


@pytest.mark.full
def test_trees_have_the_published_sizes():
    count = {
        name: sum(leaf.size for leaf in jax.tree.leaves(shapes(name, "float32")))
        for name in ("gpt2", "gpt2-stacked", "gpt2-xl")
    }
    assert count == {
        "gpt2": 124_439_808,
        "gpt2-stacked": 124_439_808,
        "gpt2-xl": 1_557_611_200,
    }
    stacked = shapes("gpt2-stacked", "bfloat16")
    assert stacked["h"]["mlp"]["c_fc"]["kernel"].shape == (12, 768, 3072)


@pytest.mark.full
@pytest.mark.parametrize(("tree", "dtype"), [("gpt2", "float32")])
def test_rows(small, tree, dtype, tmp_path):
    rows = step_time.time_all(Config(rounds=2), tree, dtype, (16,), lambda line: None)
    names = [row["name"] for row in rows]
    assert names.count("optax.adam") == 1
    assert names.count("flora(CountSketch)") == 2  # A step, and one that resamples.
    for row in rows:
        assert row["quartiles"][0] <= row["milliseconds"] <= row["quartiles"][1]
        assert row["milliseconds"] > 0 < row["floor_milliseconds"]
    sketched = next(row for row in rows if row["name"] == "flora(CountSketch)")
    momentum = next(row for row in rows if row["name"] == "optax.adafactor(momentum)")
    assert sketched["state_bytes"] < momentum["state_bytes"]
    content = {"steps": rows, "machine": {"device": "test", "cores": 2}}
    (tmp_path / "flora.json").write_text(json.dumps(content))
    report.write(tmp_path / "flora.json")
    assert (tmp_path / "flora.png").stat().st_size > 10_000
    # Renewals are in the line of their step.
    renewals = [row for row in rows if row["kind"] == "renewal"]
    lines = (tmp_path / "flora.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows) - len(renewals)


@pytest.fixture
def three(monkeypatch):
    """Three optimizers in four programs."""
    kept = {"optax.adam", "optax.adamw", "galore(exact)"}
    for part in ("peers", "ours"):
        whole = getattr(step_time, part)
        monkeypatch.setattr(
            step_time,
            part,
            lambda *given, whole=whole: (x for x in whole(*given) if x.name in kept),
        )


@pytest.mark.full
def test_family(small, three, tmp_path):
    """Refreshes are compared with steps; the lines of the table are measured rows."""
    output = tmp_path / "out"
    settings = "--contenders family --trees gpt2 --dtypes float32 --ranks 16 --rounds 2"
    arguments = [*settings.split(), "--compile-tree", "None", "--output-dir", output]
    assert main([str(word) for word in arguments]) == 0
    result = json.loads((output / "family.json").read_text())
    rows = {(row["name"], row["kind"]): row for row in result["steps"]}
    assert len(rows) == len(result["steps"]) == 4
    adamw = rows["optax.adamw", "optimizer"]["milliseconds"]
    step, renewal = (rows["galore(exact)", kind] for kind in ("optimizer", "renewal"))
    assert (step["steps"], renewal["steps"]) == (2, 1)
    ratio = renewal["milliseconds"] / step["milliseconds"]
    table = (output / "family.md").read_text().splitlines()
    assert len(table) == 2 + 3
    (line,) = (line for line in table if "`galore(exact)`" in line)
    assert [cell.strip() for cell in line.split("|")[4:9]] == [
        "16",
        f"{step['milliseconds']:.0f}",
        f"{step['milliseconds'] / adamw:.2f}",
        f"{step['milliseconds'] / step['floor_milliseconds']:.1f}",
        f"{renewal['milliseconds']:.0f} ({ratio:.1f} steps)",
    ]
    assert (output / "family.png").stat().st_size > 10_000


def state_bytes(contender, params):
    return tree_bytes(jax.eval_shape(contender.init, params))


@pytest.mark.full
def test_all_of_the_family_keep_less(small):
    params = shapes("gpt2", "float32")
    peers = list(step_time.peers("family", False, "float32"))
    adamw = state_bytes(peers[0], params)
    ours = list(step_time.ours("family", (16,)))
    assert (peers[0].name, len(peers), len(ours)) == ("optax.adamw", 5, 2 * 9 + 3)
    for contender in ours:
        assert state_bytes(contender, params) < adamw


def test_a_renewal_is_one(small):
    """The state in which a renewal is timed gets another basis, and a step does not."""
    params = step_time.random_like(shapes("gpt2", "float32"), 0)
    params = {"c_fc": params["h"][0]["mlp"]["c_fc"]}
    pair = [
        x for x in step_time.ours("family", (16,)) if x.name == "galore(randomized)"
    ]
    step = jax.jit(pair[0].step)
    _, first = step(params, pair[0].init(params), params)
    other = jax.tree.map(jax.numpy.flip, params)
    _, second = step(params, first, other)
    _, renewed = step(params, pair[1].before(first), other)
    bases = [optax.tree.get(state, "basis") for state in (first, second, renewed)]
    jax.tree.map(np.testing.assert_array_equal, bases[0], bases[1])
    kernels = [tree["c_fc"]["kernel"] for tree in bases]
    assert not np.allclose(kernels[1], kernels[2], atol=1e-2)
    assert [contender.kind for contender in pair] == ["optimizer", "renewal"]


@pytest.mark.full
def test_compile_times_allocate_nothing(small):
    adafactor = next(iter(step_time.compiled_only()))
    (row,) = step_time.compile_times("gpt2", [adafactor])
    assert row["compile_seconds"] > 0
    assert row["temp_bytes"] >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rounds 1", "`--rounds` must be at least 2, got 1"),
        ("--ranks 16 0", "`--ranks` must be at least 1, got 0"),
        ("--other-ranks -1", "`--other-ranks` must be at least 1, got -1"),
    ],
)
def test_bad_settings_are_one_line(arguments, message, capsys):
    assert_refused(main, arguments.split(), message, capsys)
