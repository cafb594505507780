"""Runs the benchmark and writes what it found."""

import json
import os
import pathlib
import platform
from typing import Any

import jax
from rich.console import Console

from experiments.main_job.run import versions
from experiments.step_time import contenders, measure, plot, table
from experiments.step_time.config import BenchmarkConfig


def machine() -> dict[str, Any]:
    """Describes the machine and the packages."""
    device = jax.devices()[0]
    found = {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": versions(),
    }
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if "model name" in x]
        found["processor"] = lines[0].split(":")[1].strip() if lines else "unknown"
    return found


def run(config: BenchmarkConfig) -> None:
    """Times every contender; the JSON file is written after each tree."""
    console = Console()
    config.output_dir.mkdir(parents=True, exist_ok=True)
    path = config.output_dir / "benchmark.json"
    result: dict[str, Any] = {"machine": machine(), "steps": []}
    with console.status("") as status:
        for i, (tree, dtype) in enumerate(
            (tree, dtype) for tree in config.trees for dtype in config.dtypes
        ):
            ranks = config.other_ranks if i else config.ranks
            result["steps"] += measure.time_all(
                tree, dtype, ranks, config.rounds, status.update, config.contenders
            )
            path.write_text(json.dumps(result, indent=1) + "\n")
        if config.compile_tree is not None:
            status.update(f"compile times on {config.compile_tree}")
            result["compile"] = measure.compile_times(
                config.compile_tree, contenders.compiled_only()
            )
    path.write_text(json.dumps(result, indent=1) + "\n")
    if config.contenders == "family":
        path.with_suffix(".md").write_text(table.of_family(result["steps"]))
    plot.draw(result, config.output_dir / "benchmark.png")
    _print(result, console)
    console.print(f"Table and picture are in {config.output_dir}")


def _print(result: dict[str, Any], console: Console) -> None:
    for row in result["steps"]:
        console.print(
            f"{row['tree']:13} {row['dtype']:9} {row['kind']:11} {row['name']:40}"
            f" {row['rank'] or '':>4} {row['milliseconds']:8.1f} ms"
            f" {row['over_adam']:6.2f} of adam {row['over_floor']:6.1f} of the floor"
            f" {row['compile_seconds']:6.1f} s to compile",
            highlight=False,
        )
    for row in result.get("compile", ()):
        console.print(
            f"{row['tree']}: {row['name']} traced in {row['trace_seconds']:.1f} s,"
            f" compiled in {row['compile_seconds']:.1f} s",
            highlight=False,
        )
