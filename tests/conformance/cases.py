"""One list of all public transformations, and what all conformance tests share."""

import dataclasses
import inspect
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import cached

# Three cycles of accumulation, and two transfers of momentum or changes of a subspace
# in STEPS updates. Widths are at most 4 times the rank: rho = 0.5**8 * 4, far from
# where init warns.
DECAY, EVERY_K, RESAMPLE_EVERY, STEPS = 0.5, 3, 4, 9

# Two settings, from which each case takes what it knows.
FOLDS = fj.Sketch(4, min_dim_size=8)
SMALL = fj.Sketch(1, min_dim_size=2)
_SKETCH_FIELDS = {field.name for field in dataclasses.fields(fj.Sketch)}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A public transformation under one choice of its options.

    Attributes:
      name: the test's id.
      factory: the function of flora_jax.
      options: its arguments, and fields of its sketch, beside those of a setting.
      inner: makes the ``inner`` argument from a setting and a learning rate.
    """

    name: str
    factory: Callable[..., Any]
    options: Mapping[str, Any]
    inner: Callable[[fj.Sketch, Any], optax.GradientTransformation] | None = None

    def takes(self, name):
        """Whether the factory has an argument of that name."""
        return name in inspect.signature(self.factory).parameters

    def option(self, name):
        """The value of an argument, given or by default."""
        default = inspect.signature(self.factory).parameters[name].default
        return self.options.get(name, default)

    @property
    def sketches(self):
        """Whether some of the state is a sketch, by the factory's own arguments."""
        return self.takes("sketch")

    @property
    def keys(self):
        """The number of states that have a root key."""
        return int(self.sketches or self.factory is fj.quantize_state)

    @property
    def accumulates(self):
        """Whether ``inner`` is given parameters, and only every EVERY_K-th step."""
        return self.takes("every_k")

    def arguments(self, setting=FOLDS, **changes):
        """The factory's arguments in a setting; changes may be of the sketch."""
        changes, arguments = {**self.options, **changes}, {}
        if self.takes("sketch"):
            own = {k: changes.pop(k) for k in _SKETCH_FIELDS & changes.keys()}
            arguments["sketch"] = dataclasses.replace(setting, **own)
        if self.takes("rules"):
            arguments["rules"] = fj.LeafRules(
                min_dim_size=setting.min_dim_size, max_aspect_ratio=math.inf
            )
        if self.inner is not None:
            arguments["inner"] = self.inner(setting, 0.1)
        return {**arguments, **changes}

    def __call__(self, setting=FOLDS, **changes):
        """The transformation in a setting."""
        return self.factory(**self.arguments(setting, **changes))


def _momentum(name, estimator, projection, **more):
    options = {
        "decay": DECAY,
        "resample_every": RESAMPLE_EVERY,
        "estimator": estimator,
        "projection": projection,
    }
    return Case(f"momentum-{name}", fj.compressed_momentum, options, **more)


def _accumulation(name, projection, inner):
    options = {"every_k": EVERY_K, "projection": projection}
    return Case(f"accumulation-{name}", fj.compressed_accumulation, options, inner)


def _flora(name, **options):
    settings = {"learning_rate": 0.1, "b1": DECAY, "resample_every": RESAMPLE_EVERY}
    return Case(f"flora-{name}", fj.flora, settings | options)


def _adamw(factory, name="", **options):
    # Decays whose powers are far from 1: optax debiases in float32, where 1 - b2**t
    # has few digits otherwise, and other ones where b2 is an array.
    settings = {"learning_rate": 0.1, "b1": DECAY, "b2": 0.9}
    options = {**settings, "refresh_every": RESAMPLE_EVERY, **options}
    name = factory.__name__.replace("_", "-") + name
    return Case(name, factory, options)


def _adam(setting, rate):
    return optax.scale_by_adam(DECAY, 0.9)


def _fira(setting, rate):
    return _adamw(fj.fira)(setting, learning_rate=rate)


def _subspace(name, projection, residual, transport):
    options = {
        "refresh_every": RESAMPLE_EVERY,
        "projection": projection,
        "residual": residual,
        "transport": transport,
    }
    name = f"subspace-{name}"
    return Case(name, fj.scale_in_subspace, options, _adam)


# One of each kind of state comes first: most tests of the quick tier run no others.
CASES = (
    _momentum("nesterov-gaussian", "nesterov", fj.Gaussian()),
    _accumulation("adam", fj.CountSketch(), lambda setting, rate: optax.adam(rate)),
    _adamw(fj.fira, weight_decay=0.01),
    _momentum("paper-gaussian", "paper", fj.Gaussian()),
    _momentum("paper-countsketch", "paper", fj.CountSketch()),
    _momentum("fresh-countsketch", "fresh", fj.CountSketch()),
    _momentum("residual-countsketch", "residual", fj.CountSketch()),
    _accumulation(
        "adafactor",
        fj.Gaussian(),
        lambda setting, rate: optax.adafactor(
            rate, min_dim_size_to_factor=setting.min_dim_size
        ),
    ),
    _flora("momentum", projection=fj.CountSketch()),
    Case("adafactor", fj.adafactor, {"learning_rate": 0.1}),
    _flora("weight-decay", weight_decay=0.01, projection=fj.CountSketch()),
    Case("factored-rms", fj.scale_by_factored_rms, {}),
    _adamw(fj.galore),
    _adamw(fj.apollo),
    _adamw(fj.apollo_mini),
    _adamw(fj.dct_adamw, error_feedback=True),
    _adamw(fj.flora_adamw, weight_decay=0.01),
    _adamw(fj.flora_adamw, "-orthogonal", orthogonal=True, stagger=True),
    _adamw(fj.flora_muon),
    _adamw(fj.galore, "-int8", state_dtype="int8"),
    _adamw(fj.flora_muon, "-int8", state_dtype="int8"),
    _subspace(
        "ldadam",
        fj.TopSVD(),
        fj.Plain(),
        fj.LDAdam(DECAY, 0.9),
    ),
    _subspace(
        "reset",
        fj.CountSketch(),
        fj.FiraCode(b1=DECAY, b2=0.9),
        fj.Reset(DECAY, 0.9),
    ),
    _subspace("rms", fj.Orthogonal(), None, fj.PreserveRMS()),
    # Leaves are far below the size from which on moments are coded by default.
    Case("quantized", fj.quantize_state, {"min_size": 1}, _fira),
)
SKETCHING = tuple(case for case in CASES if case.sketches)
# Other options of a transformation that another case covers: the slow tier.
VARIANTS = frozenset(
    {
        "accumulation-adafactor",
        "flora-adamw-orthogonal",
        "flora-muon-int8",
        "flora-weight-decay",
        "galore",
        "momentum-fresh-countsketch",
        "momentum-paper-gaussian",
    }
)
DISTINCT = tuple(case for case in CASES if case.name not in VARIANTS)


def each_of(cases, distinct=DISTINCT):
    """Parametrizes a test; cases that are not distinct run in the slow tier."""

    def param(case):
        marks = () if case in distinct else (pytest.mark.slow,)
        return pytest.param(case, id=case.name, marks=marks)

    return pytest.mark.parametrize("case", [param(case) for case in cases])


every_case, every_sketching_case = each_of(CASES), each_of(SKETCHING)


def named(tree):
    """The leaves of a tree of arrays by path, as the library names them."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def layer(dtype=jnp.float32):
    """A small tree for what needs no other: the kernel is sketched in both settings."""
    shapes = {"layer": {"kernel": (8, 16), "bias": (16,)}}
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return optax.tree.cast(gradients(params, -1), dtype)


def gradients(params, step):
    """Normal gradients of one step: a leaf's follow from its path, in any order."""

    def leaf(path, x):
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        rng = np.random.default_rng([step + 1, zlib.crc32(text.encode())])
        return jnp.asarray(rng.normal(size=jnp.shape(x)), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, params)


@dataclasses.dataclass(frozen=True)
class Run:
    """STEPS updates of a case, compiled once; parameters stay where they are.

    Attributes:
      tx: the transformation.
      params: the parameters.
      grads: the gradients, by step.
      updates: the updates, by step.
      states: the states, one more than updates.
      step: the compiled update, a function of gradients, state and parameters.
      traces: as many elements as step was traced.
    """

    tx: optax.GradientTransformationExtraArgs
    params: Any
    grads: list[Any]
    updates: list[Any]
    states: list[Any]
    step: Callable[..., Any]
    traces: list[None]


def run(tx, params, steps=STEPS, donate=False, **extra_args):
    """Runs a transformation; see :class:`Run`. Donated states are kept as copies."""
    traces = []

    def step(grads, state, params):
        traces.append(None)
        return tx.update(grads, state, params, **extra_args)

    step = jax.jit(step, donate_argnums=(1,) if donate else ())
    grads = [gradients(params, i) for i in range(steps)]
    state, updates, states = tx.init(params), [], []
    for grad in grads:
        states.append(jax.tree.map(jnp.copy, state) if donate else state)
        update, state = step(grad, state, params)
        updates.append(update)
    return Run(tx, params, grads, updates, [*states, state], step, traces)


def is_orthogonal(case):
    chosen = case.takes("orthogonal") and case.option("orthogonal")
    return chosen or case.factory is fj.flora_muon


@cached
def run_layer(case):
    """The run of a case on the small tree: what wrappers must not change."""
    return run(case(), layer(), an_argument_that_no_optimizer_expects=1)


def assert_identical(actual, expected):
    """Asserts that two trees are the same in structure, dtypes and every bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(actual)[0],
        jax.tree.leaves(expected),
        strict=True,
    ):
        message = jax.tree_util.keystr(path)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), message
        x, y = np.asarray(x).tobytes(), np.asarray(y).tobytes()
        assert x == y, message
