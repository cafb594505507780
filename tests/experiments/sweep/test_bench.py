"""Optimizers of grids: from a grid to its table, and bytes counted by hand."""

import json

import jax
import pytest

import flora_jax as fj
from experiments.common import lora, records
from experiments.common.methods import METHODS, Settings, matrices
from experiments.models.build import create
from experiments.sweep import run as sweep
from experiments.sweep.config import Config
from experiments.sweep.results import summarize
from experiments.sweep.tasks import measure
from tests.experiments.job import TINY

WIDTH, RANK = TINY.model.width, 16
MATRICES = 12 * WIDTH**2  # qkv, output, up and down
SMALL = 400  # bytes of counts, keys, limiters, and constants


def shapes():
    return jax.eval_shape(lambda: create(TINY.model, 0)[1])


def make(name, rate=1.0, **options):
    sketch = fj.Sketch(RANK, mask=fj.not_embeddings)
    settings = Settings(sketch, b2=0.9, refresh_every=50, options=options)
    return METHODS[name].optimizer(rate, settings)


def measured(name, params=None, **options):
    return measure(make(name, **options), shapes() if params is None else params)


@pytest.mark.full
def test_trains_the_family(tmp_path, tiny):
    """One method, from the grid to table and picture; bytes are counted by hand."""
    content = {
        "report": "family.report",
        "groups": [{"methods": ["flora_adamw"], "learning_rates": [0.02]}],
        "b2": [0.9],
        "ranks": [RANK],
        "seeds": [0, 1],
        "settings": {
            "model": vars(TINY.model),
            "updates": 3,
            "batch_size": TINY.batch_size,
            "eval_examples": 4,
            "resample_every": 2,
        },
    }
    path, output = tmp_path / "grid.json", tmp_path / "out/grid.jsonl"
    path.write_text(json.dumps(content))
    sweep.run(Config((str(path),), output.parent, tiny.data_dir, tiny.corpus_dir))
    rows = records.read_rows(output)
    assert [(row["learning_rate"], row["seed"]) for row in rows] == [
        (0.02, 0),
        (0.02, 1),
    ]
    first, second = (row["validation_loss"] for row in rows)
    assert first != second
    assert max(first, second) < 5.7  # log(300) = 5.70 at the start
    longer = 3 * WIDTH + WIDTH + 4 * WIDTH + 4 * WIDTH  # qkv, output, up and down
    kept = 2 * 4 * RANK * longer
    assert 0 <= rows[0]["matrix_bytes"] - kept < SMALL
    saved = measured("adamw")[0] - rows[0]["state_bytes"]
    assert 0 <= 2 * 4 * MATRICES - kept - saved < SMALL
    (found,) = summarize(rows)
    line = f"| AdamW on sketches | {RANK} | 0.9 | 0.02 | {found.mean:.3f} ± "
    assert line in output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_bytes_of_adamw():
    """Two elements of four bytes for each parameter."""
    state, part = measured("adamw")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes()))
    assert 0 <= part - 2 * 4 * MATRICES < 50  # a count or two
    assert 0 <= state - 2 * 4 * parameters < 50


def test_bytes_of_muon():
    """One element for each parameter of a matrix, two for each of the others."""
    state, part = measured("muon")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes()))
    assert 0 <= part - 4 * MATRICES < SMALL
    assert 0 <= state - 4 * MATRICES - 2 * 4 * (parameters - MATRICES) < SMALL


@pytest.mark.parametrize("name", ["sketched_muon", "flora_muon"])
def test_bytes_of_sketched_muons(name):
    """One element for each of a sketch: half of what flora_adamw keeps."""
    _, part = measured(name)
    kept = 4 * RANK * MATRICES // WIDTH
    assert 0 <= part - kept < SMALL
    assert 2 * kept <= measured("flora_adamw")[1] < 2 * kept + SMALL


@pytest.mark.full
@pytest.mark.parametrize("name", ["muon", "flora_muon"])
def test_muons_in_eight_bits(name):
    """A quarter, scales, and small leaves as they are; steps change every matrix."""
    whole, coded = measured(name)[1], measured(name, state_dtype="int8")[1]
    assert 0.25 < coded / whole < 0.35
    tx = make(name, 0.1, state_dtype="int8")
    params = create(TINY.model, 0)[1]
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(2):
        updates, state = update(params, state, params)
    chosen = jax.tree.leaves(matrices(params))
    for leaf, own in zip(jax.tree.leaves(updates), chosen, strict=True):
        if own:  # Muon's step, of a root mean square of 0.2.
            assert (leaf**2).mean() ** 0.5 == pytest.approx(0.02, rel=0.2)


def test_bytes_of_adamw_in_eight_bits():
    """Two bytes for each parameter of a matrix, and a scale for each row."""
    _, part = measured("adamw", state_dtype="int8")
    assert 2 * MATRICES < part < 2.2 * MATRICES


@pytest.mark.full
def test_bytes_of_adapters_are_those_of_the_matrices():
    graphdef, params = create(TINY.model, 0)
    _, params = lora.add(graphdef, params, 4, 4.0, 0)
    trained, _ = lora.divide(params, tune_rest=True)
    sides = WIDTH * (1 + 3) + WIDTH * (1 + 1) + WIDTH * (1 + 4) + WIDTH * (4 + 1)
    _, part = measured("adamw", trained)
    assert 0 <= part - 2 * 4 * 4 * sides < 50


def test_matrices_are_what_the_others_sketch():
    chosen = jax.tree_util.tree_leaves_with_path(matrices(shapes()))
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, own in chosen
        if own
    ]
    assert len(names) == 4
    assert all(name.endswith("kernel") for name in names)
    assert len(chosen) > 4
