"""``python -m flora_jax plan``: what the state of a file's model would take."""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from flora_jax import optimizers
from flora_jax.memory import _model_files, _picture, _tables
from flora_jax.memory._budget import rank_for_budget
from flora_jax.memory._memory_plan import MemoryPlan, memory_plan
from flora_jax.transforms import compressed_accumulation

_RATE = 1e-3  # Any: it is not part of the state.
_SKETCHED = ("flora", "flora_adamw", "galore", "fira", "apollo", "dct_adamw")
_PLAIN = {"adafactor": optax.adafactor, "adamw": optax.adamw}
_EMBEDDING = re.compile(r"embed|wte|wpe|shared|lm_head")
_UNITS = {
    f"{prefix}{end}": base ** (i + 1)
    for end, base in (("iB", 1024), ("B", 1000))
    for i, prefix in enumerate("KMGT")
}


_DESCRIPTION = (
    "Prints what the optimizer's state takes for each parameter, and in all beside"
    " AdamW and Adafactor. Reads shapes alone, and allocates nothing."
)
_EPILOG = (
    "A budget is for the parameters, one set of gradients and the optimizer's state,"
    " all of them in one memory. Activations and temporaries come on top: leave room"
    " for them. Exit status: 0; 1 if the budget does not suffice; 2 for bad arguments."
)
_SHAPES = (
    "model.safetensors, model.safetensors.index.json, or a Hugging Face config.json of"
    " GPT-2, T5 or Llama"
)
_OPTIMIZER = "flora by default; adafactor and adamw with --accumulate"
_BUDGET = "for example 24GiB or 24GB; without --rank: the largest rank that fits"
_ACCUMULATE = "compressed accumulation of K micro-steps around the optimizer"
_DTYPE = "of parameters and gradients; the file's by default"
_EMBEDDINGS = "also leaves with embed, wte, wpe, shared or lm_head in their names"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: those after the program's name; None for the process' own.

    Returns:
      0, or 1 if a budget is given and does not suffice.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    plan_parser: argparse.ArgumentParser = given.parser
    if given.rank is None and given.budget is None:
        plan_parser.error("give --rank, or --budget for the largest rank that fits")
    if given.optimizer in _PLAIN and given.accumulate is None:
        plan_parser.error(
            f"--optimizer {given.optimizer} has no sketches of its own; give"
            " --accumulate for compressed accumulation around it"
        )
    if given.picture is not None:
        problem = _picture.problem(given.picture)
        if problem:
            plan_parser.error(f"--picture {given.picture}: {problem}")
    try:
        return _plan(given, _model_files.read_shapes(given.shapes, given.dtype))
    except _model_files.ModelFileError as error:
        plan_parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flora_jax",
        description="Optimizer state and gradient accumulation as sketches.",
    )
    commands = parser.add_subparsers(required=True, metavar="plan")
    plan = commands.add_parser(
        "plan",
        help="what an optimizer's state takes, and which rank fits",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    plan.set_defaults(parser=plan)
    add = plan.add_argument
    add("--shapes", required=True, metavar="FILE", help=_SHAPES)
    add("--optimizer", default="flora", choices=[*_SKETCHED, *_PLAIN], help=_OPTIMIZER)
    add("--rank", type=_positive, metavar="R", help="rank of every sketch")
    add("--budget", type=_bytes, metavar="SIZE", help=_BUDGET)
    add("--accumulate", type=_positive, metavar="K", help=_ACCUMULATE)
    add("--dtype", choices=["float32", "bfloat16", "float16"], help=_DTYPE)
    add("--sketch-embeddings", action="store_true", help=_EMBEDDINGS)
    add("--picture", metavar="PNG", help="where to draw bars of bytes")
    return parser


def _plan(given: argparse.Namespace, shapes: Any) -> int:
    make = functools.partial(_make, given)
    own = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    rank, left = given.rank, (given.budget or 0) - 2 * own
    if rank is None:
        try:
            if left <= 0:
                raise ValueError("parameters and gradients alone take more")
            rank = rank_for_budget(make, shapes, left)
        except ValueError as error:
            _say_budget(given.budget, 2 * own)
            print(f"no rank fits: {error}", file=sys.stderr)
            return 1
    plan = memory_plan(make(rank), shapes)
    plan.print()
    name = f"{given.optimizer}, rank {rank}"
    if given.accumulate is not None:
        name += f", accumulation of {given.accumulate}"
    numbers = sum(x.size for x in jax.tree.leaves(shapes))
    print(f"{given.shapes}: {len(shapes)} leaves, {numbers:,} numbers")
    print(f"{name}: {_sum(plan)}")
    print("Activations and temporaries come on top.")
    if not any(leaf.folds for leaf in plan.leaves):
        print(f"At rank {rank} nothing is sketched: this is the uncompressed state.")
    if given.picture is not None:
        _picture.draw(plan, name, given.picture)
        print(f"picture: {given.picture}")
    needed = 2 * plan.parameter_bytes + plan.state_bytes
    return 0 if given.budget is None else _say_budget(given.budget, needed)


def _sum(plan: MemoryPlan) -> str:
    own, state = plan.parameter_bytes, plan.state_bytes
    parts = [
        f"{_tables.format_bytes(size)} {name}"
        for name, size in (("parameters", own), ("gradients", own), ("state", state))
    ]
    return f"{' + '.join(parts)} = {_tables.format_bytes(2 * own + state)}"


def _say_budget(budget: int, needed: int) -> int:
    left = budget - needed
    word = "left" if left >= 0 else "missing"
    print(
        f"budget {_tables.format_bytes(budget)}: {_tables.format_bytes(abs(left))}"
        f" {word}"
    )
    return int(left < 0)


def _make(given: argparse.Namespace, rank: int) -> Any:
    """The transformation that the command line asks for."""

    def mask(path: str, shape: tuple[int, ...]) -> bool:
        del shape
        return given.sketch_embeddings or not _EMBEDDING.search(path)

    if given.optimizer in _PLAIN:
        inner = _PLAIN[given.optimizer](_RATE)
    else:
        factory: Callable[..., Any] = getattr(optimizers, given.optimizer)
        inner = factory(_RATE, rank, mask=mask)
    if given.accumulate is None:
        return inner
    return compressed_accumulation(inner, given.accumulate, rank, mask=mask)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text)
    size = float(match[1]) * _UNITS.get(match[2], 0) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"must be a number with one of {', '.join(_UNITS)}, for example 24GiB, got"
            f" {text!r}"
        )
    return int(size)
