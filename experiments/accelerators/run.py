"""The compilers' account of an optimizer step on one chip."""

import collections

import jax
import jax.numpy as jnp

import flora_jax as fj
from experiments.accelerators import report
from experiments.accelerators.config import Config
from experiments.common import chips, records
from experiments.common.chips import CHIPS
from experiments.common.compiled import measure_missing
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
    axes = {
        "chip": config.chips,
        "problem": config.problems,
        "dtype": config.dtypes,
        "method": config.methods,
        "calls": config.calls,
        "rank": (config.rank,),
    }
    measure_missing(path, records.combinations(axes), measure)
    report.write(path)


def measure(case: records.Row) -> records.Row:
    """Compiles one step.

    Args:
        case: `chip`, `problem`, `dtype`, `method`, `calls` and `rank`.

    Returns:
        Bytes of the `parameters`, of the `arguments` (parameters, state and gradients)
        and of the `temporaries`; bytes that kernels move in every `step`, in the
        cheapest branch of each conditional, and `besides` in the most expensive ones;
        floating-point operations of the step's products by precision (`flops`); a lower
        bound on the `seconds` of the step: for each kernel those of its memory or those
        of its products; processor seconds of the `compilation`.
    """
    chip, problem, dtype = CHIPS[case["chip"]], case["problem"], case["dtype"]
    if problem == "leaf":
        shapes = {"kernel": jax.ShapeDtypeStruct((4096, 11008), jnp.dtype(dtype))}
    else:
        shapes = build.shapes(problem, dtype)
    sketch = fj.Sketch(case["rank"], mask=fj.not_embeddings)
    settings = Settings(sketch, micro_batches=16, estimator="nesterov")
    tx = METHODS[case["method"]].optimizer(1e-3, settings)
    one_call = case["calls"] == "one"
    compiled, seconds = chips.compile_on_one(chip, tx, shapes, one_call)
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
        "compilation": seconds,
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
