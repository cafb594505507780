"""What a cell of a grid trains: from scratch, or a fine-tuning."""

import json

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from experiments.common import lora, records
from experiments.common.errors import ConfigError
from experiments.common.methods import matrices
from experiments.sweep import run as sweep
from experiments.sweep.config import Config
from experiments.sweep.tasks import Bench, Sources
from tests.experiments import phrases
from tests.experiments.job import TINY

RANK = 16
WIDTH = TINY.model.width
SIDES = WIDTH * (1 + 3) + WIDTH * (1 + 1) + WIDTH * (1 + 4) + WIDTH * (4 + 1)
SETTINGS = {
    "model": vars(TINY.model),
    "updates": 3,
    "batch_size": TINY.batch_size,
    "micro_batches": TINY.micro_batches,
    "eval_examples": 4,
}


def sources(tiny, **settings):
    return Sources(SETTINGS | settings, tiny.data_dir, tiny.corpus_dir)


@pytest.mark.full
def test_a_fine_tuning(tmp_path, monkeypatch):
    """FLORA and LoRA, from the grid to table and picture."""
    phrases.shrink(monkeypatch)
    rank = 8
    content = {
        "report": "claims.report",
        "methods": ["flora_accumulation", "lora_accumulation"],
        "ranks": [rank],
        "learning_rates": [0.05],
        "seeds": [0, 1],
        "settings": {
            "dataset": "phrases",
            "model": "gpt2-tiny",
            "updates": 2,
            "batch_size": 8,
            "micro_batches": 2,
            "vocab_size": 300,
            "source_length": 12,
            "target_length": 12,
            "decode_examples": 4,
        },
    }
    path, output = tmp_path / "grid.json", tmp_path / "out/grid.jsonl"
    path.write_text(json.dumps(content))
    sweep.run(Config((str(path),), output.parent, tmp_path))
    rows = records.read_rows(output)
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for method in content["methods"] for seed in (0, 1)
    ]
    for row in rows:
        # Of some 300 tokens each is as likely at first.
        assert 0 < row["validation_loss"] < np.log(300) + 0.1
        assert row["perplexity"] == pytest.approx(np.exp(row["validation_loss"]))
        assert all(0 <= row[name] <= 100 for name in ("exact_match", "bleu", "chrf"))
        assert row["step_bytes"] > row["state_bytes"] > row["matrix_bytes"]
    assert len({row["validation_loss"] for row in rows}) == 4
    flora, _, adapted, _ = rows
    kernels = 12 * WIDTH**2
    assert flora["trained_bytes"] - adapted["trained_bytes"] == 4 * (
        kernels - rank * SIDES
    )
    # Sketches of the smaller sides, and Adafactor's rows and columns.
    sketches = rank * WIDTH * (3 + 1 + 4 + 4)
    assert 0 <= flora["matrix_bytes"] - 4 * (sketches + SIDES) < 400
    # The accumulator of A and B, which are too narrow for Adafactor to factor.
    assert 0 <= adapted["matrix_bytes"] - 2 * 4 * rank * SIDES < 400
    table = output.with_suffix(".md").read_text()
    assert f"| FLORA accumulation, r={rank} | 0.05 | " in table
    assert f"| LoRA accumulation, r={rank} | 0.05 | " in table
    assert "| validation loss | BLEU | chrF | exact match | trained, MB |" in table
    assert output.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.full
def test_adapters_from_scratch(tiny):
    """They start as the model without, and all but the kernels is trained."""
    data = sources(tiny)
    task = data.task({"method": "lora_momentum", "rank": 4})
    problem, state = task.start(0)
    plain = data.task({"method": "none"})
    without = plain.start(0)
    loss = task.judge(problem, state)["validation_loss"]
    assert loss == pytest.approx(plain.judge(*without)["validation_loss"], rel=1e-6)

    frozen, before = traverse_util.flatten_dict(problem.frozen), without[1].params
    assert {path[-2:] for path in frozen} == {("base", "kernel")}
    assert len(frozen) == 4
    for path, leaf in frozen.items():
        own = traverse_util.flatten_dict(before)[(*path[:-2], "kernel")]
        np.testing.assert_array_equal(leaf, own)
    row = Bench(task).train(0.05, 0)
    assert row["validation_loss"] < loss
    # Momentum and Adafactor's second moment.
    assert 0 <= row["matrix_bytes"] - 2 * 4 * 4 * SIDES < 400
    trained = traverse_util.flatten_dict(state.params)
    assert set(lora.ADAPTERS) < {path[-1] for path in trained}


@pytest.mark.full
def test_each_seed_has_a_start_and_projections_of_its_own(tiny):
    task = sources(tiny).task({"method": "flora_momentum", "rank": RANK})
    params, keys = zip(
        *(
            (state.params, optax.tree.get(state.opt_state, "key"))
            for _, state in map(task.start, (0, 1))
        ),
        strict=True,
    )
    assert not np.array_equal(*keys)
    chosen = jax.tree.leaves(matrices(params[0]))
    for own, one, other in zip(chosen, *map(jax.tree.leaves, params), strict=True):
        assert not own or not np.array_equal(one, other)


@pytest.mark.full
def test_the_rest_has_the_same_adam_in_all_methods(tiny):
    """Whatever the method and its learning rate, which is the matrices' alone."""
    dense_rate, decay = 0.03, 0.99
    data = sources(tiny, dense_learning_rate=dense_rate)
    rng = np.random.default_rng(0)
    found = {}
    for cell in (
        {"method": "adamw", "b2": 0.9},
        {"method": "flora_adamw", "rank": RANK, "b2": 0.9},
        {"method": "muon"},
    ):
        task = data.task(cell)
        state = task.start(0)[1]
        if not found:
            grads = jax.tree.map(
                lambda x: np.float32(rng.normal(size=x.shape)), state.params
            )

        @jax.jit
        def update(rate, state, task=task, grads=grads):
            tx = task.optimizer(rate, 0)
            return tx.update(grads, state.opt_state, state.params)[0]

        for rate in (0.0, 0.01, 0.02):
            found[cell["method"], rate] = update(rate, state)
    chosen = jax.tree.leaves(matrices(grads))
    assert sorted(set(chosen)) == [False, True]
    # With no warm-up in three updates, the first is at the peak.
    adam = optax.adam(dense_rate, b2=decay)
    expected = jax.tree.leaves(adam.update(grads, adam.init(grads))[0])
    for (method, rate), updates in found.items():
        pairs = zip(chosen, jax.tree.leaves(updates), expected, strict=True)
        for own, update, adams in pairs:
            if not own:
                np.testing.assert_allclose(update, adams, rtol=1e-5)
            elif rate == 0:
                assert not np.any(update)
            else:
                assert np.any(update)
        if rate == 0.02:
            half = jax.tree.leaves(found[method, 0.01])
            for own, update, other in zip(
                chosen, jax.tree.leaves(updates), half, strict=True
            ):
                # Twice the rate is exact, but for where XLA multiplies by it.
                factor = 2 if own else 1
                np.testing.assert_allclose(update, factor * other, rtol=1e-6)


@pytest.mark.full
def test_the_learning_rate_of_the_matrices_in_a_run(tiny):
    """At zero, two methods do the same; and they move the rest."""
    data = sources(tiny, dense_learning_rate=0.03)
    losses = []
    for name in ("adamw", "muon"):
        task = data.task({"method": name})
        losses.append(Bench(task).train(0.0, 0)["validation_loss"])
    first = task.judge(*task.start(0))["validation_loss"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] < first - 0.01


@pytest.mark.full
def test_parameters_in_bfloat16(tiny):
    """Half the bytes, the same float32 state; what is below half a unit is lost."""
    data, rows, moved = sources(tiny), {}, {}
    for rounding in (None, "nearest", "stochastic"):
        options = {} if rounding is None else {"rounding": rounding}
        task = data.task({"method": "adamw", "options": options})
        rows[rounding] = Bench(task).train(1e-3, 0)
        params = task.start(0)[1].params
        small = jax.tree.map(lambda x: np.full(x.shape, 1e-5, np.float32), params)
        new = task.apply_updates(params, small, jax.random.key(0))
        chosen = zip(
            *map(jax.tree.leaves, (matrices(params), params, new)), strict=True
        )
        moved[rounding] = min(np.mean(x != y) for own, x, y in chosen if own)
    assert rows[None]["trained_bytes"] == 2 * rows["nearest"]["trained_bytes"]
    assert len({row["state_bytes"] for row in rows.values()}) == 1
    assert len({row["validation_loss"] for row in rows.values()}) == 3
    # A change by 1e-5 is a sixth of a unit in the last place of 0.02.
    assert moved[None] == 1
    assert moved["stochastic"] > 0.1
    assert moved["nearest"] < 0.7


@pytest.mark.full
def test_a_llama(tiny):
    model = {"family": "llama", "layers": 1, "width": 128, "heads": 2, "hidden": 128}
    model |= {"context": TINY.model.context, "vocab_size": TINY.model.vocab_size}
    task = sources(tiny, model=model).task({"method": "adamw"})
    assert "layers" in task.start(0)[1].params
    assert Bench(task).train(1e-3, 0)["validation_loss"] < np.log(300) + 0.1


def test_another_family_of_models(tiny):
    with pytest.raises(ConfigError, match="`family` .* gpt2, llama, got 'mamba'"):
        sources(tiny, model={"family": "mamba"})


def test_another_rounding(tiny):
    cell = {"method": "adamw", "options": {"rounding": "up"}}
    with pytest.raises(ConfigError, match="`rounding` .* stochastic, got 'up'"):
        sources(tiny).task(cell)


@pytest.mark.sample(1)
@pytest.mark.parametrize("method", ["full_accumulation", "lora_momentum"])
def test_a_dense_learning_rate_is_for_whole_optimizers(method, tiny):
    data = sources(tiny, dense_learning_rate=0.03)
    with pytest.raises(ConfigError, match=f"`dense_learning_rate` is for .*{method!r}"):
        data.task({"method": method, "rank": RANK})


def test_refuses_dropout(tiny):
    model = vars(TINY.model) | {"dropout": 0.1}
    with pytest.raises(ConfigError, match="a grid trains without dropout"):
        sources(tiny, model=model)


@pytest.mark.full
def test_options_reach_the_run(tiny):
    """A setting of the job, and an argument of the optimizer."""
    data = sources(tiny)
    for method, options in (
        ("flora_momentum", {"estimator": "nesterov"}),
        ("flora", {"b1": 0.5}),
    ):
        cell = {"method": method, "rank": RANK}
        found = []
        for extra in ({}, {"options": options}):
            task = data.task(cell | extra)
            state = task.start(0)[1]
            tx = task.optimizer(0.1, 0)
            grads = jax.tree.map(np.ones_like, state.params)
            updates, _ = jax.jit(tx.update)(grads, state.opt_state, state.params)
            found.append(jax.tree.leaves(updates))
        chosen = jax.tree.leaves(matrices(grads))
        for own, update, other in zip(chosen, *found, strict=True):
            assert not own or np.any(update != other), method
