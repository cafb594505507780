"""Two thousand steps, a million, and the largest number of an int32 counter."""

import functools
import gc
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from flora_jax.random.keys import leaf_keys, renewal
from tests.common import assert_close
from tests.conformance.cases import (
    CASES,
    assert_identical,
    each_of,
    every_case,
    run_layer,
)
from tests.conformance.states import COUNTERS, INNER, own_states

MILLION = 10**6
LAST = 2**31 - 1
quick_and_slow = pytest.mark.parametrize(
    "steps", [10**4, pytest.param(MILLION, marks=pytest.mark.slow)]
)


def words(pairs):
    """Two uint32 words in the last axis as one uint64."""
    return np.ascontiguousarray(pairs).view(np.uint64).ravel()


@pytest.mark.full
def test_no_two_keys_of_a_million_epochs_are_equal():
    """Over leaves and names too.

    Within one leaf that is certain: its keys are one block cipher's values at different
    places. Between leaves the keys are as good as random words of 64 bits, of which N =
    6 million have two equal ones with probability N²/2^65 = 1e-6.
    """
    root, paths = jnp.array([0, 7], jnp.uint32), ["a", "b/kernel", "h/0/attn"]
    found = []
    for name in ("compressed_momentum", "compressed_accumulation"):
        keys = jax.jit(jax.vmap(functools.partial(leaf_keys, root, name, paths)))
        found.append(words(keys(jnp.arange(MILLION))))
    found = np.sort(np.concatenate(found))
    assert found.size == 6 * MILLION
    assert (found[1:] != found[:-1]).all()


@pytest.mark.full
@pytest.mark.parametrize(
    "epochs", [10**5, pytest.param(MILLION, marks=pytest.mark.slow)]
)
def test_no_projection_comes_twice(epochs):
    """All 64 signs of one are never those of another, and next ones are independent."""
    root, rank, part = jnp.array([0, 7], jnp.uint32), 8, 10**5

    @jax.jit
    @jax.vmap
    def sampled(epoch):
        (key,) = leaf_keys(root, "compressed_momentum", ["w"], epoch)
        signs, _, offsets, _ = fj.CountSketch().sample(key, rank, 64)
        return signs > 0, offsets

    parts = [
        jax.tree.map(np.asarray, sampled(start + jnp.arange(part)))
        for start in range(0, epochs, part)
    ]
    signs, offsets = (np.concatenate(x) for x in zip(*parts, strict=True))
    packed = words(np.packbits(signs, axis=1))
    # Equal by chance with probability N²/2^65 < 1e-7.
    assert np.unique(packed).size == epochs
    for array, chance in ((signs, 1 / 2), (offsets, 1 / rank)):
        same = array[1:] == array[:-1]
        error = (chance * (1 - chance) / same.size) ** 0.5
        assert abs(same.mean() - chance) < 5 * error


# Of short memory: after 120 steps nothing is left of what came before.
TAIL, EVERY = 120, 3
SKETCH = fj.Sketch(1, min_dim_size=2)
AVERAGE = optax.ema(0.5, debias=False)
TRANSFORMATIONS = {
    "momentum": fj.compressed_momentum(0.5, SKETCH, resample_every=EVERY),
    "accumulation": fj.compressed_accumulation(AVERAGE, EVERY, SKETCH),
    "subspace": fj.scale_in_subspace(
        AVERAGE, SKETCH, EVERY, transport=fj.Squared(), stagger=True
    ),
    "quantized": fj.quantize_state(AVERAGE, min_size=1),
    "factored-rms": fj.scale_by_factored_rms(rules=fj.LeafRules(min_dim_size=2)),
}
SMALL = {"w": jnp.zeros((2, 4)), "b": jnp.zeros(2)}


@functools.cache
def advance(name):
    """Real updates from one step to another, in one loop; the last update and state."""

    @jax.jit
    def run(state, start, stop):
        def body(i, carry):
            turn = 0.7 * (i % 1000).astype(jnp.float32)
            grads = jax.tree.map(
                lambda x: jnp.cos(turn + jnp.arange(x.size)).reshape(x.shape), SMALL
            )
            return TRANSFORMATIONS[name].update(grads, carry[1], SMALL)

        return jax.lax.fori_loop(start, stop, body, (SMALL, state))

    return run


def counters_at(state, step):
    """Those of a state of one of ours after so many steps, by field."""
    values = (step,)
    if isinstance(state, fj.CompressedAccumulationState):
        values = step % EVERY, step // EVERY
    return dict(zip(COUNTERS[type(state)], values, strict=True))


@pytest.mark.sample(1)
@quick_and_slow
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_updates_after_a_long_run(name, steps):
    first = TRANSFORMATIONS[name].init(SMALL)
    updates, state = advance(name)(first, 0, steps)
    expected = counters_at(state, steps)
    assert {field: int(getattr(state, field)) for field in expected} == expected
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, first)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    if hasattr(state, "key"):
        assert_identical([state.key, state.spec], [first.key, first.spec])
    if name == "factored-rms":
        return  # It never forgets.
    # What a fresh state gives that begins shortly before: nothing has drifted, and the
    # projections are those of their step.
    begin = steps - TAIL
    late = {k: jnp.int32(v) for k, v in counters_at(first, begin).items()}
    if name == "momentum":
        late["epoch"] = jnp.int32(begin // EVERY)
    again = advance(name)(first._replace(**late), begin, steps)
    ours, theirs = (
        # Without the counters: those of inner transformations began at zero.
        [x for x in jax.tree.leaves(tree) if x.ndim]
        for tree in ((updates, state), again)
    )
    assert_close(ours, theirs, "float32")
    assert advance(name)._cache_size() == 1


def saturated(state, value=LAST):
    """The state with all counters of ours, and of Adam, at the largest int32."""

    def is_counted(x):
        return type(x) in COUNTERS or isinstance(x, optax.ScaleByAdamState)

    def fill(x):
        if not is_counted(x):
            return x
        fields = dict.fromkeys(COUNTERS.get(type(x), ("count",)), jnp.int32(value))
        if type(x) in INNER:
            fields[INNER[type(x)]] = saturated(getattr(x, INNER[type(x)]), value)
        return x._replace(**fields)

    return jax.tree.map(fill, state, is_leaf=is_counted)


@pytest.mark.sample(1)
@every_case
def test_counters_stay_at_the_largest_number(case):
    reference = run_layer(case)
    first = state = saturated(reference.states[5])
    programs = reference.step._cache_size()  # Other tests have run it elsewhere.
    for grads in reference.grads[:4]:
        updates, state = reference.step(grads, state, reference.params)
        for x in jax.tree.leaves((updates, state)):
            assert np.isfinite(np.asarray(x, np.float64)).all()
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, first)
        for own, before in zip(own_states(state), own_states(first), strict=True):
            counts = {field: int(getattr(own, field)) for field in COUNTERS[type(own)]}
            # A cycle of accumulation still ends, and the next one begins.
            assert counts.pop("mini_step", 0) in range(3)
            assert set(counts.values()) == {LAST}
            if hasattr(own, "key"):
                assert_identical(own.key, before.key)
    assert reference.step._cache_size() == programs


@pytest.mark.sample(1)
@each_of([c for c in CASES if c.factory is fj.compressed_momentum])
def test_the_projection_stands_still_where_the_counter_does(case):
    """As within one interval, of which the largest number is the fourth step."""
    reference = run_layer(case)
    still = saturated(reference.states[5])
    moving = saturated(reference.states[5], LAST - 2)
    for grads in reference.grads[:3]:
        ours, still = reference.step(grads, still, reference.params)
        theirs, moving = reference.step(grads, moving, reference.params)
        assert_identical((ours, still.momentum), (theirs, moving.momentum))


@pytest.mark.full
def test_a_projection_for_every_step_stands_still_too():
    """Without transfers to where the momentum is already."""
    shape, rank, decay = (16, 24), 4, 0.3
    sketch = fj.Sketch(rank, key=11, min_dim_size=8)
    tx = fj.compressed_momentum(decay, sketch, resample_every=1, estimator="paper")
    root, name = jnp.array([0, 11], jnp.uint32), "compressed_momentum"

    @jax.jit
    @jax.vmap
    def matrix(epoch):
        (key,) = leaf_keys(root, name, ["wide"], epoch)
        return fj.CountSketch().matrix(key, rank, 16)

    matrices = np.asarray(matrix(LAST - 3 + jnp.arange(3)), np.float64)
    rng, step = np.random.default_rng(0), jax.jit(tx.update)
    near = jnp.int32(LAST - 3)
    state = tx.init({"wide": jnp.zeros(shape)})._replace(count=near, epoch=near)
    assert state.momentum["wide"].shape == (rank, 24)
    momentum, old = np.zeros((rank, 24)), None
    for i in (0, 1, 2, 2, 2):
        gradient, s = rng.normal(size=shape), matrices[i]
        if old is not None and i != old:
            momentum = s @ matrices[old].T @ momentum
        momentum = decay * momentum + (1 - decay) * s @ gradient
        updates, state = step({"wide": jnp.float32(gradient)}, state)
        assert_close(updates["wide"], s.T @ momentum, "float32")
        old = i
    assert int(state.count) == LAST


def test_renewals_by_whole_numbers():
    """Around the beginning, a change, and the end of int32; ahead by an offset or not.

    Ahead of the largest int32, an offset once made the epoch negative.
    """
    counts = [0, 1, 3, 4, 5, 1000, LAST - 4, LAST - 3, LAST - 2, LAST - 1, LAST]
    offsets = np.arange(4)
    for every in (1, 4, 1000):
        renewed = jax.jit(lambda count, every=every: renewal(count, every, offsets))
        for count in counts:
            epochs, new = jax.tree.map(np.asarray, renewed(jnp.int32(count)))
            assert epochs.dtype == jnp.uint32
            for i, offset in enumerate(offsets.tolist()):
                ahead = min(count, LAST - 1) + offset
                assert int(epochs[i]) == ahead // every
                due = ahead % every == 0 and 0 < count < LAST
                assert bool(new[i]) == due, (every, count, offset)


def resident():
    """Bytes of memory that this process holds."""
    return 4096 * int(pathlib.Path("/proc/self/statm").read_text().split()[1])


def grown(step, state, warm_up=200, steps=2000):
    """Bytes and live arrays that the steps after the warm-up have added."""
    for i in range(steps):
        if i == warm_up:
            gc.collect()
            before = resident(), len(jax.live_arrays())
        state = step(i, state)
    jax.block_until_ready(state)
    gc.collect()
    return resident() - before[0], len(jax.live_arrays()) - before[1]


LONG = ("accumulation-adam", "flora-momentum")
CASES_BY_TIER = [
    pytest.param(
        case,
        id=case.name,
        marks=pytest.mark.full if case.name in LONG else pytest.mark.slow,
    )
    for case in CASES
]


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/statm").exists(), reason="reads Linux's /proc"
)
class TestMemory:
    @pytest.mark.parametrize("case", CASES_BY_TIER)
    def test_is_flat_over_two_thousand_steps(self, case):
        reference = run_layer(case)

        def step(i, state):
            grads = reference.grads[i % len(reference.grads)]
            return reference.step(grads, state, reference.params)[1]

        programs = reference.step._cache_size()
        size, arrays = grown(step, reference.states[0])
        print(f"{case.name}: {size / 2**20:+.2f} MiB, {arrays:+d} arrays")
        assert arrays == 0
        # What python and jax lose outside of arrays: about 1 KiB a step would show.
        assert size < 2 * 2**20
        assert reference.step._cache_size() == programs

    @pytest.mark.full
    def test_of_a_run_that_keeps_its_states_is_not(self):
        kept, add = [], jax.jit(lambda x: x + 1)

        def step(i, state):
            kept.append(state)
            return add(state)

        # Of 900 MiB: some was free before, up to 90 after the tests that came before.
        size, arrays = grown(step, jnp.zeros(32 * 4096))
        assert arrays == 1800
        assert size > 450 * 2**20
