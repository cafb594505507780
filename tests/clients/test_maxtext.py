"""MaxText's own training loop, scanned layers, FSDP over eight devices.

Each run is a process: MaxText keeps its settings in globals.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.clients.common import MOMENTS, TRANSFORMATIONS

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "trainers.md"
every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


@functools.cache
def run(*arguments):
    command = [sys.executable, "-m", "tests.clients.maxtext_run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@every_transformation
def test_eight_devices_train_as_one_does(name):
    one, eight = run(name, "--devices", "1"), run(name)
    assert eight["losses"][-1] < eight["losses"][0]
    np.testing.assert_allclose(one["losses"], eight["losses"], rtol=1e-3)


@pytest.mark.parametrize("name", MOMENTS)
def test_a_device_holds_its_share(name):
    found = run(name)
    kernels, bases = found["bytes"]
    print(f"{name}: {kernels} and {bases} bytes, r/width {found['width_bytes']}")
    assert kernels <= 1.15 * MOMENTS[name] * found["width_bytes"]
    assert bases <= 1.15 * found["width_bytes"]


# Not flora's: MaxText's numbers leave embeddings dense, whose second moment it factors.
@pytest.mark.parametrize("name", ["flora_adamw", "galore"])
def test_metadata_folds_as_maxtext_says(name):
    ours, theirs = run(name, "--folds", "metadata"), run(name)
    folds = {path: fold[:2] for path, fold in ours["folds"].items()}
    assert folds == {path: fold[:2] for path, fold in theirs["folds"].items()}
    assert ours["losses"] == theirs["losses"]


def test_a_fold_that_would_merge_layers_is_refused():
    command = ["flora", "--folds", "none"]
    command = [sys.executable, "-m", "tests.clients.maxtext_run", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "is stacked along axis 1 by its metadata" in done.stderr


@every_transformation
def test_a_resumed_run_equals_the_unbroken_one(name, tmp_path):
    whole = run(name, "--folder", str(tmp_path / "whole"))
    broken = str(tmp_path / "broken")
    run(name, "--folder", broken, "--steps", "2")
    rest = run(name, "--folder", broken, "--steps", "4")
    assert rest["losses"] == whole["losses"][-len(rest["losses"]) :]
    assert 0 < len(rest["losses"]) < 4
    assert rest["bits"] == whole["bits"]


def test_the_script_of_the_documentation(tmp_path):
    """docs/trainers.md, followed to the letter, with MaxText's own arguments."""
    text = DOCUMENT.read_text().split("## MaxText")[1]
    script = tmp_path / "train.py"
    script.write_text(text.split("```py\n")[1].split("```")[0])
    command = text.split("```bash\n")[1].split("```")[0].strip()
    metrics = tmp_path / "metrics.jsonl"
    settings = {
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "base_output_directory": tmp_path,
        "enable_checkpointing": False,
        "dataset_type": "synthetic",
        "attention": "dot_product",
        "metrics_file": metrics,
        "steps": 3,
        "base_emb_dim": 512,
        "base_mlp_dim": 1024,
        "base_num_query_heads": 8,
        "base_num_kv_heads": 8,
        "head_dim": 64,
        "base_num_decoder_layers": 2,
        "vocab_size": 256,
        "per_device_batch_size": 1,
        "max_target_length": 32,
    }
    given = [f"{name}={value}" for name, value in settings.items()]
    folders = [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    done = subprocess.run(
        " ".join([command, *given]),
        shell=True,
        cwd=tmp_path,
        env=os.environ | {"PATH": os.pathsep.join(folders), "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(metrics.read_text().splitlines()) == 3


def test_bfloat16_parameters():
    found = run("flora_adamw", "weight_dtype=bfloat16")
    assert found["losses"][-1] < found["losses"][0]
