"""The tiny job: what it writes, and that an interruption changes no number."""

import contextlib
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from experiments.common import checkpoints, problem, records, state_bytes
from experiments.common.config import Run
from experiments.common.errors import ConfigError, NonFiniteLossError
from experiments.common.methods import MAIN, METHODS, settings_of
from experiments.main_job import seeds
from experiments.main_job.config import Config
from experiments.main_job.run import prepare, run
from experiments.models.build import create
from tests.experiments.job import UPDATES

# One worker runs the tiny job for all of them (pytest-xdist, `--dist loadgroup`).
pytestmark = pytest.mark.xdist_group("experiments")

STOP = 4


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, tiny):
    """The tiny job, stopped and resumed: its configuration and the rows before."""
    folder = tmp_path_factory.mktemp("resumed")
    config = dataclasses.replace(tiny, output_dir=folder)
    assert run(dataclasses.replace(config, stop_after=STOP)) == []
    rows = {name: read_rows(config, name) for name in MAIN}
    assert not (folder / "report.md").exists()
    # A kill would have come later than the last checkpoint, in the middle of a line.
    for name in MAIN:
        with (run_of(config, name).folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"update": STOP + 1, "loss": 0.0}) + "\n")
            file.write('{"update": ')
    run(config)
    return config, rows


def run_of(config, name):
    """The run of a method of the tiny job, which has one rank."""
    return Run(config, name, *(config.ranks if METHODS[name].ranked else (None,)))


def read_rows(config, name):
    return records.read_rows(run_of(config, name).folder / "metrics.jsonl")


prepared = functools.cache(prepare)


def without_times(rows):
    times = ("seconds", "tokens_per_second", "process_peak_bytes")
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def read_state(config, name):
    own, data = run_of(config, name), prepared(config)
    _, state, _ = problem.build(config, data, name, own.rank)
    identity = own.identity | {"the data": data.fingerprint}
    kept = checkpoints.Checkpoints(own.folder / "checkpoints", identity)
    with contextlib.closing(kept):
        return kept.restore(state)


@pytest.mark.full
@pytest.mark.parametrize("name", MAIN)
def test_resumed_run_is_the_uninterrupted_one(finished, resumed, name):
    config, before = resumed
    rows = read_rows(config, name)
    assert [row["update"] for row in rows] == list(range(UPDATES + 1))
    assert rows[: STOP + 1] == before[name]  # to the second: it was not run again
    assert without_times(rows) == without_times(read_rows(finished[0], name))
    update, state = read_state(config, name)
    assert update == UPDATES
    expected = read_state(finished[0], name)[1]
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.full
@pytest.mark.parametrize("name", MAIN)
def test_training_learns_and_is_logged(finished, name):
    rows = read_rows(finished[0], name)
    evaluated = [row["update"] for row in rows if "validation_loss" in row]
    assert evaluated == [0, 3, 6, 7]
    assert rows[0]["validation_loss"] == pytest.approx(np.log(300), abs=0.3)
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]
    assert [row["tokens"] for row in rows] == [4 * 16 * i for i in range(8)]
    assert all(row["seconds"] > 0 for row in rows[1:])


@pytest.mark.full
def test_all_methods_start_from_the_same_model_and_batch(finished):
    rows = [read_rows(finished[0], name) for name in MAIN]
    assert len({row[0]["validation_loss"] for row in rows}) == 1
    first = [row[1]["loss"] for row in rows]
    # Two micro-batches sum in another order than one batch.
    np.testing.assert_allclose(first, first[0], rtol=1e-6)


def test_learning_rate_warms_up_and_decays(tiny):
    config = dataclasses.replace(tiny, updates=200, learning_rate=0.5)
    schedule = problem.learning_rate(config, "flora_momentum")
    rates = [float(schedule(i)) for i in range(201)]
    assert 0 < rates[0] < 0.05
    assert int(np.argmax(rates)) == 20
    assert rates[20] == pytest.approx(0.5)
    assert rates[200] == pytest.approx(0.05)


@pytest.mark.parametrize("updates", [1, 2, 8])
def test_learning_rate_of_a_short_run(tiny, updates):
    config = dataclasses.replace(tiny, updates=updates)
    schedule = problem.learning_rate(config, "flora_momentum")
    rates = [schedule(i) for i in range(updates)]
    assert all(float(rate) > 0 for rate in rates)


@pytest.mark.full
def test_compressed_buffers_have_rank_over_width(finished):
    config, rows = finished
    # 12 W^2 in the one block, all of width 128 and rank 16.
    full = 4 * 12 * 128**2
    parameters = 4 * sum(x.size for x in jax.tree.leaves(create(config.model, 0)[1]))
    for row in rows:
        compressed = METHODS[row["method"]].compressed
        kept = full // 8 if compressed else full
        assert row["matrix_bytes_in_full"] == full
        assert row["matrix_bytes"] == kept
        assert row["kept"] == ("1/8" if compressed else "1")
        assert row["rank_over_width"] == compressed
        assert row["buffer_bytes"] == parameters - full + kept
        assert row["trained_bytes"] == parameters
        assert 0 < row["state_bytes"] - row["buffer_bytes"] < 0.1 * parameters


def test_default_job_is_no_toy():
    config = Config()
    params = jax.eval_shape(lambda: create(config.model, 0)[1])
    sketches = [settings_of(config, rank).sketch for rank in config.ranks]
    plans = state_bytes.leaf_plans(params, sketches[0])
    compressed = [plan for plan in plans if plan.dense_reason is None]
    share = sum(np.prod(plan.shape) for plan in compressed)
    assert share / sum(x.size for x in jax.tree.leaves(params)) >= 0.7
    assert config.model.width >= 256
    assert config.model.layers >= 2
    assert config.updates >= 100
    width = config.model.width
    assert config.ranks == (width // 8, width // 2)
    assert {plan.width / plan.rank for plan in compressed} == {8}
    assert not any(plan.path.startswith(("wte", "wpe")) for plan in compressed)


@pytest.mark.full
def test_report_files(finished):
    config, rows = finished
    report = (config.output_dir / "report.md").read_text()
    table = [line for line in report.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(MAIN)
    by_title = {row["title"]: row for row in rows}
    for line in table[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        row = by_title.pop(cells[0])
        assert cells[3] == f"{row['matrix_bytes']:,}"
        assert cells[4] == row["kept"]
    assert report.count("1/8, which is rank/width in every leaf") == 2
    for name in ("loss_curves.png", "memory.png"):
        assert (config.output_dir / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_results_json(finished):
    config, rows = finished
    content = json.loads((config.output_dir / "results.json").read_text())
    assert set(content["versions"]) >= {"python", "jax", "flax", "optax"}
    assert content["config"]["ranks"] == [16]
    assert content["config"]["output_dir"] == str(config.output_dir)
    order = list(METHODS)
    expected = sorted(rows, key=lambda row: order.index(row["method"]))
    assert content["rows"] == expected
    for row in rows:
        assert row["step_peak_bytes"] > row["state_bytes"]
        own = config.output_dir / row["run"] / "result.json"
        assert json.loads(own.read_text()) == row


@pytest.mark.full
def test_repeating_a_finished_run_only_reports(finished):
    config, rows = finished
    names = ("flora_momentum",)
    metrics = read_rows(config, names[0])
    assert run(dataclasses.replace(config, methods=names)) == [rows[1]]
    assert read_rows(config, names[0]) == metrics


@pytest.mark.full
def test_checkpoint_of_other_settings(finished):
    config = dataclasses.replace(finished[0], seed=3, methods=("flora_momentum",))
    with pytest.raises(ConfigError, match="made with --seed 0, but this run has --se"):
        run(config)


@pytest.mark.full
def test_overwrite_starts_again(tiny, tmp_path):
    folder = tmp_path / "full_accumulation"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"update": 0, "loss": 1.0}\n')
    config = dataclasses.replace(
        tiny,
        output_dir=tmp_path,
        overwrite=True,
        methods=("full_accumulation",),
        stop_after=1,
    )
    run(config)
    assert [row["update"] for row in read_rows(config, "full_accumulation")] == [0, 1]


@pytest.mark.full
def test_sketched_gradients_train_the_same(finished, tiny, tmp_path):
    """To rounding, with the gradients that FLORA's accumulation gets as sketches."""
    names = ("sketched_accumulation", "flora_accumulation")
    config = dataclasses.replace(tiny, output_dir=tmp_path, methods=names[:1])
    run(config)
    rows = [
        read_rows(each, name)
        for each, name in zip((config, finished[0]), names, strict=True)
    ]
    for name in ("loss", "validation_loss"):
        found = [[row[name] for row in each if name in row] for each in rows]
        np.testing.assert_allclose(*found, rtol=2e-4)


@pytest.mark.full
def test_lora_trains_too(tiny, tmp_path):
    config = dataclasses.replace(tiny, output_dir=tmp_path, methods=("lora_momentum",))
    (row,) = run(config)
    assert row["trained_bytes"] > 0
    assert "matrix_bytes" not in row
    assert (
        row["validation_loss"]
        < read_rows(config, "lora_momentum")[0]["validation_loss"]
    )


@pytest.mark.full
def test_divergence_stops_the_run(tiny, tmp_path):
    config = dataclasses.replace(
        tiny,
        output_dir=tmp_path,
        learning_rate=1e30,
        warmup_fraction=0.0,
        methods=("full_momentum",),
    )
    message = r"Full momentum: the loss is (nan|inf) at update \d, .*lower"
    with pytest.raises(NonFiniteLossError, match=message):
        run(config)
    rows = read_rows(config, "full_momentum")
    assert all(np.isfinite(row.get("loss", 0)) for row in rows)


def test_nothing_to_compress(tiny, tmp_path):
    model = dataclasses.replace(tiny.model, width=64)
    config = dataclasses.replace(tiny, output_dir=tmp_path, model=model)
    with pytest.raises(ConfigError, match="`--ranks` 16 compresses no matrix of this"):
        run(config)


@pytest.mark.full
def test_mean_over_seeds(finished, tmp_path):
    """The same job twice: the error is 0."""
    config, rows = finished
    seeds.main(tmp_path, [config.output_dir] * 2)
    table = (tmp_path / "seeds.md").read_text().splitlines()
    assert len(table) == 2 + len(rows)
    assert all(line.endswith("± 0.000 |") for line in table[2:])
    lines = records.read_rows(tmp_path / "seeds.jsonl")
    assert [line["seed"] for line in lines] == [config.seed] * 2 * len(rows)
