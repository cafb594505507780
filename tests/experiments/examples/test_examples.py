"""The examples: on one screen, by public names only, and they train."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import experiments.examples
from experiments.common import command

FOLDER = Path(experiments.examples.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def test_there_is_one_for_each_way():
    assert NAMES == ["chain", "equinox", "linen", "microbatch", "nnx"]


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name, capsys):
    importlib.import_module(f"experiments.examples.{name}").main()
    out = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)$", out, re.M)]
    assert losses[-1] < 0.5 * losses[0]
    if name != "microbatch":  # Its accumulator lives within a step.
        state = re.search(r"^state +\S+ \S+ +(\d+)%$", out, re.M)
        assert int(state[1]) <= 50


@pytest.mark.parametrize("error", [ModuleNotFoundError(name="jax"), KeyError("x")])
def test_other_errors_keep_their_traceback(error, capsys):
    command.explain_missing_package(type(error), error, None)
    assert type(error).__name__ in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_on_a_screen(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 55
    assert f"python -m experiments.examples.{name}\n" in text
    private = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("flora_jax")
    ]
    assert not private
