"""The corpus of the tiny job, and the job itself, run once for all tests here."""

import dataclasses
import importlib.util
import pathlib

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.experiments import PACKAGES

if any(importlib.util.find_spec(package) is None for package in PACKAGES):
    # test_extra.py stays, and says what is missing.
    here = pathlib.Path(__file__).parent
    collect_ignore = [
        str(file.relative_to(here))
        for file in here.rglob("*.py")
        if file.name != "test_extra.py"
    ]


@pytest.fixture(scope="package", autouse=True)
def _executables(tmp_path_factory):
    """Compiles each step once; many runs of these tests share theirs."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("executables")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in options}
    for settings in (options, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it reads the settings only once
        if settings is options:
            yield


@pytest.fixture(autouse=True, scope="package")
def _one_device():
    """Not all eight: they share the cores, and would all do the same work."""
    from experiments.common import devices

    one = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "mesh", lambda: one)
        yield


@pytest.fixture(scope="package")
def sources(tmp_path_factory):
    """A corpus whose split never changes, since its content does not."""
    from tests.experiments.job import SOURCE

    folder = tmp_path_factory.mktemp("sources")
    for i in range(80):
        text = SOURCE.format(i=i) * (1 + i % 3)
        (folder / f"module_{i}.py").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="package")
def tiny(tmp_path_factory, sources):
    """The configuration of the tiny job."""
    from tests.experiments.job import TINY

    return dataclasses.replace(
        TINY, corpus_dir=sources, data_dir=tmp_path_factory.mktemp("data")
    )


@pytest.fixture(scope="package")
def finished(tmp_path_factory, tiny):
    """The tiny job, uninterrupted: its configuration and its summaries."""
    from experiments.main_job.run import run

    folder = tmp_path_factory.mktemp("finished")
    config = dataclasses.replace(tiny, output_dir=folder)
    return config, run(config)
