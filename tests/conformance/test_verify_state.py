"""verify_state knows a transformation's own state, in any wrapper, from another's."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flora_jax as fj
from tests.conformance.cases import (
    CASES,
    FOLDS,
    RESAMPLE_EVERY,
    every_case,
    every_sketching_case,
    layer,
    run_layer,
)

LABELS = {"layer": {"kernel": "a", "bias": "b"}}
MASK = {"layer": {"kernel": True, "bias": False}}


def inject(case, **changes):
    static = ("min_size",) if case.factory is fj.quantize_state else ()
    make = optax.inject_hyperparams(case.factory, static_args=static)
    return make(**case.arguments(**changes))


def around(wrap):
    return lambda case, **changes: wrap(case(**changes))


WRAPPERS = {
    "alone": around(lambda tx: tx),
    "chain": around(lambda tx: optax.chain(optax.clip(1.0), tx, optax.scale(-0.1))),
    "inject_hyperparams": inject,
    "masked": around(lambda tx: optax.masked(tx, MASK)),
    "partition": around(
        lambda tx: optax.partition({"a": tx, "b": optax.sgd(0.1)}, LABELS)
    ),
    "MultiSteps": around(lambda tx: optax.MultiSteps(tx, 2).gradient_transformation()),
    "apply_if_finite": around(lambda tx: optax.apply_if_finite(tx, 3)),
}
# Quickly each wrapper around one case, and each case in one wrapper.
WRAPPED = [
    pytest.param(case, WRAPPERS[wrap], id=f"{case.name}-{wrap}")
    for case in CASES
    for wrap in WRAPPERS
]


def shapes(tree):
    return jax.eval_shape(lambda: tree)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("case", "wrap"), WRAPPED)
def test_its_own_state_passes_and_another_seed_does_not(case, wrap):
    params = layer()
    state = wrap(case).init(params)
    fj.verify_state(wrap(case), state)
    fj.verify_state(wrap(case), state, shapes(params))
    if not case.sketches:
        return
    for given in ((), (params,)):
        with pytest.raises(ValueError, match=r"key data \[0, 0\] in the .*, \[0, 1\]"):
            fj.verify_state(wrap(case, key=1), state, *given)


@pytest.mark.sample(1)
@every_case
def test_its_own_state_passes_after_updates(case):
    reference = run_layer(case)
    fj.verify_state(case(), reference.states[-1])
    fj.verify_state(case(), reference.states[-1], reference.params)


@pytest.mark.sample(1)
@pytest.mark.parametrize("seed", [0, 1])
@every_sketching_case
def test_the_state_of_an_nnx_optimizer(case, seed):
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, case(key=seed), wrt=nnx.Param)
    for given in ((), (nnx.state(model, nnx.Param),)):
        verify = functools.partial(fj.verify_state, case(), optimizer.opt_state, *given)
        if seed == 0:
            verify()
        else:
            with pytest.raises(ValueError, match=r"key data \[0, 1\] in the state"):
                verify()


# Projections whose states have the same arrays; for others the isometric CountSketch,
# or Orthogonal in its place.
OTHER = {
    fj.TopSVD(method="exact"): fj.TopSVD(),
    fj.TopSVD(): fj.TopSVD(method="exact"),
    fj.TopDCT(): fj.TopDCT(norm="l2"),
}
OWN = {fj.galore: fj.TopSVD(), fj.fira: fj.TopSVD(), fj.dct_adamw: fj.TopDCT()}


def other_projection(case):
    own = case.options.get("projection", OWN.get(case.factory))
    return OTHER.get(own, fj.SRHT("isometric"))


def other_settings(case):
    """(argument, another value of it, what the message says)."""
    yield "projection", other_projection(case), "projection "
    yield "key", 7, "key data [0, 7] in the state, [0, 0] in tx"
    yield "rank", 3, "rank 3 in the state, 4 in tx"
    yield "side", "right", "side right in the state, default in tx"
    yield "mask", fj.not_embeddings, "mask not_embeddings in the state, default in tx"
    yield "mask", {"layer": {"kernel": True, "bias": False}}, "mask "
    for name in ("resample_every", "refresh_every"):
        if case.takes(name):
            other = RESAMPLE_EVERY + 1
            message = f"{name} {other} in the state, {RESAMPLE_EVERY} in tx"
            yield name, other, message
    if case.takes("use_grad_mean"):
        yield "use_grad_mean", False, "use_grad_mean "
    if case.takes("dtype"):
        yield "dtype", "bfloat16", "dtype bfloat16 in the state, "
    if case.takes("state_dtype") and case.options.get("state_dtype") is None:
        yield "state_dtype", "bfloat16", "must have the structure that `tx` gives it"


@pytest.mark.sample(1)
@every_sketching_case
def test_other_settings_are_refused(case):
    for name, value, message in other_settings(case):
        state = case(**{name: value}).init(layer())
        with pytest.raises(ValueError, match=re.escape(message)):
            fj.verify_state(case(), state)


@pytest.mark.sample(1)
@every_sketching_case
def test_settings_that_only_use_a_state_may_differ(case):
    """Learning rates, decays and estimators."""
    others = {"learning_rate": 0.2, "decay": 0.6, "b1": 0.6}
    changes = {k: v for k, v in others.items() if case.takes(k)}
    if case.options.get("estimator") == "paper":
        changes["estimator"] = "nesterov"
    if case.options.get("transport") is not None:
        changes = {}
    state = case().init(layer())
    fj.verify_state(case(**changes), state)
    fj.verify_state(case(**changes), state, layer())


def momentum(**settings):
    return fj.compressed_momentum(0.5, dataclasses.replace(FOLDS, **settings))


def kernels(path, shape):
    return path.endswith("kernel")


def matrices(path, shape):
    return len(shape) == 2


def nothing(path, shape):
    return False


def test_with_params_rules_are_compared_by_what_they_decide():
    params = layer()
    state = momentum(mask=kernels).init(params)
    same = (
        {"mask": kernels},
        {"mask": matrices},
        {"mask": lambda path, shape: "kernel" in path},
        {"mask": {"layer": {"kernel": True, "bias": False}}},
        {"mask": None},
        {"mask": kernels, "rank": lambda path, shape: 4},
        {"mask": kernels, "rank": {"*/kernel": 1 / 2}},
        {"mask": kernels, "min_dim_size": 4},
    )
    for settings in same:
        fj.verify_state(momentum(**settings), state, params)
    for settings in same[1:]:
        with pytest.raises(ValueError, match="created with different settings"):
            fj.verify_state(momentum(**settings), state)


@pytest.mark.filterwarnings("ignore:compressed_momentum sketches only 0 of 2 leaves")
def test_rules_of_one_name_that_decide_otherwise_need_params():
    """Two lambdas of one function have one name."""
    first, second = (lambda path, shape, size=size: shape[0] == size for size in (8, 9))
    params = layer()
    state = momentum(mask=first).init(params)
    fj.verify_state(momentum(mask=second), state)
    with pytest.raises(ValueError, match="a different plan for at least one leaf"):
        fj.verify_state(momentum(mask=second), state, params)
    # Two square leaves of swapped ranks: states of the same shapes.
    params = {"a": jnp.zeros((16, 16)), "b": jnp.zeros((16, 16))}
    ranks = [lambda path, shape, one=one: 4 if path == one else 8 for one in "ab"]
    state = momentum(rank=ranks[0]).init(params)
    with pytest.raises(ValueError, match="a different plan for at least one leaf"):
        fj.verify_state(momentum(rank=ranks[1]), state, params)


def test_shapes_and_dtypes_are_those_of_the_parameters():
    params, tx = layer(), optax.chain(momentum(), optax.scale_by_adam())
    state = tx.init(params)
    fj.verify_state(tx, state, params)
    narrow = jax.tree.map(lambda x: x[..., :8], params)
    half = optax.tree.cast(params, jnp.bfloat16)
    for other, match in (
        (narrow, r"a different plan|1/mu/layer/bias: float32\[16\] in the state, .*8"),
        (half, r"1/mu/layer/bias: float32\[16\] in the state, bfloat16\[16\] in tx"),
    ):
        with pytest.raises(ValueError, match=match):
            fj.verify_state(tx, state, other)
    with pytest.raises(ValueError, match="that differ at .*for|trees that differ at"):
        fj.verify_state(tx, state, {"layer": {"kernel": params["layer"]["kernel"]}})


def test_a_new_field_of_a_projection_changes_no_state():
    """The same class as a later version has it, with one field more."""
    newer = dataclasses.make_dataclass(
        "Gaussian",
        [("accuracy", int, dataclasses.field(default=3))],
        bases=(fj.Gaussian,),
        frozen=True,
    )
    params = layer()
    state = momentum(projection=fj.Gaussian()).init(params)
    fj.verify_state(momentum(projection=newer()), state)
    fj.verify_state(momentum(projection=newer()), state, params)
    other = momentum(projection=newer(accuracy=4))
    with pytest.raises(ValueError, match="projection Gaussian.*accuracy=4"):
        fj.verify_state(other, state)


def test_an_injected_interval():
    """It has a word of its own, which is the same where init is traced."""
    make = optax.inject_hyperparams(fj.compressed_momentum)
    tx, other = (make(0.5, FOLDS, resample_every=every) for every in (4, 5))
    state = tx.init(layer())
    assert int(state.inner_state.spec[5]) == 4
    fj.verify_state(tx, state, layer())
    with pytest.raises(ValueError, match="resample_every 4 in the state, 5 in tx"):
        fj.verify_state(other, state)
    traced = jax.jit(tx.init)(layer())
    np.testing.assert_array_equal(traced.inner_state.spec, state.inner_state.spec)


def test_the_arguments_in_another_order():
    tx = momentum()
    with pytest.raises(TypeError, match="`tx` must be .*in the other order[?]$"):
        fj.verify_state(tx.init(layer()), tx)


def test_a_state_of_another_format_and_a_stacked_one():
    tx = momentum()
    state = tx.init(layer())
    with pytest.raises(ValueError, match="state format 2 in the state, 6 in tx"):
        fj.verify_state(tx, state._replace(spec=state.spec.at[0].set(2)))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(ValueError, match=r"`state.spec` must have shape .64,., got"):
        fj.verify_state(tx, stacked)


@pytest.mark.sample(1)
@every_sketching_case
def test_a_state_without_a_spec_is_refused(case):
    state = optax.tree.set(run_layer(case).states[0], spec=None)
    with pytest.raises(
        ValueError, match=r"must have the structure .* got specs at \[\]"
    ):
        fj.verify_state(case(), state)


@pytest.mark.sample(1)
@every_case
def test_the_state_of_another_optimizer_is_refused(case):
    for wrong in (optax.sgd(0.1), optax.adam(0.1)):
        for given in ((), (layer(),)):
            with pytest.raises(ValueError, match="structure"):
                fj.verify_state(case(), wrong.init(layer()), *given)


@pytest.mark.sample(1)
@every_sketching_case
def test_a_cast_state_is_refused(case):
    reference = run_layer(case)
    state = optax.tree.cast(reference.states[-1], jnp.bfloat16)
    with pytest.raises(TypeError, match=r"`state\.spec` must be uint32"):
        fj.verify_state(case(), state)
    with pytest.raises(TypeError, match=r"`state\.key` of .* must be uint32"):
        case().update(reference.grads[0], state, reference.params)
    with pytest.raises(TypeError, match=r"`state\.key` of .* must be uint32"):
        jax.eval_shape(case().update, reference.grads[0], state, reference.params)
