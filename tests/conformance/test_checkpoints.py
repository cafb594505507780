"""States survive msgpack and equinox's serialization bit by bit, at every phase."""

import io
import re

import equinox
import flax.serialization
import jax
import pytest

import flora_jax as fj
from flora_jax.leaves.spec import describe
from tests.conformance.cases import (
    CASES,
    EVERY_K,
    RESAMPLE_EVERY,
    STEPS,
    assert_identical,
    every_case,
    layer,
    run_layer,
)
from tests.conformance.states import COUNTERS, own_states


def test_the_phases_are_of_every_kind():
    # Each of a cycle of accumulation; before an update that changes a basis, and after.
    assert STEPS > EVERY_K
    assert STEPS > RESAMPLE_EVERY + 1


@pytest.mark.sample(1)
@every_case
def test_the_template_is_not_the_state(case):
    # Or the tests below would pass without restoring anything.
    for state in run_layer(case).states[1:]:
        for own in own_states(state):
            assert sum(int(getattr(own, name)) for name in COUNTERS[type(own)]) > 0


def through_bytes(state, template):
    data = flax.serialization.to_bytes(state)
    return flax.serialization.from_bytes(template, data)


def through_a_state_dict(state, template):
    # As TrainState does: names and no types, then back into a template.
    names = jax.device_get(flax.serialization.to_state_dict(state))
    data = flax.serialization.msgpack_serialize(names)
    restored = flax.serialization.msgpack_restore(data)
    return flax.serialization.from_state_dict(template, restored)


def through_equinox(state, template):
    file = io.BytesIO()
    equinox.tree_serialise_leaves(file, state)
    file.seek(0)
    return equinox.tree_deserialise_leaves(file, template)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "through", [through_bytes, through_a_state_dict, through_equinox]
)
@every_case
def test_every_phase_continues(case, through):
    reference = run_layer(case)
    template = reference.tx.init(reference.params)
    for phase in range(STEPS):
        state = through(reference.states[phase], template)
        assert_identical(state, reference.states[phase])
        # What follows from it is the state after it: so each phase needs one update.
        updates, state = reference.step(reference.grads[phase], state, reference.params)
        assert_identical(updates, reference.updates[phase])
        assert_identical(state, reference.states[phase + 1])
    assert len(reference.traces) == 1
    fj.verify_state(reference.tx, state)


# Other settings under which the state has the same arrays.
OTHERS = [
    ("momentum-paper-gaussian", "projection", fj.Rademacher(), fj.Gaussian()),
    ("momentum-residual-countsketch", "resample_every", 5, RESAMPLE_EVERY),
    ("flora-weight-decay", "resample_every", 5, RESAMPLE_EVERY),
    ("galore", "refresh_every", 5, RESAMPLE_EVERY),
    ("accumulation-adam", "key", 7, 0),
    ("quantized", "min_size", 3, 1),
]


def other(name, setting, value):
    """A case, and it under another setting."""
    case = next(case for case in CASES if case.name == name)
    return case(), case(**{setting: value})


def message(setting, value, ours):
    if setting == "key":
        setting, value, ours = "key data", [0, value], [0, ours]
    elif setting == "projection":
        value, ours = describe(value), describe(ours)
    return re.escape(f"{setting} {value} in the state, {ours} in tx")


# flax does not compare shapes, so that a state of another rank comes this far.
@pytest.mark.parametrize(
    ("name", "setting", "value", "ours"), [*OTHERS, ("flora-momentum", "rank", 3, 4)]
)
def test_a_restored_state_of_other_settings_is_refused(name, setting, value, ours):
    tx, saving = other(name, setting, value)
    state = saving.init(layer())
    restored = through_bytes(state, tx.init(layer()))
    assert_identical(jax.tree.leaves(restored), jax.tree.leaves(state))
    fj.verify_state(saving, restored)
    with pytest.raises(ValueError, match=message(setting, value, ours)):
        fj.verify_state(tx, restored)


def test_a_restored_state_may_go_on_with_other_rates():
    tx, saving = other("momentum-paper-gaussian", "decay", 0.4)
    fj.verify_state(tx, through_bytes(saving.init(layer()), tx.init(layer())))
