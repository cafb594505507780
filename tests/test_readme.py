"""The README's program and output, and the program of docs/distributed.md."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.conformance.states import own_trees

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize("marker", ["main job", "tests"])
def test_commands_are_one_line(marker):
    """CI runs the line that follows the marker and the opening of a block."""
    found = re.findall(rf"^<!-- {marker} -->\n```sh\n(.+)\n```$", README, re.M)
    assert len(found) == 1


def test_the_example_prints_what_the_readme_says(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (printed,) = re.findall(r"```text\n(.*?)```", README, re.S)
    exec(compile(program, "README.md", "exec"), {})  # noqa: S102
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        line.rstrip() for line in printed.splitlines()
    ]


@pytest.mark.full
def test_many_devices(monkeypatch, tmp_path):
    page = ROOT / "docs" / "distributed.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert len(blocks) == 3
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    names = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)  # noqa: S102
    loss, x, y = (names[name] for name in ("loss", "x", "y"))
    start = float(loss(names["create"](), x, y))
    assert float(loss(names["params"], x, y)) < 0.9 * start
    assert float(loss(names["params2"], x, y)) < 0.9 * start
    assert len(names["batch"][0].sharding.device_set) == 8
    # Restored on four devices, two by two.
    momentum = dict(own_trees(names["state"]))["CompressedMomentumState.momentum"]["up"]
    assert len(momentum.sharding.device_set) == 4
    assert momentum.sharding.spec == jax.P("data", "model")
    assert np.any(momentum)
