"""verify_state knows a transformation's own state, in any wrapper, from another's."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import flora_jax as fj
from tests.conformance.cases import (
    CASES,
    RESAMPLE_EVERY,
    SKETCHING,
    layer,
    run_layer,
)

LABELS = {"layer": {"kernel": "a", "bias": "b"}}
MASK = {"layer": {"kernel": True, "bias": False}}


def inject(case, **changes):
    make = optax.inject_hyperparams(
        case.factory, static_args=fj.static_args(case.factory)
    )
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
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
sketching = pytest.mark.parametrize("case", SKETCHING, ids=lambda case: case.name)


@wrappers
@every_case
def test_its_own_state_passes(case, wrap):
    fj.verify_state(wrap(case), wrap(case).init(layer()))


@every_case
def test_its_own_state_passes_after_updates(case):
    fj.verify_state(case(), run_layer(case).states[-1])


@wrappers
@sketching
def test_another_seed_is_refused_in_any_wrapper(case, wrap):
    state = wrap(case, key=1).init(layer())
    with pytest.raises(ValueError, match=r"key data \[0, 1\] in the state, \[0, 0\]"):
        fj.verify_state(wrap(case), state)


@pytest.mark.parametrize("seed", [0, 1])
@sketching
def test_the_state_of_an_nnx_optimizer(case, seed):
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, case(key=seed), wrt=nnx.Param)
    verify = functools.partial(fj.verify_state, case(), optimizer.opt_state)
    if seed == 0:
        verify()
    else:
        with pytest.raises(ValueError, match=r"key data \[0, 1\] in the state"):
            verify()


# Projections whose states have the same arrays. Others are isometric already.
OTHER = {
    fj.Gaussian(): fj.CountSketch(),
    fj.CountSketch(scale="isometric"): fj.Orthogonal(scale="isometric"),
    fj.TopSVD(): fj.TopSVD(method="randomized"),
    fj.TopSVD(method="randomized"): fj.TopSVD(),
    fj.TopDCT(): fj.TopDCT(norm="l2"),
}


def other_settings():
    """(case, argument, another value of it, what the message says of both)."""
    for case in SKETCHING:
        ours = case.option("projection")
        other = OTHER.get(ours, fj.CountSketch(scale="isometric"))
        yield case, "projection", other, f"{other} in the state, {ours} in tx"
        yield case, "key", 7, r"[0, 7] in the state, [0, 0] in tx"
        yield case, "rank", 3, "3 in the state, 4 in tx"
        yield case, "side", "right", "right in the state, smaller in tx"
        for name in ("resample_every", "refresh_every"):
            if case.takes(name):
                other = RESAMPLE_EVERY + 1
                message = f"{other} in the state, {RESAMPLE_EVERY} in tx"
                yield case, name, other, message
        if case.takes("use_grad_mean"):
            yield case, "use_grad_mean", False, "False in the state, True in tx"


@pytest.mark.parametrize(
    ("case", "name", "value", "message"),
    [
        pytest.param(*row, id="-".join([row[0].name, row[1]]))
        for row in other_settings()
    ],
)
def test_other_settings_are_refused(case, name, value, message):
    state = case(**{name: value}).init(layer())
    with pytest.raises(ValueError, match="made under other settings") as error:
        fj.verify_state(case(), state)
    assert f"{name} " in str(error.value)
    assert message in str(error.value)


@sketching
def test_a_state_without_a_spec_is_refused(case):
    state = optax.tree.set(run_layer(case).states[0], spec=None)
    with pytest.raises(ValueError, match=r"must hold the specs .* got specs at \[\]"):
        fj.verify_state(case(), state)


@pytest.mark.parametrize(
    "wrong", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"]
)
@every_case
def test_the_state_of_another_optimizer_is_refused(case, wrong):
    with pytest.raises(ValueError, match="structure"):
        fj.verify_state(case(), wrong.init(layer()))


@sketching
def test_a_cast_state_is_refused(case):
    reference = run_layer(case)
    state = optax.tree.cast(reference.states[-1], jnp.bfloat16)
    with pytest.raises(TypeError, match=r"`state\.spec` must be uint32"):
        fj.verify_state(case(), state)
    with pytest.raises(TypeError, match=r"`state\.key` of .* must be uint32"):
        case().update(reference.grads[0], state, reference.params)
    with pytest.raises(TypeError, match=r"`state\.key` of .* must be uint32"):
        jax.eval_shape(case().update, reference.grads[0], state, reference.params)
