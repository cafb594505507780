"""Random settings of every public transformation, and which of them are refused.

What must be refused is written down here from the documentation, not asked of the
library: a case either raises for one of its reasons, or has none and runs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from hypothesis import strategies as st

import flora_jax as fj
from tests.properties import trees
from tests.properties.subspaces import (
    ADAPTIVE,
    FIXED,
    OBLIVIOUS,
    adamw,
    choose,
    subspace,
)

# Decay and interval of a momentum: far from where init warns, at every width.
MOMENTUM = ((0.25, 4), (0.0, 1), (0.9, None))
BAD_RANKS = {0: "`rank` must be positive", 2.0: "`rank` must be an int"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One transformation, with the tree that it is given.

    Attributes:
      factory: a public function of flora_jax.
      arguments: its arguments.
      tree: of :class:`tests.properties.trees.Leaf`.
      seed: of parameters and gradients.
      reasons: patterns of messages, of which it must raise one if there are any.
    """

    factory: Any
    arguments: dict
    tree: Any
    seed: int
    reasons: tuple

    @property
    def narrow(self):
        """Whether some state is in float16."""
        return self.arguments.get("dtype") == jnp.float16

    @property
    def boundless(self):
        """Whether updates may leave the range of float16, by what a method is.

        Adafactor's factors multiply up where a small entry meets a small row and a
        small column of a large matrix, unless clipped. The scale of Fira and APOLLO
        divides by the norm of a sketch, which may have seen next to nothing; Fira's
        has a bound where the basis is random.
        """
        settings = {"clipping_threshold": None, "residual": "dropped"}
        settings |= {**FIXED.get(self.factory, {}), **self.arguments}
        if self.factory in (fj.scale_by_factored_rms, fj.flora):
            return settings["clipping_threshold"] is None
        residual, chosen = settings["residual"], settings.get("projection") in ADAPTIVE
        return residual == "apollo" or (residual.startswith("fira") and chosen)

    def make(self):
        """The transformation."""
        tx = self.factory(**self.arguments)
        if isinstance(tx, optax.microbatching.Accumulator):
            return _as_transformation(tx)
        return tx


def _as_transformation(accumulator):
    """An accumulator whose update also gives what it stands for after each step."""

    def init(params):
        return accumulator.init(params), jnp.zeros([], jnp.int32)

    def update(grads, state, params=None):
        del params
        carry = accumulator.update(state[0], grads, state[1])
        return accumulator.finalize(carry), (carry, state[1] + 1)

    return optax.GradientTransformation(init, update)


@st.composite
def rules(draw, tree):
    """Arguments that plan the leaves, and their reasons for a refusal."""
    rank = draw(st.sampled_from([1, 2, 3, 1, 2, 1000]))
    reasons = []
    if draw(st.integers(0, 24)) == 11:
        rank = draw(st.sampled_from(sorted(BAD_RANKS)))
        reasons = [BAD_RANKS[rank]]
    elif draw(st.booleans()):
        ranks = jax.tree.map(lambda _: draw(st.integers(1, 4)), tree)
        rank = ranks if jax.tree.leaves(tree) else rank
    mask = None
    if draw(st.integers(0, 9)) == 5:
        mask = jax.tree.map(lambda _: draw(st.booleans()), tree)
        if jax.tree_util.all_leaves([tree]):  # A tree of bools has a node.
            mask = _sketch_none
        elif not jax.tree.leaves(tree):
            mask = None
    arguments = {
        "rank": rank,
        "mask": mask,
        "min_dim_size": draw(st.sampled_from([1, 2, 4])),
        "max_aspect_ratio": draw(st.sampled_from([2, 16, float("inf")])),
        "side": draw(st.sampled_from(["smaller", "larger", "left", "right"])),
        "key": draw(st.integers(0, 2**64 - 1)),
    }
    return arguments, reasons


def _sketch_none(path, shape):
    return False


def _momentum(draw, flora):
    decay, every = draw(st.sampled_from(MOMENTUM))
    projection = draw(st.sampled_from(OBLIVIOUS * 3 + ADAPTIVE[:1]))
    reading = draw(st.sampled_from(["paper", "interpolated", "residual"]))
    reasons = []
    if projection in ADAPTIVE:
        reasons += ["`projection` must be a flora_jax projection that a key"]
    elif reading == "residual" and isinstance(projection, fj.Gaussian | fj.Rademacher):
        reasons += ["`reading` 'residual' needs a projection with orthogonal rows"]
    arguments = {
        "b1" if flora else "decay": decay,
        "resample_every": every,
        "projection": projection,
        "reading": reading,
        "dtype": draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])),
    }
    return arguments, reasons


def _flora(draw):
    arguments, reasons = _momentum(draw, flora=True)
    options = choose(
        draw,
        learning_rate=(0.1, optax.linear_schedule(0.1, 0.0, 3)),
        min_dim_size_to_factor=(1, 2, 8),
        clipping_threshold=(1.0, None),
        multiply_by_parameter_scale=(True, False),
        weight_decay=(None, 0.01),
    )
    return {**arguments, **options}, reasons


def _inner(draw, tree):
    """What receives accumulated gradients; Adam's eps is zero in float16."""
    choices = [optax.sgd(0.1, momentum=0.9), optax.sgd(0.1)]
    if all(leaf.dtype != "float16" for leaf in jax.tree.leaves(tree)):
        choices += [optax.adam(0.1), optax.adafactor(0.1, min_dim_size_to_factor=4)]
    return draw(st.sampled_from(choices))


def _accumulation(draw, tree):
    projection = draw(st.sampled_from(OBLIVIOUS * 3 + ADAPTIVE[2:3]))
    arguments = {
        "inner": _inner(draw, tree),
        "projection": projection,
        **choose(
            draw,
            every_k=(2, 3, lambda cycle: 2 + cycle % 2),
            use_grad_mean=(True, False),
            should_skip_update_fn=(None, optax.skip_not_finite),
            dtype=(jnp.float32, jnp.bfloat16, jnp.float16),
        ),
    }
    return arguments, ["`projection` must be"] if projection in ADAPTIVE else []


def _accumulator(draw):
    options = {
        "projection": OBLIVIOUS,
        "step": (0, 7),
        "use_mean": (True, False),
        "dtype": (jnp.float32, jnp.bfloat16, jnp.float16),
    }
    return choose(draw, **options), []


def plans_of(arguments, tree):
    """Plans of a tree of leaves, as if all of them had a real dtype."""
    names = ("mask", "min_dim_size", "max_aspect_ratio", "side")
    return fj.plan_leaves(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32"), tree),
        arguments["rank"],
        **{name: arguments[name] for name in names},
    )


def _too_few_directions(arguments, tree):
    """Whether a leaf has fewer singular vectors than are asked for."""
    if not isinstance(arguments.get("projection"), fj.TopSVD):
        return []
    plans = jax.tree.leaves(plans_of(arguments, tree))
    if any(plan.rank > min(plan.rows, plan.columns) for plan in plans):
        return ["`rank` of leaf .* must be at most"]
    return []


@st.composite
def cases(draw, factory):
    """A public transformation under any settings, with any tree."""
    tree, seed = draw(trees.trees()), draw(st.integers(0, 2**32 - 1))
    refused = [x for x in jax.tree.leaves(tree) if x.refused]
    dtypes = ["leaf .* must have a real floating dtype"] if refused else []
    if factory is fj.scale_by_factored_rms:
        arguments = choose(draw, decay_rate=(0.8, 0.5), min_dim_size_to_factor=(1, 4))
        return Case(factory, arguments, tree, seed, tuple(dtypes))
    if factory is fj.quantize_state:
        return _quantized(draw, tree, seed)
    make = {
        fj.compressed_momentum: lambda: _momentum(draw, flora=False),
        fj.flora: lambda: _flora(draw),
        fj.compressed_accumulation: lambda: _accumulation(draw, tree),
        fj.compressed_accumulator: lambda: _accumulator(draw),
        fj.scale_in_subspace: lambda: subspace(draw),
    }
    own, reasons = make.get(factory, lambda: adamw(draw, factory))()
    shared, bad_rank = draw(rules(tree))
    arguments = {**shared, **own}
    reasons = [*dtypes, *reasons, *bad_rank]
    if not reasons:
        reasons = _too_few_directions(arguments, tree)
    return Case(factory, arguments, tree, seed, tuple(reasons))


def _quantized(draw, tree, seed):
    arguments = choose(
        draw,
        dtype=("int8", "float8_e4m3fn", "bfloat16"),
        block=(1, 4, 256),
        min_size=(1, 64),
        stochastic_rounding=(True, False),
    )
    leaves, dtypes = jax.tree.leaves(tree), []
    if draw(st.booleans()):
        inner = fj.flora_adamw(
            0.1, 2, min_dim_size=2, refresh_every=2, key=draw(st.integers(0, 9))
        )
        if any(leaf.refused for leaf in leaves):
            dtypes = ["leaf .* must have a real floating dtype"]
    else:
        # An optimizer of optax takes complex leaves, which stay exact.
        inner = optax.sgd(0.1, momentum=0.9)
        if any(leaf.dtype in ("int32", "bool") for leaf in leaves):
            dtypes = ["`inner` must keep floating or complex moments"]
    return Case(
        fj.quantize_state, {"inner": inner, **arguments}, tree, seed, tuple(dtypes)
    )


FACTORIES = (
    fj.compressed_momentum,
    fj.compressed_accumulation,
    fj.compressed_accumulator,
    fj.flora,
    fj.scale_by_factored_rms,
    fj.scale_in_subspace,
    fj.quantize_state,
    *FIXED,
)
