"""The family of optimizers: what is set from outside, and bytes counted by hand."""

import json

import jax
import pytest

import flora_jax as fj
from experiments.common import lora, records
from experiments.family import recipes as family
from experiments.models import create
from experiments.sweep import report as sweep_report
from experiments.sweep import run as sweep
from tests.experiments.job import TINY

WIDTH, RANK = TINY.model.width, TINY.rank
MATRICES = 12 * WIDTH**2  # qkv, output, up and down
SMALL = 400  # bytes of counts, keys, limiters, and constants


def shapes():
    return jax.eval_shape(lambda: create(TINY.model, 0)[1])


def measured(name, params=None, **options):
    tx = family.FAMILY[name].make(1.0, family.Setting(RANK, 2, 0, 0.9, options))
    return family.measure(tx, shapes() if params is None else params)


def test_trains_the_family(tmp_path, tiny):
    """One member, from the grid to table and picture; bytes are counted by hand."""
    content = {
        "report": "family",
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
    path, output = tmp_path / "grid.json", tmp_path / "results.jsonl"
    path.write_text(json.dumps(content))
    sweep.sweep(path, output, tiny.data_dir, tiny.corpus_dir)
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
    (cell,) = sweep_report.summarise(rows)
    line = f"| FLORA-AdamW | {RANK} | 0.9 | 0.02 | {cell.mean:.3f} ± {cell.error:.3f} |"
    assert line in output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_bytes_of_adamw():
    """Two numbers of four bytes for each parameter."""
    state, matrices = measured("adamw")
    numbers = sum(leaf.size for leaf in jax.tree.leaves(shapes()))
    assert 0 <= matrices - 2 * 4 * MATRICES < 50  # a count or two
    assert 0 <= state - 2 * 4 * numbers < 50


def test_bytes_of_muon():
    """One number for each parameter of a matrix, two for each of the others."""
    state, matrices = measured("muon")
    numbers = sum(leaf.size for leaf in jax.tree.leaves(shapes()))
    assert 0 <= matrices - 4 * MATRICES < SMALL
    assert 0 <= state - 4 * MATRICES - 2 * 4 * (numbers - MATRICES) < SMALL


@pytest.mark.parametrize("name", ["sketched_muon", "flora_muon"])
def test_bytes_of_sketched_muons(name):
    """One number for each of a sketch: half of what flora_adamw keeps."""
    _, matrices = measured(name)
    kept = 4 * RANK * MATRICES // WIDTH
    assert 0 <= matrices - kept < SMALL
    assert 2 * kept <= measured("flora_adamw")[1] < 2 * kept + SMALL


@pytest.mark.parametrize("name", ["muon", "flora_muon"])
def test_muons_in_eight_bits(name):
    """A quarter, scales, and small leaves as they are; steps change every matrix."""
    whole, coded = measured(name)[1], measured(name, state_dtype="int8")[1]
    assert 0.25 < coded / whole < 0.35
    options = {"state_dtype": "int8"}
    tx = family.FAMILY[name].make(0.1, family.Setting(RANK, 1, 0, 0.9, options))
    params = create(TINY.model, 0)[1]
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(2):
        updates, state = update(params, state, params)
    chosen = jax.tree.leaves(family.matrices(params))
    for leaf, own in zip(jax.tree.leaves(updates), chosen, strict=True):
        if own:  # Muon's step, of a root mean square of 0.2.
            assert (leaf**2).mean() ** 0.5 == pytest.approx(0.02, rel=0.2)


def test_bytes_of_adamw_in_eight_bits():
    """Two bytes for each parameter of a matrix, and a scale for each block."""
    _, matrices = measured("adamw_int8")
    assert 2 * MATRICES < matrices < 2.2 * MATRICES


def test_bytes_of_adapters_are_those_of_the_matrices():
    graphdef, params = create(TINY.model, 0)
    _, params = lora.add(graphdef, params, 4, 4.0, 0)
    trained, _ = lora.divide(params, tune_rest=True)
    sides = WIDTH * (1 + 3) + WIDTH * (1 + 1) + WIDTH * (1 + 4) + WIDTH * (4 + 1)
    _, matrices = measured("adamw", trained)
    assert 0 <= matrices - 2 * 4 * 4 * sides < 50


def test_matrices_are_what_the_others_sketch():
    chosen = jax.tree_util.tree_leaves_with_path(family.matrices(shapes()))
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, own in chosen
        if own
    ]
    assert len(names) == 4
    assert all(name.endswith("kernel") for name in names)
    assert len(chosen) > 4


def test_options_replace_what_is_shared():
    options = {"b2": 0.5, "resample_every": 7, "projection": "SRHT"}
    setting = family.Setting(RANK, 2, 3, 0.9, options)
    assert setting.sketch["projection"] == fj.SRHT(scale="isometric")
    assert setting.moments["b2"] == 0.5
    assert setting.moments["refresh_every"] == 2
    assert setting.resampled["resample_every"] == 7
    adaptive = family.Setting(RANK, 2, 3, 0.9, {"projection": "TopDCT"})
    assert adaptive.sketch["projection"] == fj.TopDCT()
    assert adaptive.moments["b2"] == 0.9
    unknown = family.Setting(RANK, 2, 3, 0.9, {"rang": 4})
    with pytest.raises(TypeError, match="rang"):
        family.FAMILY["flora"].make(0.1, unknown)
