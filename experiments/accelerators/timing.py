"""Steps executed on the attached device, compared with the compilers' estimates."""

import concurrent.futures
import multiprocessing
import pathlib

import jax
import numpy as np
from rich.progress import track

import flora_jax as fj
from experiments.accelerators.config import Timed
from experiments.accelerators.run import optimizer_and_shapes
from experiments.common import records, report, timing
from experiments.common.methods import METHODS
from experiments.common.records import Row

COMPILED = pathlib.Path(__file__).parent / "results" / "steps.jsonl"


def run(config: Timed) -> None:
    """Executes the step of every optimizer, and writes a table."""
    path = config.output_dir / "timed.jsonl"
    axes = {
        "chip": (config.chip,),
        "problem": ("leaf",),
        "dtype": config.dtypes,
        "method": config.methods,
        "calls": ("one",),
        "rank": (config.rank,),
    }
    missing = records.not_measured(
        records.resume_rows(path), records.combinations(axes)
    )
    # Each in a process of its own: a device tells the most that a process has held.
    spawning = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, spawning, max_tasks_per_child=1
    ) as pool:
        for case in track(missing, "executing"):
            try:
                row = pool.submit(measure, case, config.rounds).result()
            except jax.errors.JaxRuntimeError as error:  # Such as a lack of memory.
                row = {"failed": str(error)}
            records.append_row(path, case | row | records.versions())
    write(path)
    print(path.with_suffix(".md").read_text(), end="")


def measure(case: Row, rounds: int) -> Row:
    """Executes one optimizer's step on the attached device.

    Args:
        case: see `run.measure`.
        rounds: number of timed steps.

    Returns:
        The machine; median and quartiles of the step in `milliseconds`; `peak_bytes` of
        the device, None where it does not tell, and the `compiled_bytes` that its
        compiler estimates.
    """
    tx, shapes = optimizer_and_shapes(case)

    def step(params: object, state: object, grads: object) -> tuple[object, object]:
        return fj.update_and_apply(tx, grads, state, params)

    # Made on the host: the device's peak is that of the steps.
    rng = np.random.default_rng(0)
    params, grads = (
        jax.tree.map(
            lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype)), shapes
        )
        for _ in range(2)
    )
    program = timing.Program(step, params, jax.jit(tx.init)(params), grads)
    for _ in range(timing.UNTIMED + rounds):
        params, _ = program.run(params, grads)
    memory = program.compiled.memory_analysis()
    statistics = jax.devices()[0].memory_stats() or {}
    return {
        "machine": timing.machine(),
        **timing.median_and_quartiles(program.seconds[timing.UNTIMED :]),
        "peak_bytes": statistics.get("peak_bytes_in_use"),
        "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }


def write(path: pathlib.Path) -> None:
    """Writes the table (.md), with the committed estimates of the chip's compiler.

    The roofline time is that of a step that renews nothing, as the median is.
    """
    fields = ("chip", "problem", "dtype", "method", "calls", "rank")
    compiled = {
        tuple(row[x] for x in fields): row for row in records.read_rows(COMPILED)
    }
    rows = records.read_rows(path)

    def estimate(row: Row, *names: str) -> float | None:
        found = compiled.get(tuple(row[x] for x in fields))
        return found and sum(found[name] for name in names)

    def cell(number: float | None, form: str, scale: float) -> str | None:
        return None if number is None else format(scale * number, form)

    columns = {
        "device": lambda row: row.get("machine", {}).get("device"),
        "type": lambda row: row["dtype"],
        "optimizer": lambda row: METHODS[row["method"]].title,
        "step, ms": lambda row: cell(row.get("milliseconds"), ".2f", 1),
        "quartiles": lambda row: (
            "{:.2f} to {:.2f}".format(*row["quartiles"]) if "quartiles" in row else None
        ),
        "roofline, ms": lambda row: cell(estimate(row, "seconds"), ".2f", 1e3),
        "peak, MB": lambda row: cell(row.get("peak_bytes"), ".0f", 1e-6),
        "estimate of the device's compiler": lambda row: cell(
            row.get("compiled_bytes"), ".0f", 1e-6
        ),
        "of the chip's": lambda row: cell(
            estimate(row, "arguments", "temporaries"), ".0f", 1e-6
        ),
        "failed": lambda row: row.get("failed", "").partition("\n")[0] or None,
    }
    path.with_suffix(".md").write_text(report.markdown(columns, rows))
