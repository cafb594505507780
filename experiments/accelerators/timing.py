"""Steps executed on the attached device, and what the compilers had said of them."""

import concurrent.futures
import multiprocessing
import pathlib

import jax
import jax.numpy as jnp
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
            row = pool.submit(measure, case, config.rounds).result()
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
        compiler expects.
    """
    tx, shapes = optimizer_and_shapes(case)

    def step(params: object, state: object, grads: object) -> tuple[object, object]:
        return fj.update_and_apply(tx, grads, state, params)

    @jax.jit
    def normal(key: jax.Array) -> object:
        return jax.tree.map(
            lambda x: jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype),
            shapes,
        )

    params, grads = map(normal, jax.random.split(jax.random.key(0)))
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
    """Writes the table (.md): what was measured, and the committed account beside it.

    Its lower bound on the time is of every step, and so is the median.
    """
    fields = ("chip", "problem", "dtype", "method", "calls", "rank")
    compiled = {
        tuple(row[x] for x in fields): row for row in records.read_rows(COMPILED)
    }
    rows = records.read_rows(path)

    def expected(row: Row) -> Row | None:
        return compiled.get(tuple(row[x] for x in fields))

    def bound(row: Row) -> str | None:
        found = expected(row)
        return found and f"{1e3 * found['seconds']:.2f}"

    def held(row: Row) -> str | None:
        found = expected(row)
        return found and report.megabytes(found["arguments"] + found["temporaries"], 0)

    def measured(row: Row, field: str) -> str | None:
        return row[field] and report.megabytes(row[field], 0)

    columns = {
        "device": lambda row: row["machine"]["device"],
        "type": lambda row: row["dtype"],
        "optimizer": lambda row: METHODS[row["method"]].title,
        "step, ms": lambda row: f"{row['milliseconds']:.2f}",
        "quartiles": lambda row: "{:.2f} to {:.2f}".format(*row["quartiles"]),
        "time bound by the compiler of the chip": bound,
        "peak, MB": lambda row: measured(row, "peak_bytes"),
        "by the device's own compiler": lambda row: measured(row, "compiled_bytes"),
        "by the compiler of the chip": held,
    }
    path.with_suffix(".md").write_text(report.markdown(columns, rows))
