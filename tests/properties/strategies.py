"""Random settings of every public transformation, and which of them are refused.

What must be refused is written down here from the documentation, not asked of the
library: a case either raises for one of its reasons, or has none and runs.
"""

import dataclasses
import math
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

DTYPES = ("float32", "bfloat16", "float16")
RULES = tuple(
    fj.LeafRules(min_dim_size=size, max_aspect_ratio=math.inf) for size in (1, 4)
)
# Decay and interval of a momentum: far from where init warns, at every width.
MOMENTUM = ((0.25, 4), (0.0, 1), (0.9, None))
BAD_RANKS = {0: "`rank` must be positive", 2.0: "`rank` as a fraction must lie"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One transformation, with the tree that it is given.

    Attributes:
      factory: a public function of flora_jax.
      arguments: its arguments.
      sketch: the fields of its sketch; None for one that has none.
      tree: of :class:`tests.properties.trees.Leaf`.
      seed: of parameters and gradients.
      reasons: patterns of messages, of which it must raise one if there are any.
    """

    factory: Any
    arguments: dict
    sketch: dict | None
    tree: Any
    seed: int
    reasons: tuple

    @property
    def narrow(self):
        """Whether some state is in float16."""
        return self.arguments.get("dtype") == "float16"

    @property
    def boundless(self):
        """Whether updates may leave the range of float16, by what a method is.

        Adafactor's factors multiply up where a small entry meets a small row and a
        small column of a large matrix, unless clipped. The scale of Fira and APOLLO
        divides by the norm of a sketch, which may have seen next to nothing; Fira's
        has a bound where the basis is random.
        """
        settings = {"clipping_threshold": None, "residual": None}
        settings |= {**FIXED.get(self.factory, {}), **self.arguments}
        if self.factory in (fj.scale_by_factored_rms, fj.adafactor, fj.flora):
            return settings["clipping_threshold"] is None
        residual, projection = (
            settings["residual"],
            (self.sketch or {}).get("projection"),
        )
        own = self.factory is fj.fira and projection is None
        chosen = own or projection in ADAPTIVE
        return isinstance(residual, fj.Apollo) or (
            isinstance(residual, fj.Fira) and chosen
        )

    def make(self):
        """The transformation."""
        arguments = dict(self.arguments)
        if self.sketch is not None:
            arguments["sketch"] = fj.Sketch(**self.sketch)
        tx = self.factory(**arguments)
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
    """Fields of a sketch that plan the leaves, and their reasons for a refusal."""
    rank = draw(st.sampled_from([1, 2, 3, 1 / 4, 2, 1000]))
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
    sketch = {
        "rank": rank,
        "mask": mask,
        "min_dim_size": draw(st.sampled_from([1, 2, 4])),
        "max_aspect_ratio": draw(st.sampled_from([2, 16, float("inf")])),
        "side": draw(st.sampled_from(["smaller", "larger", "left", "right"])),
        "key": draw(st.integers(0, 2**64 - 1)),
    }
    return sketch, reasons


def _sketch_none(path, shape):
    return False


def _momentum(draw, flora):
    decay, every = draw(st.sampled_from(MOMENTUM))
    projection = draw(st.sampled_from(OBLIVIOUS * 3 + ADAPTIVE[:1]))
    estimator = draw(st.sampled_from(["paper", "nesterov", "fresh", "residual"]))
    reasons = []
    if projection in ADAPTIVE:
        reasons += ["`projection` must be one that a key regenerates"]
    elif estimator == "residual" and isinstance(
        projection, fj.Gaussian | fj.Rademacher
    ):
        reasons += ["`estimator` 'residual' needs a projection with orthogonal rows"]
    arguments = {
        "b1" if flora else "decay": decay,
        "resample_every": every,
        "estimator": estimator,
        "dtype": draw(st.sampled_from(DTYPES)),
    }
    return arguments, {"projection": projection}, reasons


def _flora(draw):
    arguments, sketch, reasons = _momentum(draw, flora=True)
    return {**arguments, **_adafactor(draw)}, sketch, reasons


def _adafactor(draw):
    return choose(
        draw,
        learning_rate=(0.1, optax.linear_schedule(0.1, 0.0, 3)),
        clipping_threshold=(1.0, None),
        multiply_by_parameter_scale=(True, False),
        weight_decay=(None, 0.01),
    )


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
        **choose(
            draw,
            every_k=(2, 3, lambda cycle: 2 + cycle % 2),
            use_grad_mean=(True, False),
            should_skip_update_fn=(None, optax.skip_not_finite),
            dtype=DTYPES,
        ),
    }
    reasons = ["`projection` must be one"] if projection in ADAPTIVE else []
    return arguments, {"projection": projection}, reasons


def _accumulator(draw):
    arguments = choose(draw, step=(0, 7), use_mean=(True, False), dtype=DTYPES)
    return arguments, choose(draw, projection=OBLIVIOUS), []


def plans_of(sketch, tree):
    """Plans of a tree of leaves, as if all of them had a real dtype."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32"), tree)
    return fj.plan_leaves(shapes, fj.Sketch(**sketch))


def _too_few_directions(factory, sketch, tree):
    """Whether a leaf has fewer singular vectors than are asked for."""
    own = fj.TopSVD() if factory in (fj.galore, fj.fira) else None
    if not isinstance(sketch["projection"] or own, fj.TopSVD):
        return []
    plans = jax.tree.leaves(plans_of(sketch, tree))
    if any(plan.rank > min(plan.rows, plan.columns) for plan in plans):
        return ["`rank` of leaf .* must be at most"]
    return []


@st.composite
def cases(draw, factory):
    """A public transformation under any settings, with any tree."""
    tree, seed = draw(trees.trees()), draw(st.integers(0, 2**32 - 1))
    refused = [x for x in jax.tree.leaves(tree) if x.refused]
    dtypes = ["leaf .* must have a real floating dtype"] if refused else []
    if factory in (fj.adafactor, fj.scale_by_factored_rms):
        arguments = choose(draw, decay_rate=(0.8, 0.5), rules=RULES)
        if factory is fj.adafactor:
            arguments |= _adafactor(draw)
        return Case(factory, arguments, None, tree, seed, tuple(dtypes))
    if factory is fj.quantize_state:
        return _quantized(draw, tree, seed)
    make = {
        fj.compressed_momentum: lambda: _momentum(draw, flora=False),
        fj.flora: lambda: _flora(draw),
        fj.compressed_accumulation: lambda: _accumulation(draw, tree),
        fj.compressed_accumulator: lambda: _accumulator(draw),
        fj.scale_in_subspace: lambda: subspace(draw),
    }
    arguments, own, reasons = make.get(factory, lambda: adamw(draw, factory))()
    shared, bad_rank = draw(rules(tree))
    sketch = {**shared, **own}
    reasons = [*dtypes, *reasons, *bad_rank]
    if not reasons:
        reasons = _too_few_directions(factory, sketch, tree)
    return Case(factory, arguments, sketch, tree, seed, tuple(reasons))


def _quantized(draw, tree, seed):
    arguments = choose(
        draw,
        dtype=("int8", "float8_e4m3fn", "bfloat16"),
        min_size=(1, 64),
    )
    leaves, dtypes = jax.tree.leaves(tree), []
    if draw(st.booleans()):
        sketch = fj.Sketch(2, min_dim_size=2, key=draw(st.integers(0, 9)))
        inner = fj.flora_adamw(0.1, sketch, refresh_every=2)
        if any(leaf.refused for leaf in leaves):
            dtypes = ["leaf .* must have a real floating dtype"]
    else:
        # An optimizer of optax takes complex leaves, which stay exact.
        inner = optax.sgd(0.1, momentum=0.9)
        if any(leaf.dtype in ("int32", "bool") for leaf in leaves):
            dtypes = ["`inner` must keep floating or complex moments"]
    arguments["inner"] = inner
    return Case(fj.quantize_state, arguments, None, tree, seed, tuple(dtypes))


FACTORIES = (
    fj.compressed_momentum,
    fj.compressed_accumulation,
    fj.compressed_accumulator,
    fj.flora,
    fj.adafactor,
    fj.scale_by_factored_rms,
    fj.scale_in_subspace,
    fj.quantize_state,
    *FIXED,
)
