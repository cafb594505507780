"""States survive Orbax: saved in the background on one mesh, restored on another."""

import asyncio
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as v1
import pytest

import flora_jax as fj
from tests.common import assert_close, process_environment
from tests.conformance.cases import (
    CASES,
    DISTINCT,
    EVERY_K,
    RESAMPLE_EVERY,
    STEPS,
    assert_identical,
    layer,
    run_layer,
)
from tests.conformance.test_checkpoints import OTHERS, message, other

# Before an update that transfers or refreshes, amid a cycle of accumulation; after it,
# amid the same cycle; and when that cycle has ended.
PHASES = (4, 5, 6)
SPECS = {"layer": {"kernel": jax.P("data", "model"), "bias": jax.P("model")}}

# One worker does it all: the tests share what is saved.
pytestmark = pytest.mark.xdist_group("orbax")


def test_the_phases_are_of_every_kind():
    before, after, ended = PHASES
    assert (before % RESAMPLE_EVERY, after) == (0, before + 1)
    assert before % EVERY_K != 0
    assert after % EVERY_K != 0
    assert ended % EVERY_K == 0
    assert ended < STEPS


def layout(devices):
    """Shardings of the parameters on the first 8 or 4 devices, or on one."""
    if devices == 1:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda spec: one, SPECS)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    where = jax.make_mesh(
        (devices // 2, 2),
        ("data", "model"),
        axis_types=kinds,
        devices=jax.devices()[:devices],
    )
    return jax.tree.map(lambda spec: jax.NamedSharding(where, spec), SPECS)


def state_shardings(case, devices):
    params = jax.eval_shape(layer)
    if devices == 1:
        one = layout(1)["layer"]["bias"]
        return jax.tree.map(lambda _: one, jax.eval_shape(case().init, params))
    return fj.state_sharding(case(), params, layout(devices))


def abstract(devices, cases=CASES):
    """What a user restores into: shapes from init, shardings of the mesh at hand."""

    def of(case):
        state = jax.eval_shape(case().init, jax.eval_shape(layer))
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            state_shardings(case, devices),
        )

    return {case.name: [of(case)] * len(PHASES) for case in cases}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Restored states by number of devices, and the folder: saved on 8, then on 4."""
    folder = tmp_path_factory.mktemp("chain")
    given = {c.name: [run_layer(c).states[i] for i in PHASES] for c in CASES}
    state = jax.device_put(given, jax.tree.map(lambda x: x.sharding, abstract(8)))
    states = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for devices, targets in ((8, (8, 4)), (4, (1,))):
            path = folder / str(devices)
            checkpointer.save(path, state)  # In the background.
            checkpointer.wait_until_finished()
            for target in targets:
                states[target] = checkpointer.restore(path, abstract(target))
            state = states[targets[-1]]
    return states, folder


@pytest.mark.full
@pytest.mark.parametrize("devices", [pytest.param(8, marks=pytest.mark.slow), 4, 1])
def test_every_bit_is_restored_where_it_should_lie(chain, devices):
    found = chain[0][devices]
    for case in CASES:
        for state, phase in zip(found[case.name], PHASES, strict=True):
            assert_identical(state, run_layer(case).states[phase])
            fj.verify_state(case(), state)
        shardings = jax.tree.leaves(state_shardings(case, devices))
        parts = []
        for leaf, sharding in zip(jax.tree.leaves(state), shardings, strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            assert leaf.sharding.device_set == set(jax.devices()[:devices])
            parts.append(leaf.size // leaf.addressable_shards[0].data.size)
        # Sketches are in as many parts as there are devices, factored moments in half.
        assert max(parts) >= devices / 2


@pytest.mark.parametrize("devices", [4, 1])
@pytest.mark.parametrize("name", ["accumulation-adam", "galore-int8"])
def test_orbax_v1(name, devices, tmp_path):
    """Its next interface saves on one mesh and loads on another, every bit."""
    (case,) = (case for case in CASES if case.name == name)
    state = run_layer(case).states[PHASES[0]]
    saved = jax.device_put(state, state_shardings(case, 8))
    v1.save(tmp_path / "state", saved)
    wanted = abstract(devices, [case])[name][0]
    loaded = v1.load(tmp_path / "state", wanted)
    assert_identical(loaded, state)
    fj.verify_state(case(), loaded)
    for leaf, like in zip(*map(jax.tree.leaves, (loaded, wanted)), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def on_meshes():
    """On 4 devices, and some on 8; the others are run by hand."""
    for case in CASES:
        few = case.name in {"accumulation-adam", "galore-int8", "quantized"}
        for devices, chosen in ((4, case in DISTINCT), (8, few)):
            marks = pytest.mark.full if chosen else pytest.mark.slow
            yield pytest.param(case, devices, id=f"{case.name}-{devices}", marks=marks)


@pytest.mark.parametrize(("case", "devices"), list(on_meshes()))
def test_runs_continue_on_a_mesh(chain, case, devices):
    reference, where = run_layer(case), layout(devices)
    results = (where, state_shardings(case, devices))
    with jax.set_mesh(where["layer"]["bias"].mesh):
        step = jax.jit(reference.tx.update, out_shardings=results)
        params = jax.device_put(reference.params, where)
        for state, phase in zip(chain[0][devices][case.name], PHASES, strict=True):
            grads = jax.device_put(reference.grads[phase], where)
            never_saved = jax.device_put(reference.states[phase], results[1])
            expected = step(grads, never_saved, params)
            updates, state = step(grads, state, params)
            assert_identical((updates, state), expected)
            assert_close(updates, reference.updates[phase], "float32")
            assert_close(state, reference.states[phase + 1], "float32")


# What a user's next job does, on one device: it knows the settings and the folder.
RESUME = """
import sys
import jax, orbax.checkpoint
import flora_jax as fj
from tests.conformance.cases import CASES, STEPS, gradients, layer
from tests.conformance.test_checkpoints_orbax import PHASES, abstract

source, target = sys.argv[1:]
assert jax.device_count() == 1
checkpointer = orbax.checkpoint.StandardCheckpointer()
saved, params, results = checkpointer.restore(source, abstract(1)), layer(), {}
for case in CASES:
    tx = case()
    step, runs = jax.jit(tx.update), []
    for state, phase in zip(saved[case.name], PHASES):
        fj.verify_state(tx, state)
        # To the end from the first phase, and one update from each other.
        for i in range(phase, STEPS if phase == PHASES[0] else phase + 1):
            updates, state = step(gradients(params, i), state, params)
            runs.append(updates)
        runs.append(state)
    results[case.name] = runs
checkpointer.save(target, results)
checkpointer.close()
"""


def expected_of_resume(case):
    run, first = run_layer(case), PHASES[0]
    runs = [*run.updates[first:], run.states[-1]]
    for phase in PHASES[1:]:
        runs += [run.updates[phase], run.states[phase + 1]]
    return runs


@pytest.mark.full
def test_another_process_continues_on_one_device(chain, tmp_path):
    # All cases at once: most of the time goes into starting the process.
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", RESUME, str(chain[1] / "4"), str(tmp_path / "resumed")],
        cwd=root,
        env=process_environment(PYTHONPATH=str(root)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = {case.name: expected_of_resume(case) for case in CASES}
    one = layout(1)["layer"]["bias"]
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), expected
    )
    with ocp.StandardCheckpointer() as checkpointer:
        assert_identical(checkpointer.restore(tmp_path / "resumed", template), expected)


def held():
    """A folder for a checkpoint that is not made before an event, and the event."""
    event = threading.Event()

    class Held(ocp.path.atomicity.AtomicRenameTemporaryPath):
        async def create(self):
            assert await asyncio.to_thread(event.wait, timeout=60)
            return await super().create()

    return Held, event


def pointers(state):
    """Where the first devices' parts of the arrays are in memory."""
    parts = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(state)]
    return {part.unsafe_buffer_pointer() for part in parts}


@pytest.mark.sample(1)
@pytest.mark.parametrize("devices", [8, 1])
def test_what_is_saved_is_the_state_of_then(tmp_path, devices):
    # Training goes on before anything is written, and donates the state.
    case = next(case for case in CASES if case.name == "flora-momentum")
    reference, shardings = run_layer(case), state_shardings(case, devices)
    step = jax.jit(
        reference.tx.update,
        donate_argnums=1,
        out_shardings=(layout(devices), shardings),
    )
    params, grads = jax.device_put(
        (reference.params, reference.grads[0]), (layout(devices),) * 2
    )
    state = jax.device_put(jax.tree.map(jnp.copy, reference.states[4]), shardings)
    _, state = step(grads, state, params)
    before = pointers(state)
    _, state = step(grads, state, params)
    # Where nothing else reads them, the step writes over its state's buffers.
    assert len(before & pointers(state)) > len(before) / 2
    saved = jax.tree.map(jnp.copy, state)
    folder, event = held()
    with ocp.StandardCheckpointer(temporary_path_class=folder) as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        for _ in range(3):
            _, state = step(grads, state, params)
        jax.block_until_ready(state)
        assert not list(tmp_path.iterdir())
        event.set()
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "state", abstract(devices, [case])[case.name][0]
        )
    assert_identical(restored, saved)
    assert int(state[0].count) == int(saved[0].count) + 3


def test_restored_states_of_other_settings_are_refused(tmp_path):
    made = [other(*row[:3]) for row in OTHERS]
    shapes = jax.eval_shape(layer)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", [tx.init(layer()) for _, tx in made])
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "states", [jax.eval_shape(tx.init, shapes) for tx, _ in made]
        )
    for row, (tx, saving), state in zip(OTHERS, made, restored, strict=True):
        fj.verify_state(saving, state)
        with pytest.raises(ValueError, match=message(*row[1:])):
            fj.verify_state(tx, state)
