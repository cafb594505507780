"""Devices of every test, what the quick tier leaves out, tests that share programs."""

import collections
import importlib.metadata
import os
import pathlib

# Programs here run for microseconds and compile for seconds: unoptimized, that takes
# half as long. The last option is unknown to later versions.
flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if importlib.metadata.version("jaxlib") < "0.11":
    flags.append("--xla_cpu_use_fusion_emitters=false")
# Before jax starts.
os.environ.setdefault("XLA_FLAGS", " ".join(flags))
# XLA has a thread per core: with fewer than its devices want, a branch that gathers
# waits for threads that wait for it, for ever. With 8 for 8 devices it still did.
os.environ.setdefault("NPROC", "32")
# A decomposition on each device has threads of its own, which wait for one another:
# 15 s for a matrix of 64 x 96 on two cores in place of 0.07.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest  # noqa: E402

# Compiled programs stay in memory: beyond this a worker lets go of them.
LIMIT = 1_500 * 2**20


def group(item):
    """Tests of one case of the conformance suite share programs; else those of a file.

    In one worker: the other would compile the same again.
    """
    marked = item.get_closest_marker("xdist_group")
    if marked is not None:
        return marked.args[0]
    case = getattr(getattr(item, "callspec", None), "params", {}).get("case")
    return getattr(case, "name", str(item.path))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    seen = collections.Counter()
    for item in items:
        sample = item.get_closest_marker("sample")
        if sample is not None and item.get_closest_marker("full") is None:
            test = item.nodeid.split("[")[0]
            seen[test] += 1
            if seen[test] > sample.args[0]:
                item.add_marker(pytest.mark.full)
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group(item)))


def pytest_collection_finish(session):
    # With pytest 9.2, xdist 3.8 ignores the groups without a word: a third of the time.
    if getattr(session.config.option, "loadgroup", False):
        assert all("@" in item.nodeid for item in session.items), "xdist has no groups"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    result = yield
    if nextitem is None or group(nextitem) != group(item):
        let_go()
    return result


def let_go():
    """Clears the caches of a worker that holds much memory."""
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * 4096 > LIMIT:
        import gc

        from tests.common import clear_caches

        clear_caches()
        gc.collect()
