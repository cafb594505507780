"""Bytes of an optimizer's state, counted from its arrays."""

import dataclasses
import fractions
from typing import Any

import jax
import optax

import flora_jax as fj
from experiments.common.errors import ConfigError
from experiments.common.optimizers import matrices_only
from experiments.main_job.config import Config
from experiments.main_job.methods import Method
from experiments.models.build import Params


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Where the bytes of one optimizer's state are.

    The buffer is what FLORA compresses: the momentum or the accumulator. A leaf counts
    as compressible if FLORA would compress it, in the uncompressed methods too.
    """

    parameters: int
    state: int
    """The whole optimizer state, the buffer included."""
    compressible: int
    """The buffer's part in compressible leaves."""
    compressible_in_full: int
    """The same leaves uncompressed: the bytes of their parameters."""
    dense: int
    """The buffer's part in the other leaves: embeddings, biases, norms."""
    rank_over_width: bool
    """Whether every compressible leaf has rank/width of its full bytes, exactly."""
    compressible_parameters: float
    """Share of the model's parameters that lies in compressible leaves."""

    @property
    def buffer(self) -> int:
        """Bytes of the whole buffer."""
        return self.compressible + self.dense

    @property
    def rest(self) -> int:
        """Bytes of all else in the state: second moments, counters, keys."""
        return self.state - self.buffer

    @property
    def kept(self) -> fractions.Fraction:
        """Kept part of the buffer in the compressible leaves."""
        return fractions.Fraction(self.compressible, self.compressible_in_full)


def leaf_plans(config: Config, params: Params) -> list[fj.LeafPlan]:
    """Returns the plan of every parameter, in the order of `jax.tree.leaves`.

    Raises:
        ConfigError: not one parameter would be compressed.
    """
    plans = jax.tree.leaves(
        fj.plan_leaves(params, config.rank, mask=matrices_only),
        is_leaf=lambda node: isinstance(node, fj.LeafPlan),
    )
    if all(plan.dense_reason is not None for plan in plans):
        matrix = next(plan for plan in plans if plan.path.endswith("c_attn/kernel"))
        raise ConfigError(
            f"nothing would be compressed: {matrix.path} stays dense since "
            f"{matrix.dense_reason}; raise `--model.width` ({config.model.width}) or "
            f"lower `--rank` ({config.rank})"
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
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        + stats.temp_size_in_bytes
        - stats.alias_size_in_bytes
    )


def measure(
    method: Method, config: Config, params: Params, opt_state: optax.OptState
) -> StateBytes:
    """Counts the bytes of one method's state."""
    plans = leaf_plans(config, params)
    full = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    buffer = optax.tree.get(opt_state, method.field)
    kept = [leaf.nbytes for leaf in jax.tree.leaves(buffer)]
    compressible = [
        (plan, whole, part)
        for plan, whole, part in zip(plans, full, kept, strict=True)
        if plan.dense_reason is None
    ]
    in_full = sum(whole for _, whole, _ in compressible)
    in_state = sum(part for _, _, part in compressible)
    return StateBytes(
        parameters=sum(full),
        state=tree_bytes(opt_state),
        compressible=in_state,
        compressible_in_full=in_full,
        dense=sum(kept) - in_state,
        rank_over_width=all(
            part * plan.width == whole * plan.rank for plan, whole, part in compressible
        ),
        compressible_parameters=in_full / sum(full),
    )
