"""Packages of the extra: which keep tests from running, and what their lack says."""

import pathlib
import subprocess
import sys

import pytest

from tests.experiments import PACKAGES

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_of_the_extra_is_installed(package):
    pytest.importorskip(package)


@pytest.mark.parametrize(
    ("package", "module"),
    [("tyro", "experiments"), ("equinox", "experiments.examples.equinox")],
)
def test_a_package_that_is_not_installed_is_one_line(package, module):
    code = (
        f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = ['-m']\n"
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 2
    assert found.stderr == (
        f"error: experiments needs {package}: pip install -e '.[experiments]'\n"
    )
