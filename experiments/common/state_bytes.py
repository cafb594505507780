"""Bytes of an optimizer's state, counted from its arrays."""

import fractions
import math
from typing import Any

import jax
import optax

import flora_jax as fj
from experiments.common.errors import ConfigError
from experiments.common.methods import Method
from experiments.models.build import Params


def leaf_plans(params: Params, sketch: fj.Sketch) -> list[fj.LeafPlan]:
    """Returns the plan of every parameter, in the order of `jax.tree.leaves`.

    Raises:
        ConfigError: not one parameter would be compressed.
    """
    plans = jax.tree.leaves(fj.plan_leaves(params, sketch))
    if all(plan.dense_reason is not None for plan in plans):
        widest = max(plans, key=lambda plan: math.prod(plan.shape))
        raise ConfigError(
            f"`--ranks` {sketch.rank} compresses no matrix of this model "
            f"({widest.path}: {widest.dense_reason}); give a lower rank or a larger "
            "model"
        )
    return plans


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays, or shapes of arrays, of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def step_bytes(compiled: jax.stages.Compiled) -> int:
    """The compiler's account of a step: all that is in memory while it runs.

    The peak that it reports leaves out temporaries on CPU, hence the sum.
    """
    stats = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes
    return held + stats.temp_size_in_bytes - stats.alias_size_in_bytes


def measure(
    method: Method, sketch: fj.Sketch, params: Params, opt_state: optax.OptState
) -> dict[str, Any]:
    """Counts the bytes of one method's state, and where they are.

    The buffer is what FLORA compresses: the momentum or the accumulator. A leaf counts
    as compressible if FLORA would compress it, in the uncompressed methods too.

    Returns:
        `trained_bytes`, `state_bytes` and, of a method with a buffer: `buffer_bytes`;
        `matrix_bytes`, its part in the compressible leaves; `matrix_bytes_in_full`, the
        bytes of these leaves' parameters; `kept`, the ratio of the two;
        `rank_over_width`, whether every compressible leaf has exactly rank/width of its
        full bytes.
    """
    sizes = {"trained_bytes": tree_bytes(params), "state_bytes": tree_bytes(opt_state)}
    if method.kind == "none" or method.adapters:
        return sizes
    buffer = optax.tree.get(opt_state, method.buffer)
    leaves = map(jax.tree.leaves, (params, buffer))
    parts = zip(leaf_plans(params, sketch), *leaves, strict=True)
    compressible = [
        (plan, full.nbytes, kept.nbytes)
        for plan, full, kept in parts
        if plan.dense_reason is None
    ]
    in_full = sum(full for _, full, _ in compressible)
    in_state = sum(kept for _, _, kept in compressible)
    return sizes | {
        "buffer_bytes": tree_bytes(buffer),
        "matrix_bytes": in_state,
        "matrix_bytes_in_full": in_full,
        "kept": str(fractions.Fraction(in_state, in_full)),
        "rank_over_width": all(
            kept * plan.width == full * plan.rank for plan, full, kept in compressible
        ),
    }
