"""Training on several devices that average sketches."""

import dataclasses

import jax
import pytest

import flora_jax as fj
from experiments.common import devices, records
from experiments.common.errors import ConfigError
from experiments.models.build import create
from experiments.reduction import run as reduction
from experiments.reduction.config import Config
from tests.experiments.job import TINY

RANK = 16


@pytest.fixture
def config(tmp_path, tiny, monkeypatch):
    two = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    monkeypatch.setattr(devices, "mesh", lambda: two)
    return Config(
        ranks=(RANK,),
        learning_rates=(0.05, 0.1),
        seeds=(0, 1),
        updates=2,
        batch_size=4,
        eval_every=1,
        eval_examples=4,
        model=TINY.model,
        data_dir=tiny.data_dir,
        corpus_dir=tiny.corpus_dir,
        output_dir=tmp_path,
    )


@pytest.mark.full
def test_three_ways_of_averaging(config, monkeypatch):
    reduction.run(config)
    rows = records.read_rows(config.output_dir / "reduction.jsonl")
    assert len(rows) == 3 * 2 * 2  # Ways, rates, seeds.
    assert {row["devices"] for row in rows} == {2}
    _, params = create(TINY.model, 0)
    plans = fj.plan_leaves(params, fj.Sketch(RANK, mask=fj.not_embeddings))
    is_plan = {"is_leaf": lambda x: isinstance(x, fj.LeafPlan)}
    kept = [
        jax.ShapeDtypeStruct(plan.state_shape, "float32").size
        for plan in jax.tree.leaves(plans, **is_plan)
    ]
    full = 4 * sum(x.size for x in jax.tree.leaves(params))
    expected = {"plain": full, "sketch": 4 * sum(kept), "feedback": 4 * sum(kept)}
    assert {row["way"]: row["bytes_all_reduced"] for row in rows} == expected
    assert 4 * sum(kept) < full
    losses = {way: [r["curve"] for r in rows if r["way"] == way] for way in expected}
    assert losses["plain"][0] != losses["sketch"][0] != losses["feedback"][0]
    assert "| gradients |" in (config.output_dir / "reduction.md").read_text()
    assert (config.output_dir / "reduction.png").stat().st_size > 0
    # The same command again has nothing left to train.
    monkeypatch.setattr(reduction, "Bench", None)
    with (config.output_dir / "reduction.jsonl").open("a") as file:
        file.write('{"way": "pla')  # as a kill leaves it
    reduction.run(config)
    assert len((config.output_dir / "reduction.jsonl").read_text().splitlines()) == 12


def test_refuses_what_makes_no_sense(config):
    with pytest.raises(ConfigError, match="`--batch-size` must be a multiple of the 2"):
        reduction.run(dataclasses.replace(config, batch_size=3))
    with pytest.raises(ConfigError, match="`--ranks` must be below `--model.width`"):
        dataclasses.replace(config, ranks=(4096,)).validate()
    with pytest.raises(ConfigError, match="`--seeds` must name at least one, got none"):
        dataclasses.replace(config, seeds=()).validate()
