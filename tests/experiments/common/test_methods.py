"""Every method of the command lines next to the chain that it names."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from experiments.common.methods import (
    FINETUNE,
    MAIN,
    METHODS,
    Settings,
    built,
    matrices,
    settings_of,
    with_options,
)
from experiments.finetune.config import Config as FinetuneConfig

PARAMS = {
    "h": {"kernel": jnp.ones((128, 256))},
    "wte": {"embedding": jnp.ones((128, 256))},
}
SKETCH = fj.Sketch(16, key=3, mask=fj.not_embeddings)
MINI = fj.Sketch(1, key=3, mask=fj.not_embeddings)


def gradients(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), PARAMS)


def make(name, rate=0.1, **changes):
    return METHODS[name].optimizer(rate, Settings(SKETCH, **changes))


def two_updates(tx):
    state, found = tx.init(PARAMS), []
    for seed in range(2):
        updates, state = jax.jit(tx.update)(gradients(seed), state, PARAMS)
        found.append(updates)
    return found


def ema_sgd():
    return optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.1))


SAME = {
    ("none", "adafactor"): lambda: optax.adafactor(0.1),
    ("none", "adam"): lambda: optax.adam(0.1, b1=0.9),
    ("none", "sgd"): lambda: optax.sgd(0.1),
    ("full_momentum", "adafactor"): lambda: optax.adafactor(0.1, momentum=0.9),
    ("full_momentum", "sgd"): ema_sgd,
    ("adafactor", "sgd"): lambda: optax.adafactor(0.1),
    ("adafactor_momentum", "sgd"): lambda: optax.adafactor(0.1, momentum=0.9),
    ("adam", "sgd"): lambda: optax.adam(0.1),
    ("adamw", "sgd"): lambda: optax.adamw(0.1, weight_decay=0.0),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize(("name", "base"), SAME)
def test_uncompressed_ones_are_optaxs(name, base):
    expected = two_updates(SAME[name, base]())
    found = two_updates(make(name, base=base))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.sample(1)
@pytest.mark.parametrize("base", ["adafactor", "sgd"])
def test_sketched_momentum(base):
    """Smaller state; the embedding's update is that of the full momentum."""
    tx = make("flora_momentum", base=base)
    momentum = optax.tree.get(tx.init(PARAMS), METHODS["flora_momentum"].buffer)
    assert momentum["h"]["kernel"].shape == (16, 256)
    assert momentum["wte"]["embedding"].shape == (128, 256)
    if base == "sgd":
        full = two_updates(ema_sgd())
        for ours, theirs in zip(two_updates(tx), full, strict=True):
            np.testing.assert_allclose(
                ours["wte"]["embedding"],
                theirs["wte"]["embedding"],
                rtol=1e-5,
                atol=1e-8,
            )


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["full_accumulation", "flora_accumulation"])
def test_accumulation(name):
    tx = make(name, base="sgd", micro_batches=2)
    assert optax.tree.get(tx.init(PARAMS), METHODS[name].buffer) is not None
    first, second = two_updates(tx)
    assert all(not leaf.any() for leaf in jax.tree.leaves(first))
    mean = jax.tree.map(lambda a, b: -0.1 * (a + b) / 2, gradients(0), gradients(1))
    np.testing.assert_allclose(
        second["wte"]["embedding"], mean["wte"]["embedding"], atol=1e-6
    )
    exact = np.allclose(second["h"]["kernel"], mean["h"]["kernel"], atol=1e-6)
    assert exact == (name == "full_accumulation")


def test_adam_has_no_other_momentum():
    with pytest.raises(ValueError, match="`base` must be adafactor or sgd.*got 'adam'"):
        make("flora_momentum", base="adam")


def projected(projection):
    return dataclasses.replace(SKETCH, projection=projection)


INTERVAL = {"refresh_every": 20, "b2": 0.9}
RECIPES = {
    "flora": lambda: fj.flora(1.0, SKETCH, resample_every=20, estimator="paper"),
    "galore": lambda: fj.galore(1.0, SKETCH, **INTERVAL),
    "fira": lambda: fj.fira(1.0, SKETCH, **INTERVAL),
    "apollo": lambda: fj.apollo(1.0, SKETCH, **INTERVAL),
    "apollo_mini": lambda: fj.apollo_mini(1.0, MINI, **INTERVAL),
    "dct_adamw": lambda: fj.dct_adamw(1.0, SKETCH, b2=0.9, refresh_every=1),
    "flora_adamw": lambda: fj.flora_adamw(1.0, SKETCH, **INTERVAL),
    "flora_adamw_int8": lambda: fj.flora_adamw(
        1.0, SKETCH, state_dtype="int8", **INTERVAL
    ),
    "flora_muon": lambda: fj.flora_muon(1.0, SKETCH, refresh_every=20),
    "flora_muon_rows": lambda: fj.flora_muon(
        1.0, SKETCH, refresh_every=20, method=fj.RowNormalization()
    ),
    "flora_muon_bfloat16": lambda: fj.flora_muon(
        1.0, SKETCH, refresh_every=20, method=fj.NewtonSchulz(dtype="bfloat16")
    ),
    "flora_gaussian": lambda: fj.flora(
        1.0, projected(fj.Gaussian()), resample_every=20, estimator="paper"
    ),
    "flora_rademacher": lambda: fj.flora(
        1.0, projected(fj.Rademacher()), resample_every=20, estimator="paper"
    ),
    "flora_orthogonal": lambda: fj.flora(
        1.0, projected(fj.Orthogonal()), resample_every=20, estimator="paper"
    ),
    "flora_srht": lambda: fj.flora(
        1.0, projected(fj.SRHT()), resample_every=20, estimator="paper"
    ),
    "flora_paper": lambda: fj.flora(1.0, SKETCH, resample_every=20, estimator="paper"),
    "flora_fresh": lambda: fj.flora(1.0, SKETCH, resample_every=20, estimator="fresh"),
    "flora_residual": lambda: fj.flora(
        1.0, SKETCH, resample_every=20, estimator="residual"
    ),
    "galore_exact": lambda: fj.galore(
        1.0, projected(fj.TopSVD(method="exact")), **INTERVAL
    ),
    "lora_adamw": lambda: optax.adamw(1.0, b2=0.9, weight_decay=0.0),
    "adamw_int8": lambda: fj.quantize_state(
        optax.adamw(1.0, b2=0.9, weight_decay=0.0), "int8"
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    """Rank, key, projection and interval are in what the state says of itself."""
    state = make(name, 1.0, **INTERVAL).init(PARAMS)
    fj.verify_state(RECIPES[name](), state)
    expected = RECIPES[name]().init(PARAMS)
    for ours, theirs in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_all_methods_are_tested():
    kept = {"flora_momentum", "full_accumulation", "flora_accumulation"}
    elsewhere = {"sketched_accumulation", "lora_accumulation", "lora_momentum"}
    elsewhere |= {"optax_galore", "sgd"}  # In step_time.
    muons = {"muon", "sketched_muon", "adamw_orthogonal"}  # In sweep/test_bench.
    assert set(METHODS) == (
        {name for name, _ in SAME} | set(RECIPES) | kept | elsewhere | muons
    )
    assert set(MAIN) < set(FINETUNE) < set(METHODS)
    assert len(set(METHODS)) == len({method.title for method in METHODS.values()})


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["adamw", "adamw_orthogonal", "apollo_mini"])
def test_decay_and_mask(name):
    """The embedding is Adam's, without weight decay and with the decay that is set."""
    first, second = (gradients(seed)["wte"]["embedding"] for seed in range(2))
    updates = two_updates(make(name, 1.0, b2=0.9))[1]["wte"]["embedding"]
    mu = (0.1 * 0.9 * first + 0.1 * second) / (1 - 0.9**2)
    nu = (0.1 * 0.9 * first**2 + 0.1 * second**2) / (1 - 0.9**2)
    expected = -mu / np.sqrt(nu)
    np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-4)


def test_apollo_mini_has_rank_one():
    """Whatever the rank of the settings, which is that of the other methods."""
    state = make("apollo_mini", 1.0, **INTERVAL).init(PARAMS)
    assert not METHODS["apollo_mini"].ranked
    fj.verify_state(fj.apollo_mini(1.0, MINI, **INTERVAL), state)


def test_matrices():
    assert matrices(PARAMS) == {"h": {"kernel": True}, "wte": {"embedding": False}}


def test_options_replace_what_is_shared():
    options = {"b2": 0.5, "projection": "SRHT", "side": "larger"}
    settings = with_options(Settings(SKETCH, b2=0.9), options)
    assert settings.sketch.projection == fj.SRHT()
    assert settings.sketch.side == "larger"
    assert settings.sketch.rank == 16
    assert settings.options == {"b2": 0.5}
    with pytest.raises(TypeError, match="rang"):
        make("flora", options={"rang": 4})


def test_objects_of_json():
    assert built("TopSVD") == fj.TopSVD()
    assert built({"TopSVD": {"method": "exact"}}) == fj.TopSVD(method="exact")
    assert built({"Fira": {"limiter": None}}) == fj.Fira(limiter=None)
    assert [built(x) for x in (None, 0.5, True, "int8")] == [None, 0.5, True, "int8"]


def test_settings_of_a_job():
    config = FinetuneConfig(
        optimizer="sgd", momentum=0.5, resample_every=7, projection="SRHT", seed=2
    )
    expected = fj.Sketch(8, fj.SRHT(), key=2, mask=fj.not_embeddings)
    found = settings_of(config, 8, b2=0.7)
    assert found == Settings(expected, "sgd", config.micro_batches, 0.5, 0.7, 7)
    sketch = settings_of(config, None, seed=5).sketch
    assert (sketch.rank, sketch.key) == (1, fj.Sketch(1, key=5).key)


def test_names_are_read_without_jax():
    code = "import sys, experiments.common.methods; print('jax' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert found.stdout == "False\n"
