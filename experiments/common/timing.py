"""Timed steps that take turns, and the machine that they ran on."""

import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

# Rounds before those that are timed.
UNTIMED = 2


class Program:
    """A step, compiled, and the state that it goes on with."""

    def __init__(self, step: Callable[..., Any], params: Any, state: Any, given: Any):
        """Compiles the step.

        Args:
            step: from parameters, state and what is given to new parameters and state,
                in this order: JAX gives a donated argument to the first result of its
                shape, and would otherwise copy.
            params: the parameters, or their shapes.
            state: the state, or its shapes.
            given: what does not change: a batch, or gradients.
        """
        self.state = state
        self.seconds: list[float] = []
        started = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, given)
        traced = time.perf_counter()
        self.compiled = lowered.compile()
        self.trace_seconds = traced - started
        self.compile_seconds = time.perf_counter() - traced

    def run(self, params: Any, given: Any) -> tuple[Any, float]:
        """Takes one step; returns the new parameters, and the seconds it took.

        `seconds` keeps those of all steps.
        """
        jax.block_until_ready((params, self.state))
        started = time.perf_counter()
        params, self.state = self.compiled(params, self.state, given)
        jax.block_until_ready((params, self.state))
        self.seconds.append(time.perf_counter() - started)
        return params, self.seconds[-1]


def median_and_quartiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Returns both in milliseconds; those of a single time are that time."""
    alone = len(seconds) == 1
    quartiles = [*seconds] * 3 if alone else statistics.quantiles(seconds, n=4)
    return {
        "milliseconds": 1e3 * statistics.median(seconds),
        "quartiles": [1e3 * quartiles[0], 1e3 * quartiles[2]],
    }


def machine() -> dict[str, Any]:
    """Describes the machine."""
    device = jax.devices()[0]
    found = {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if "model name" in x]
        found["processor"] = lines[0].split(":")[1].strip() if lines else "unknown"
    return found


def machine_title(found: dict[str, Any]) -> str:
    """Returns a line about a machine, for a picture."""
    return f"{found.get('processor', found['device'])}, {found['cores']} cores"
