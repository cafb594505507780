"""The compilers' account of an optimizer step on one chip."""

import collections
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.progress import track

import flora_jax as fj
from experiments.accelerators import report
from experiments.accelerators.config import OPTIMIZERS, Config
from experiments.common import chips, records
from experiments.common.chips import CHIPS, Chip
from experiments.common.methods import METHODS, Settings
from experiments.common.state_bytes import tree_bytes
from experiments.common.traffic import Kernel, kernels
from experiments.models import build


def run(config: Config) -> None:
    """Compiles the step of every optimizer, and writes table and picture.

    Raises:
        ConfigError: a chip's compiler is not installed.
    """
    path = config.output_dir / "steps.jsonl"
    rows = records.resume_rows(path)
    names = ("chip", "problem", "dtype", "optimizer")
    wanted = itertools.product(
        config.chips, config.problems, config.dtypes, config.optimizers
    )
    cases = [dict(zip(names, each, strict=True)) for each in wanted]
    cases = [case | {"rank": config.rank} for case in cases]
    done = [{name: row[name] for name in cases[0]} for row in rows]
    for case in track([x for x in cases if x not in done], "compiling"):
        chip = CHIPS[case["chip"]]
        _, name, options = OPTIMIZERS[case["optimizer"]]
        measured = measure(chip, name, options, parameters(case), config.rank)
        versions = records.versions() | chips.versions(chip.platform)
        records.append_row(path, case | measured | versions)
    report.write(path)


def parameters(case: records.Row) -> Any:
    """Returns the shapes of a problem's parameters."""
    if case["problem"] == "leaf":
        return {"kernel": jax.ShapeDtypeStruct((4096, 11008), jnp.dtype(case["dtype"]))}
    return build.shapes(case["problem"], case["dtype"])


def measure(
    chip: Chip, method: str, options: dict[str, Any], shapes: Any, rank: int
) -> records.Row:
    """Compiles update and apply, with parameters and state donated.

    Args:
        chip: what is compiled for.
        method: name in METHODS.
        options: further arguments of its recipe.
        shapes: of the parameters.
        rank: of the sketches.

    Returns:
        Bytes of the `parameters`, of the `arguments` (parameters, state and gradients)
        and of the `temporaries`; bytes that kernels move in every `step`, in the
        cheapest branch of each conditional, and `besides` in the most expensive ones;
        floating-point operations of the step's products by precision (`flops`); a lower
        bound on the `seconds` of the step: for each kernel those of its memory or those
        of its products; processor seconds of the `compilation`.
    """
    sketch = fj.Sketch(rank, mask=fj.not_embeddings)
    settings = Settings(sketch, micro_batches=16, estimator="nesterov", options=options)
    tx = METHODS[method].optimizer(1e-3, settings)
    device = chips.topology(chip.platform, chip.topology).devices[0]
    there = jax.sharding.SingleDeviceSharding(device)

    def place(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.update(sharding=there), tree)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = place(shapes), place(jax.eval_shape(tx.init, shapes))
    started = time.process_time()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    compiled = lowered.compile()
    seconds = time.process_time() - started
    always, besides = split(kernels(compiled.as_text()))
    memory = compiled.memory_analysis()
    return {
        "parameters": tree_bytes(shapes),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "step": _nbytes(always),
        "besides": besides,
        "flops": _flops(always),
        "seconds": sum(
            chip.seconds(each.nbytes, each.flops, each.precision) for each in always
        ),
        "compilation": round(seconds, 1),
    }


def split(found: list[Kernel]) -> tuple[list[Kernel], float]:
    """Splits kernels into what every step runs and what some steps run besides.

    Args:
        found: of one program.

    Returns:
        The kernels outside of conditionals and those of the branch of each conditional
        that moves least; how many bytes more the branches move that move most.
    """
    always, besides = [each for each in found if not each.conditional], 0.0
    for name in {each.conditional for each in found} - {""}:
        branches = collections.defaultdict(list)
        for each in found:
            if each.conditional == name:
                branches[each.branch].append(each)
        ordered = sorted(branches.values(), key=_nbytes)
        always += ordered[0]
        besides += _nbytes(ordered[-1]) - _nbytes(ordered[0])
    return always, besides


def _nbytes(found: list[Kernel]) -> float:
    return sum(each.nbytes for each in found)


def _flops(found: list[Kernel]) -> dict[str, float]:
    total: dict[str, float] = collections.Counter()
    for each in found:
        if each.flops:
            total[each.precision] += each.flops
    return dict(total)
