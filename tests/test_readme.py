"""The README's program for many devices, as it stands there."""

import pathlib
import re

import jax
import numpy as np

from tests.conformance.states import own_trees

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_many_devices(monkeypatch, tmp_path):
    section = README.read_text().split("\n## Many devices\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)  # noqa: S102
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
