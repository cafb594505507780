"""States survive Orbax, flax's msgpack and equinox's serialisation bit by bit."""

import io
import os
import pathlib
import pickle
import subprocess
import sys

import equinox
import flax.serialization
import jax
import orbax.checkpoint
import pytest

import flora_jax as fj
from tests.conformance.cases import (
    CASES,
    EVERY_K,
    RESAMPLE_EVERY,
    STEPS,
    assert_identical,
    run_layer,
)
from tests.conformance.states import COUNTERS, own_states

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

# One micro-step into a cycle of accumulation, and the next update transfers momentum.
PHASE = 4

# What a user's next job does: it knows the settings and the folder, nothing else.
RESUME = """
import pickle, sys
import jax, orbax.checkpoint
import flora_jax as fj
from tests.conformance.cases import CASES, STEPS, gradients, jit, layer

folder, phase = sys.argv[1], int(sys.argv[2])
params = layer()
abstract = {c.name: jax.eval_shape(c().init, params) for c in CASES}
with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    states = checkpointer.restore(folder + "/states", abstract)
results = {}
for case in CASES:
    tx, state = case(), states[case.name]
    fj.verify_state(tx, state)
    step = jit(tx.update)
    updates = []
    for i in range(phase, STEPS):
        update, state = step(gradients(params, i), state, params)
        updates.append(update)
    results[case.name] = jax.device_get((updates, jax.tree.leaves(state)))
with open(folder + "/results.pickle", "wb") as file:
    pickle.dump(results, file)
"""


def test_the_phase_is_amid_a_cycle_and_before_a_transfer():
    assert PHASE % EVERY_K != 0
    assert PHASE % RESAMPLE_EVERY == 0
    assert STEPS > PHASE + RESAMPLE_EVERY


def test_orbax_in_another_process(tmp_path):
    # All cases at once: most of the time goes into starting the process.
    states = {case.name: run_layer(case).states[PHASE] for case in CASES}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", RESUME, str(tmp_path), str(PHASE)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    resumed = pickle.loads((tmp_path / "results.pickle").read_bytes())
    uninterrupted = {
        case.name: (run.updates[PHASE:], jax.tree.leaves(run.states[-1]))
        for case in CASES
        for run in [run_layer(case)]
    }
    assert_identical(resumed, jax.device_get(uninterrupted))


def continue_from(case, state):
    """Continues the run of a case from a restored state, and compares."""
    reference = run_layer(case)
    assert_identical(state, reference.states[PHASE])
    fj.verify_state(reference.tx, state)
    for i in range(PHASE, STEPS):
        updates, state = reference.step(reference.grads[i], state, reference.params)
        assert_identical(updates, reference.updates[i])
    assert_identical(state, reference.states[-1])


@every_case
def test_flax_msgpack(case):
    reference = run_layer(case)
    data = flax.serialization.to_bytes(reference.states[PHASE])
    template = reference.tx.init(reference.params)
    continue_from(case, flax.serialization.from_bytes(template, data))


@every_case
def test_flax_msgpack_through_a_state_dict(case):
    # As TrainState does: names and no types, then back into a template.
    reference = run_layer(case)
    names = flax.serialization.to_state_dict(reference.states[PHASE])
    restored = flax.serialization.msgpack_restore(
        flax.serialization.msgpack_serialize(jax.device_get(names))
    )
    template = reference.tx.init(reference.params)
    continue_from(case, flax.serialization.from_state_dict(template, restored))


@every_case
def test_equinox(case):
    reference = run_layer(case)
    file = io.BytesIO()
    equinox.tree_serialise_leaves(file, reference.states[PHASE])
    file.seek(0)
    template = reference.tx.init(reference.params)
    continue_from(case, equinox.tree_deserialise_leaves(file, template))


@every_case
def test_the_template_is_not_the_state(case):
    # Or the tests above would pass without restoring anything.
    reference = run_layer(case)
    for own in own_states(reference.states[PHASE]):
        counts = [int(getattr(own, field)) for field in COUNTERS[type(own)]]
        assert sum(counts) > 0
