"""``python -m flora_jax plan``: the optimizer state of a model, from its file."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax

from flora_jax import optimizers
from flora_jax.cli import model_files, picture
from flora_jax.leaves.rules import not_embeddings
from flora_jax.memory.budget import rank_for_budget, tree_bytes
from flora_jax.memory.planner import default_peers, format_bytes, memory_plan
from flora_jax.sketching.sketch import Sketch
from flora_jax.transforms.accumulation import compressed_accumulation

_LEARNING_RATE = 1e-3  # Any: it is not part of the state.
_PLAIN = {"adafactor": optax.adafactor, "adamw": optax.adamw}
_UNITS = {
    f"{prefix}{end}": base ** (i + 1)
    for end, base in (("iB", 1024), ("B", 1000))
    for i, prefix in enumerate("KMGT")
}


# As published, in GB (1e9 bytes); a program may use about that: 15.75 GiB of a v5e.
_CHIPS = {
    "v5e": 16,
    "v6e": 32,
    "v5p": 95,
    "t4": 16,
    "l4": 24,
    "rtx-4090": 24,
    "a100-40gb": 40,
    "a100-80gb": 80,
    "h100": 80,
}
_RESERVED = 0.1  # Of a chip's memory, for activations and temporaries.

_PACKAGE = "Optimizer state and gradient accumulation as sketches."
_PLAN_HELP = "the size of an optimizer's state, and which rank fits"
_PLAN_DESCRIPTION = (
    "Prints the size of the optimizer state for each parameter and in total, compared"
    " with AdamW and Adafactor. Reads only shapes, and allocates nothing."
)
_EPILOG = (
    "A budget covers the parameters, one set of gradients (or of their sketches) and"
    " the optimizer state, all in one memory. Activations and temporaries are not"
    " included: leave room for them, or reserve it."
    " Exit status: 0; 1 if the budget does not suffice; 2 for bad arguments."
)
_SHAPES = (
    "model.safetensors, model.safetensors.index.json, or a Hugging Face config.json of"
    " GPT-2, T5 or Llama"
)
_OPTIMIZER = "default: flora; adafactor and adamw need --accumulate"
_BUDGET = "for example 24GiB or 24GB; without --rank, finds the largest rank that fits"
_CHIP = "the published memory of a chip as the budget"
_RESERVE = "room left for activations and temporaries; default: a tenth of --chip's"
_ACCUMULATE = "compressed accumulation of K micro-steps around the optimizer"
_DTYPE = "of parameters and gradients; default: the file's"
_GRADIENTS = (
    "sketch gradients during backpropagation, by sketched_value_and_grad: those of"
    " sketched leaves are never whole in memory"
)
_EMBEDDINGS = "sketch embeddings and output heads as well; default: keep them dense"


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: those after the program's name; None for the process's own.

    Returns:
      0, or 1 if a budget is given and does not suffice.
    """
    given = _parser().parse_args(arguments)
    error: Callable[[str], NoReturn] = given.parser.error
    if given.chip is not None:
        given.budget = _CHIPS[given.chip] * 10**9
        if given.reserve is None:
            given.reserve = int(_RESERVED * given.budget)
    if given.rank is None and given.budget is None:
        error("give --rank, or --budget or --chip for the largest rank that fits")
    if given.reserve is not None:
        if given.budget is None:
            error("--reserve needs --budget or --chip to be taken from")
        if given.reserve >= given.budget:
            sizes = format_bytes(given.reserve), format_bytes(given.budget)
            error(f"--reserve must leave some of the budget, got {' of '.join(sizes)}")
        given.budget -= given.reserve
    if given.optimizer in _PLAIN and given.accumulate is None:
        error(
            f"--optimizer {given.optimizer} has no sketches of its own; give"
            " --accumulate for compressed accumulation around it"
        )
    if given.sketch_gradients and given.accumulate is None:
        error(
            f"--sketch-gradients: {given.optimizer} needs whole gradients; give"
            " --accumulate for an accumulation of sketches around it"
        )
    if given.picture is not None and (problem := picture.problem(given.picture)):
        error(f"--picture {given.picture}: {problem}")
    try:
        shapes = model_files.read_shapes(given.shapes, given.dtype)
    except model_files.ModelFileError as unreadable:
        error(str(unreadable))
    return _plan(given, shapes)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m flora_jax", description=_PACKAGE)
    commands = parser.add_subparsers(required=True, metavar="plan")
    plan = commands.add_parser(
        "plan", help=_PLAN_HELP, description=_PLAN_DESCRIPTION, epilog=_EPILOG
    )
    plan.set_defaults(parser=plan)
    names = [*dict.fromkeys([*optimizers.__all__, *_PLAIN])]
    add = plan.add_argument
    add("--shapes", required=True, metavar="FILE", help=_SHAPES)
    add("--optimizer", default="flora", choices=names, help=_OPTIMIZER)
    add("--rank", type=_positive, metavar="R", help="rank of every sketch")
    room = plan.add_mutually_exclusive_group()
    room.add_argument("--budget", type=_bytes, metavar="SIZE", help=_BUDGET)
    room.add_argument("--chip", choices=_CHIPS, help=_CHIP)
    add("--reserve", type=_bytes, metavar="SIZE", help=_RESERVE)
    add("--accumulate", type=_positive, metavar="K", help=_ACCUMULATE)
    add("--dtype", choices=["float32", "bfloat16", "float16"], help=_DTYPE)
    add("--sketch-gradients", action="store_true", help=_GRADIENTS)
    add("--sketch-embeddings", action="store_true", help=_EMBEDDINGS)
    add("--picture", metavar="PNG", help="write a bar chart of the memory")
    return parser


def _plan(given: argparse.Namespace, shapes: model_files.Shapes) -> int:
    own, rank = tree_bytes(shapes), given.rank
    if rank is None:
        room = max(given.budget - own, 1)
        try:
            rank = rank_for_budget(lambda r: _with_gradients(given, r), shapes, room)
        except ValueError:
            rank = 1  # None fits, or nothing is sketched: the plan shows which.
    gradients = tree_bytes(jax.eval_shape(_gradients(given, rank), shapes))
    tx, peers = _make_optimizer(given, rank), _peers(given, rank)
    plan = memory_plan(tx, shapes, sketch=_sketch(given, rank), compare=peers)
    plan.print()
    name = f"{given.optimizer}, rank {rank}"
    if given.accumulate is not None:
        name += f", accumulation of {given.accumulate}"
    elements = sum(x.size for x in jax.tree.leaves(shapes))
    print(f"{given.shapes}: {len(shapes)} leaves, {elements:,} parameters")
    total = own + gradients + plan.state_bytes
    kind = "sketches of gradients" if given.sketch_gradients else "gradients"
    sizes = {"parameters": own, kind: gradients, "state": plan.state_bytes}
    parts = [f"{format_bytes(size)} {part}" for part, size in sizes.items()]
    print(f"{name}: {' + '.join(parts)} = {format_bytes(total)}")
    print("Activations and temporaries are not included.")
    if not any(leaf.sketches for leaf in plan.leaves):
        print(f"At rank {rank} nothing is sketched: this is the uncompressed state.")
    print(f"In a script:\n{_script(given, rank)}")
    if given.picture is not None:
        try:
            picture.draw(plan, name, given.picture, gradients, given.budget)
        except OSError as error:
            given.parser.error(f"--picture {given.picture}: {error.strerror}")
        print(f"picture: {given.picture}")
    if given.budget is None:
        return 0
    if given.reserve is not None:
        print(f"reserved: {format_bytes(given.reserve)}")
    left = given.budget - total
    word = "left" if left >= 0 else "missing"
    print(f"budget {format_bytes(given.budget)}: {format_bytes(abs(left))} {word}")
    if left < 0 and given.rank is None:
        print("no rank fits: showing rank 1", file=sys.stderr)
    return int(left < 0)


def _sketch(given: argparse.Namespace, rank: int) -> Sketch:
    return Sketch(rank, mask=None if given.sketch_embeddings else not_embeddings)


def _inner_optimizer(given: argparse.Namespace, rank: int) -> Any:
    if given.optimizer in _PLAIN:
        return _PLAIN[given.optimizer](_LEARNING_RATE)
    return getattr(optimizers, given.optimizer)(_LEARNING_RATE, _sketch(given, rank))


def _make_optimizer(given: argparse.Namespace, rank: int) -> Any:
    """The requested optimizer, in compressed accumulation if that is requested too."""
    inner = _inner_optimizer(given, rank)
    if given.accumulate is None:
        return inner
    return compressed_accumulation(inner, given.accumulate, _sketch(given, rank))


def _gradients(given: argparse.Namespace, rank: int) -> Callable[[Any], Any]:
    """Maps parameters to what the optimizer takes: gradients or their sketches."""
    if not given.sketch_gradients:
        return lambda params: params
    sketch = _sketch(given, rank)

    def sketches(params: Any) -> Any:
        plans, leaves = sketch.plan(params), jax.tree.leaves(params)
        return [
            leaf if plan.dense else jnp.zeros(plan.state_shape)
            for leaf, plan in zip(leaves, plans, strict=True)
        ]

    return sketches


def _with_gradients(given: argparse.Namespace, rank: int) -> Any:
    """The requested optimizer, as if its state held one step's gradients as well."""
    tx, gradients = _make_optimizer(given, rank), _gradients(given, rank)
    return optax.GradientTransformation(
        lambda params: (tx.init(params), gradients(params)), tx.update
    )


def _peers(given: argparse.Namespace, rank: int) -> dict[str, Any]:
    """The default peers; with accumulation also MultiSteps around the optimizer."""
    peers = default_peers()
    if given.accumulate is not None:
        steps = optax.MultiSteps(_inner_optimizer(given, rank), given.accumulate)
        peers[f"optax.MultiSteps({given.optimizer})"] = steps.gradient_transformation()
    return peers


def _script(given: argparse.Namespace, rank: int) -> str:
    """The lines that make the requested optimizer in Python."""
    mask = "" if given.sketch_embeddings else ", mask=fj.not_embeddings"
    tx = f"fj.{given.optimizer}(learning_rate, sketch)"
    if given.optimizer in _PLAIN:
        tx = f"optax.{given.optimizer}(learning_rate)"
    if given.accumulate is not None:
        tx = f"fj.compressed_accumulation({tx}, {given.accumulate}, sketch)"
    lines = [f"sketch = fj.Sketch({rank}{mask})", f"tx = {tx}"]
    if given.sketch_gradients:
        lines.append("value_and_grad = fj.sketched_value_and_grad(loss, sketch)")
    return "\n".join(f"  {line}" for line in lines)


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
