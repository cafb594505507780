"""Two processes train what one process does; and what a restored state must say."""

import contextlib
import dataclasses
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

import flora_jax as fj
from experiments.common import checkpoints, devices, processes, records
from experiments.common.config import Run
from experiments.common.errors import ConfigError
from experiments.common.methods import Method
from experiments.common.problem import build
from experiments.main_job.run import prepare, run
from tests.common import process_environment

pytestmark = pytest.mark.xdist_group("experiments")

ROOT = pathlib.Path(__file__).parents[3]
METHOD = "flora_accumulation"
SECONDS = 240
"""For one pair of processes on a busy machine; alone they need a tenth of it."""


@pytest.fixture(scope="module")
def job(tiny):
    """Seven updates of two micro-batches of four: one example for each of 4 devices."""
    return dataclasses.replace(
        tiny, methods=(METHOD,), batch_size=8, eval_examples=8, checkpoint_every=3
    )


def arguments(config):
    """The command line of such a job."""
    fields = dataclasses.asdict(config)
    fields |= {f"model.{name}": value for name, value in fields.pop("model").items()}
    chosen = (
        "methods updates batch_size micro_batches ranks momentum estimator "
        "resample_every "
        "eval_every eval_examples checkpoint_every output_dir data_dir corpus_dir "
        "model.layers model.width model.heads model.context model.vocab_size"
    )
    words = []
    for name in chosen.split():
        value = fields[name]
        words += [f"--{name.replace('_', '-')}"]
        words += map(str, value if isinstance(value, tuple) else (value,))
    return words


def environment(**variables):
    """That of a process with two CPU devices."""
    return process_environment(
        JAX_PLATFORMS="cpu",
        JAX_NUM_CPU_DEVICES="2",
        JAX_COMPILATION_CACHE_DIR=jax.config.values["jax_compilation_cache_dir"],
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        PYTHONUNBUFFERED="1",
        **variables,
    )


# `python -m`, but tensorboardX does not find torch, which takes two seconds to load.
_RUN = """
import runpy, sys

class Hidden:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


class Pair:
    """Two processes of one command, which do not outlive a `with`."""

    def __init__(self, module, words, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs = [folder / f"process_{i}.log" for i in range(2)]
        self.processes = []
        for i, log in enumerate(self.logs):
            variables = environment(
                JAX_COORDINATOR_ADDRESS=address,
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(i),
            )
            with log.open("w") as out:
                process = subprocess.Popen(
                    [sys.executable, "-c", _RUN, module, *words],
                    env=variables,
                    cwd=ROOT,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)
        self.deadline = time.monotonic() + SECONDS

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.wait()

    def until(self, happened):
        """Waits for something while both are running."""
        while not happened():
            assert [p.poll() for p in self.processes] == [None, None], self.said()
            assert time.monotonic() < self.deadline, self.said()
            time.sleep(0.005)

    def end(self):
        """Waits for both to end; returns their exit statuses."""
        left = [max(0.0, self.deadline - time.monotonic()) for _ in self.processes]
        return [p.wait(s) for p, s in zip(self.processes, left, strict=True)]

    def said(self):
        """What each wrote, without the lines of the transport."""
        texts = [log.read_text(errors="replace") for log in self.logs]
        return [re.sub(r".*(\[Gloo\]|Expected number).*\n", "", text) for text in texts]


def read_state(config):
    """The parameters and optimizer state of the last checkpoint."""
    data, own = prepare(config), Run(config, METHOD, config.ranks[0])
    state = build(config, data, METHOD, own.rank)[1]
    identity = own.identity | {"the data": data.fingerprint}
    kept = checkpoints.Checkpoints(own.folder / "checkpoints", identity)
    with contextlib.closing(kept):
        return kept.restore(state)


def assert_same_training(pair, one):
    """Checks losses and last states of two runs that sum in different orders."""
    (file,) = pair.output_dir.rglob("metrics.jsonl")
    rows = records.read_rows(file)
    assert [row["update"] for row in rows] == list(range(pair.updates + 1))
    expected = records.read_rows(one.output_dir / f"{METHOD}-r16" / "metrics.jsonl")
    for name in ("loss", "validation_loss"):
        got = [row.get(name, 0) for row in rows]
        want = [row.get(name, 0) for row in expected]
        assert got == pytest.approx(want, rel=1e-5)
    (update, state), (_, other) = read_state(pair), read_state(one)
    assert update == pair.updates
    for (path, got), want in zip(
        jax.tree_util.tree_flatten_with_path(state)[0],
        jax.tree.leaves(other),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        if name.endswith("['c_attn']['bias']"):
            # A part of it moves all keys alike, which softmax does not see: its
            # gradient is rounding, and Adafactor makes full steps of that.
            continue
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        largest = np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * largest, err_msg=name)


@pytest.mark.full
def test_two_processes_train_what_one_does(job, tmp_path, monkeypatch):
    """They are killed after a checkpoint, too, and go on from it."""
    pair = dataclasses.replace(job, output_dir=tmp_path / "pair")
    saved = pair.output_dir / f"{METHOD}-r16" / "checkpoints"
    with Pair("experiments", arguments(pair), tmp_path) as two:
        two.until(lambda: checkpoints.latest(saved) is not None)
        for process in two.processes:
            process.kill()
        assert two.end() == [-signal.SIGKILL] * 2
    assert checkpoints.latest(saved) < job.updates
    with Pair("experiments", arguments(pair), tmp_path) as two:
        assert two.end() == [0, 0], two.said()
        first, second = two.said()
    assert "Wall time" in first
    assert second == ""  # Only the first one speaks,
    assert len(list(pair.output_dir.rglob("events.*"))) == 2  # and writes: two starts.

    one = dataclasses.replace(job, output_dir=tmp_path / "one")
    four = jax.sharding.Mesh(jax.devices()[:4], ("data",))
    with monkeypatch.context() as patch:
        patch.setattr(devices, "mesh", lambda: four)
        run(one)
    assert_same_training(pair, one)


def test_a_batch_keeps_its_order_on_any_number_of_devices(monkeypatch):
    batch = {"x": np.arange(24).reshape(8, 3)}
    for count, rows in ((1, 8), (4, 2), (8, 1), (3, 8)):
        mesh = jax.sharding.Mesh(jax.devices()[:count], ("data",))
        monkeypatch.setattr(devices, "mesh", lambda mesh=mesh: mesh)
        placed = devices.split(batch)["x"]
        np.testing.assert_array_equal(placed, batch["x"])
        assert {shard.data.shape for shard in placed.addressable_shards} == {(rows, 3)}


@pytest.mark.full
@pytest.mark.parametrize("name", ["flora_accumulation", "flora_momentum"])
def test_state_of_another_optimizer_is_refused(finished, name, monkeypatch):
    """Though every setting that has a flag agrees."""
    real = Method.optimizer

    def other(method, rate, settings):
        sketch = dataclasses.replace(settings.sketch, projection=fj.Rademacher())
        return real(method, rate, dataclasses.replace(settings, sketch=sketch))

    monkeypatch.setattr(Method, "optimizer", other)
    config = dataclasses.replace(finished[0], methods=(name,))
    found = r"projection CountSketch\(.*\) in the state, Rademacher\(.*\) in tx"
    with pytest.raises(
        ConfigError, match=f"checkpoint of another optimizer: .*{found}"
    ):
        run(config)


def test_processes_that_disagree(monkeypatch):
    processes.check_same("the corpus", "v300")
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda x: np.array([x, x, x ^ 1, x, 7])
    )
    with pytest.raises(ConfigError, match=r"agree on the corpus: .*0's in 2, 4; give"):
        processes.check_same("the corpus", "v300")


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_environment_that_makes_no_sense(name):
    variables = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", name: "two"}
    with pytest.raises(
        ConfigError, match=f"`{name}` must be a whole number, got 'two'"
    ):
        processes.join(variables)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "Number of processes must be defined"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "Got process_id=2, num_processes=2",
        ),
    ],
)
def test_environment_that_says_too_little(variables, message):
    code = "from experiments.__main__ import main; raise SystemExit(main([]))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(JAX_COORDINATOR_ADDRESS="127.0.0.1:1", **variables),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert found.returncode == 2
    assert found.stderr.startswith("error: `JAX_COORDINATOR_ADDRESS` is 127.0.0.1:1")
    assert message in found.stderr


def test_only_one_process_writes_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records.MetricsFile(path, keep_until=-1).append({"update": 1})
    text = path.read_text()
    silent = records.MetricsFile(path, keep_until=1, write=False)
    silent.append({"update": 2})
    assert silent.rows == [{"update": 1}, {"update": 2}]
    assert path.read_text() == text
