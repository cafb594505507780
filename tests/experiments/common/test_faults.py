"""A training under faults: a disk that fills, and kills at any moment."""

import contextlib
import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.common import checkpoints, records
from experiments.common.checkpoints import Checkpoints
from experiments.common.command import execute
from experiments.main_job.run import run
from tests.common import process_environment
from tests.experiments.common.test_checkpoints import (
    IDENTITY,
    ROOT,
    assert_restores,
    make_state,
)
from tests.experiments.main_job.test_training import (
    read_rows,
    read_state,
    without_times,
)

pytestmark = pytest.mark.xdist_group("experiments")


# A limit on the size of files makes writes fail half-way, as a disk does that another
# process fills. In a process of its own: TensorStore goes on with the other arrays when
# Orbax has stopped to listen, and Python reports that at a time of its choosing.
FAILING_WRITES = """
import pathlib, resource, sys
from experiments.common.checkpoints import Checkpoints
from experiments.common.errors import DiskError
from tests.experiments.common.test_checkpoints import IDENTITY, make_state

unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
for folder in map(pathlib.Path, sys.argv[1:]):
    for size in (100, 5000):  # metadata fail, or the arrays
        for raises_at in ("save", "close"):
            kept = Checkpoints(folder, IDENTITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
            kept.save(11, make_state(11))
            try:
                if raises_at == "save":
                    kept.save(12, make_state(12))
                else:
                    kept.close()
            except DiskError as error:
                print(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            if raises_at == "save":
                kept.close()
"""


@pytest.mark.full
def test_write_that_fails_half_way(tmp_path):
    folder, empty = tmp_path / "checkpoints", tmp_path / "empty"
    with contextlib.closing(Checkpoints(folder, IDENTITY)) as kept:
        kept.save(10, make_state(10))
    process = subprocess.run(
        [sys.executable, "-c", FAILING_WRITES, folder, empty],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    middle = "the checkpoint of update 11 could not be written: File too large; make"
    whole = "the one of update 10 is whole, and resuming starts there"
    lines = process.stdout.splitlines()
    assert len(lines) == 8
    for line in lines:
        assert middle in line
        assert line.endswith(
            whole if str(folder) in line else "there is no earlier one"
        )
    assert "Save Finalize thread" not in process.stderr  # logged by Orbax, with a trace
    assert checkpoints.latest(empty) is None
    assert_restores(folder, 10)
    with contextlib.closing(Checkpoints(folder, IDENTITY)) as kept:
        kept.save(11, make_state(11))
    assert_restores(folder, 11)


@pytest.mark.full
def test_full_disk_stops_the_job(finished, tmp_path, monkeypatch, capsys):
    """The command says so in one line, and the last checkpoint is whole."""
    config = dataclasses.replace(
        finished[0], output_dir=tmp_path, methods=("flora_momentum",)
    )
    run(dataclasses.replace(config, stop_after=2))
    capsys.readouterr()
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: full)
        assert execute(config, "experiments.main_job.run") == 1
    assert re.fullmatch(
        r"error: .*flora_momentum-r16/checkpoints: the checkpoint of update 7 could "
        r"not be written: No space .*the one of update 2 is whole, .*\n",
        capsys.readouterr().err,
    )
    assert read_state(config, "flora_momentum")[0] == 2


@pytest.mark.full
def test_full_disk_elsewhere(tiny, monkeypatch, capsys):
    """The metrics, for example; what is no lack of room is not hidden."""
    for number, name in ((28, "No space left on device"), (13, "Permission denied")):

        def fail(config, number=number, name=name):
            raise OSError(number, name, "metrics.jsonl")

        monkeypatch.setattr("experiments.main_job.run.run", fail)
        if number == 13:
            with pytest.raises(PermissionError):
                execute(tiny, "experiments.main_job.run")
        else:
            assert execute(tiny, "experiments.main_job.run") == 1
            assert capsys.readouterr().err == (
                "error: [Errno 28] No space left on device: 'metrics.jsonl'; make "
                "room, then start again\n"
            )


KILLED_IN_A_WRITE = """
import dataclasses, os, pathlib, signal, sys
from experiments.main_job.run import run
from tests.experiments.job import TINY

def kill(event, arguments):
    if event == "open" and "/4.orbax-checkpoint-tmp/" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

output, data, corpus = map(pathlib.Path, sys.argv[1:])
sys.addaudithook(kill)
config = dataclasses.replace(TINY, output_dir=output, data_dir=data, corpus_dir=corpus)
run(dataclasses.replace(config, methods=("flora_momentum",), checkpoint_every=2))
"""


@pytest.mark.full
def test_killed_during_a_write(finished, tmp_path):
    """SIGKILL from inside the second checkpoint's write, then the rest."""
    config = dataclasses.replace(
        finished[0], output_dir=tmp_path, methods=("flora_momentum",)
    )
    process = subprocess.run(
        [sys.executable, "-c", KILLED_IN_A_WRITE, tmp_path, config.data_dir]
        + [config.corpus_dir],
        cwd=ROOT,
        env=process_environment(
            JAX_COMPILATION_CACHE_DIR=jax.config.values["jax_compilation_cache_dir"]
        ),
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL
    folder = tmp_path / "flora_momentum-r16" / "checkpoints"
    assert list(folder.glob("*.orbax-checkpoint-tmp"))
    assert checkpoints.latest(folder) == 2
    run(config)
    name = "flora_momentum"
    jax.tree.map(
        np.testing.assert_array_equal,
        read_state(config, name),
        read_state(finished[0], name),
    )
    rows = [without_times(read_rows(c, name)) for c in (config, finished[0])]
    assert rows[0] == rows[1]
    assert json.loads((tmp_path / "results.json").read_text())


KILLS = 20
LONG = (
    "--methods flora_accumulation flora_momentum --updates 150 --batch-size 4 "
    "--micro-batches 2 --ranks 16 --momentum 0.5 --resample-every 3 --eval-every 50 "
    "--eval-examples 6 --checkpoint-every 1 --model.layers 1 --model.width 128 "
    "--model.heads 2 --model.context 16 --model.vocab-size 300"
)


class Faults:
    """A training in a process of its own, that is killed and goes on."""

    def __init__(self, output, data, corpus, programs):
        self.output = output
        folders = ("--output-dir", output, "--data-dir", data, "--corpus-dir", corpus)
        self._command = [sys.executable, "-m", "experiments", *LONG.split()]
        self._command += map(str, folders)
        self._settings = {
            "cwd": ROOT,
            "stdout": subprocess.DEVNULL,
            "env": process_environment(JAX_COMPILATION_CACHE_DIR=str(programs)),
        }
        self.names = ("flora_accumulation-r16", "flora_momentum-r16")

    def folders(self):
        return [self.output / name / "checkpoints" for name in self.names]

    def finish(self):
        subprocess.run(self._command, **self._settings, check=True, timeout=600)

    def kill(self, delay, *, started):
        """Kills it after so many seconds of its life, or of its training.

        Returns:
            How many of the checkpoints' writes were cut off.
        """
        for folder in self.folders():  # what an earlier kill left
            for path in folder.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(path)
        before = [checkpoints.latest(folder) for folder in self.folders()]
        process = subprocess.Popen(self._command, **self._settings)
        deadline = time.monotonic() + 300
        while started and before == [checkpoints.latest(f) for f in self.folders()]:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(delay)
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        assert process.wait() == -signal.SIGKILL
        return sum(len(list(f.glob("*.orbax-checkpoint-tmp"))) for f in self.folders())

    def states(self):
        """Update, parameters and optimizer state of both runs, as saved."""
        for folder in self.folders():
            update = checkpoints.latest(folder)
            assert checkpoints.defect(folder / str(update)) is None
            with ocp.CheckpointManager(folder.absolute()) as manager:
                args = ocp.args.Composite(state=ocp.args.StandardRestore())
                yield update, manager.restore(update, args=args)["state"]

    def rows(self):
        for name in self.names:
            rows = records.read_rows(self.output / name / "metrics.jsonl")
            yield without_times(rows)


@pytest.mark.slow
def test_twenty_kills(sources, tmp_path):
    """SIGKILL at random moments, also of a write; every bit is as without them."""
    draw = random.Random(0)
    runs = [
        Faults(tmp_path / name, tmp_path / "data", sources, tmp_path / "programs")
        for name in ("whole", "killed")
    ]
    whole, killed = runs
    whole.finish()
    in_writes = 0
    for i in range(KILLS):
        # Every fourth falls anywhere in the first seconds, mostly before training.
        early = i % 4 == 0
        delay = draw.uniform(0, 8) if early else draw.uniform(0, 1)
        cut = killed.kill(delay, started=not early)
        in_writes += cut > 0
        reached = [checkpoints.latest(folder) for folder in killed.folders()]
        moment = "of its start" if early else "of its training"
        cut_off = f", {cut} write(s) cut off" * (cut > 0)
        print(f"kill {i + 1:2}: {delay:.2f} s {moment}, updates {reached}{cut_off}")
    assert in_writes >= 1
    killed.finish()
    for found, expected in zip(killed.states(), whole.states(), strict=True):
        assert expected[0] == 150
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert list(killed.rows()) == list(whole.rows())
    print(
        f"{KILLS} kills, {in_writes} of them during a checkpoint's write: parameters, "
        "optimizer states and metrics are those of the run without kills, bit for bit"
    )
