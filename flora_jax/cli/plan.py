"""``python -m flora_jax plan``: what the state of a file's model would take."""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import optax

from flora_jax import optimizers
from flora_jax.cli import model_files as _model_files
from flora_jax.cli import picture as _picture
from flora_jax.memory import tables as _tables
from flora_jax.memory.budget import array_bytes, rank_for_budget
from flora_jax.memory.planner import MemoryPlan, default_peers, memory_plan
from flora_jax.transforms import compressed_accumulation

_RATE = 1e-3  # Any: it is not part of the state.
_SKETCHED = (
    "flora",
    "flora_adamw",
    "galore",
    "fira",
    "apollo",
    "apollo_mini",
    "dct_adamw",
)
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


class _Parser(argparse.ArgumentParser):
    """One that tells an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


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
        shapes = _model_files.read_shapes(given.shapes, given.dtype)
    except _model_files.ModelFileError as error:
        plan_parser.error(str(error))
    return _plan(given, shapes)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
    rank = given.rank or _largest_rank(make, shapes, given.budget)
    plan = memory_plan(make(rank), shapes, compare=_peers(given, rank))
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
    print(f"In a script:\n{_script(given, rank)}")
    if given.picture is not None:
        try:
            _picture.draw(plan, name, given.picture, given.budget)
        except OSError as error:
            given.parser.error(f"--picture {given.picture}: {error.strerror}")
        print(f"picture: {given.picture}")
    return 0 if given.budget is None else _say_budget(given, plan)


def _largest_rank(make: Callable[[int], Any], shapes: Any, budget: int) -> int:
    own = sum(map(array_bytes, shapes.values()))
    try:
        return rank_for_budget(make, shapes, max(budget - 2 * own, 1))
    except ValueError:  # No rank fits, or nothing is sketched: the plan shows which.
        return 1


def _peers(given: argparse.Namespace, rank: int) -> dict[str, Any]:
    """Those by default; with accumulation MultiSteps around the same optimizer."""
    peers = default_peers()
    if given.accumulate is not None:
        inner = optax.MultiSteps(_inner(given, rank), given.accumulate)
        name = f"optax.MultiSteps({given.optimizer})"
        peers[name] = inner.gradient_transformation()
    return peers


def _sum(plan: MemoryPlan) -> str:
    own, state = plan.parameter_bytes, plan.state_bytes
    parts = [
        f"{_tables.format_bytes(size)} {name}"
        for name, size in (("parameters", own), ("gradients", own), ("state", state))
    ]
    return f"{' + '.join(parts)} = {_tables.format_bytes(2 * own + state)}"


def _say_budget(given: argparse.Namespace, plan: MemoryPlan) -> int:
    left = given.budget - 2 * plan.parameter_bytes - plan.state_bytes
    word = "left" if left >= 0 else "missing"
    size, rest = map(_tables.format_bytes, (given.budget, abs(left)))
    print(f"budget {size}: {rest} {word}")
    if left < 0 and given.rank is None:
        print("no rank fits: rank 1 is shown", file=sys.stderr)
    return int(left < 0)


def _make(given: argparse.Namespace, rank: int) -> Any:
    """The transformation that the command line asks for; :func:`_script` writes it."""
    inner = _inner(given, rank)
    if given.accumulate is None:
        return inner
    return compressed_accumulation(inner, given.accumulate, rank, mask=_mask(given))


def _inner(given: argparse.Namespace, rank: int) -> Any:
    if given.optimizer in _PLAIN:
        return _PLAIN[given.optimizer](_RATE)
    factory: Callable[..., Any] = getattr(optimizers, given.optimizer)
    return factory(_RATE, rank, mask=_mask(given))


def _mask(given: argparse.Namespace) -> Any:
    if given.sketch_embeddings:
        return None
    return lambda path, shape: not _EMBEDDING.search(path)


def _script(given: argparse.Namespace, rank: int) -> str:
    """The lines that make the same transformation in Python."""
    lines, settings = [], f"rank={rank}"
    if not given.sketch_embeddings:
        lines.append(f'embedding = re.compile("{_EMBEDDING.pattern}")')
        lines.append("mask = lambda path, shape: not embedding.search(path)")
        settings += ", mask=mask"
    if given.optimizer in _PLAIN:
        made = f"optax.{given.optimizer}(learning_rate)"
    else:
        made = f"fj.{given.optimizer}(learning_rate, {settings})"
    if given.accumulate is not None:
        count = f"every_k={given.accumulate}"
        made = f"fj.compressed_accumulation({made}, {count}, {settings})"
    return "\n".join(f"  {line}" for line in [*lines, f"tx = {made}"])


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text)
    size = float(match[1]) * _UNITS.get(match[2], 0) if match else 0
    if not 1 <= size < math.inf:
        raise argparse.ArgumentTypeError(
            f"must be a number with one of {', '.join(_UNITS)}, for example 24GiB, got"
            f" {text!r}"
        )
    return int(size)
