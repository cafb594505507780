"""Every optimizer of the command lines, beside the optax chain that it names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from experiments.common import optimizers
from experiments.family.recipes import FAMILY, Setting

PARAMS = {
    "h": {"kernel": jnp.ones((128, 256))},
    "wte": {"embedding": jnp.ones((128, 256))},
}


def gradients(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), PARAMS)


def recipe(**changes):
    settings = {
        "accumulation": "none",
        "momentum": "none",
        "micro_batches": 2,
        "b1": 0.9,
        "rank": 16,
        "resample_every": 1000,
        "reading": "paper",
        "projection": "CountSketch",
        "seed": 0,
        "sketched_gradients": False,
    }
    return optimizers.Recipe(**(settings | changes))


def two_updates(tx):
    state, found = tx.init(PARAMS), []
    for seed in range(2):
        updates, state = jax.jit(tx.update)(gradients(seed), state, PARAMS)
        found.append(updates)
    return found


def ema_sgd():
    return optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.1))


SAME = {
    ("adafactor", "none"): lambda: optax.adafactor(0.1),
    ("adafactor", "full"): lambda: optax.adafactor(0.1, momentum=0.9),
    ("adam", "none"): lambda: optax.adam(0.1, b1=0.9),
    ("sgd", "none"): lambda: optax.sgd(0.1),
    ("sgd", "full"): ema_sgd,
}


@pytest.mark.parametrize(("base", "momentum"), SAME)
def test_uncompressed_ones_are_optaxs(base, momentum):
    tx = optimizers.make(recipe(base=base, momentum=momentum), 0.1)
    expected = two_updates(SAME[base, momentum]())
    jax.tree.map(np.testing.assert_array_equal, two_updates(tx), expected)


@pytest.mark.parametrize("base", ["adafactor", "sgd"])
def test_sketched_momentum(base):
    """Smaller state; the embedding's update is that of the full momentum."""
    tx = optimizers.make(recipe(base=base, momentum="flora"), 0.1)
    momentum = optax.tree.get(tx.init(PARAMS), "momentum")
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


@pytest.mark.parametrize("kept", ["full", "flora"])
def test_accumulation(kept):
    tx = optimizers.make(recipe(base="sgd", accumulation=kept), 0.1)
    first, second = two_updates(tx)
    assert all(not leaf.any() for leaf in jax.tree.leaves(first))
    mean = jax.tree.map(lambda a, b: -0.1 * (a + b) / 2, gradients(0), gradients(1))
    np.testing.assert_allclose(
        second["wte"]["embedding"], mean["wte"]["embedding"], atol=1e-6
    )
    exact = np.allclose(second["h"]["kernel"], mean["h"]["kernel"], atol=1e-6)
    assert exact == (kept == "full")


def test_adam_has_no_other_momentum():
    with pytest.raises(ValueError, match="no optimizer 'adam' with momentum 'flora'"):
        optimizers.make(recipe(base="adam", momentum="flora"), 0.1)


@pytest.mark.parametrize(
    ("path", "may"),
    [
        ("h/0/attn/c_attn/kernel", True),
        ("wte/embedding", False),
        ("shared/embedding", False),
        ("encoder/relative_attention_bias/embedding", False),
        ("lm_head/kernel", False),
        ("decoder/block/wte_like/kernel", True),
    ],
)
def test_embeddings_are_left_out(path, may):
    assert optimizers.matrices_only(path, (128, 128)) == may
    params = {path: jnp.ones((256, 256))}
    (plan,) = fj.plan_leaves(params, 16, mask=optimizers.matrices_only).values()
    assert (plan.dense_reason is None) == may


SETTING = Setting(rank=16, refresh_every=20, seed=3, b2=0.9)
COMMON = {"rank": 16, "key": 3, "mask": optimizers.matrices_only}
INTERVAL = COMMON | {"refresh_every": 20}
RECIPES = {
    "flora": lambda: fj.flora(1.0, resample_every=20, **COMMON),
    "galore": lambda: fj.galore(1.0, **INTERVAL),
    "fira": lambda: fj.fira(1.0, **INTERVAL),
    "apollo": lambda: fj.apollo(1.0, **INTERVAL),
    "apollo_mini": lambda: fj.apollo_mini(1.0, **INTERVAL | {"rank": 1}),
    "dct_adamw": lambda: fj.dct_adamw(1.0, **COMMON),
    "flora_adamw": lambda: fj.flora_adamw(1.0, **INTERVAL),
}


@pytest.mark.parametrize("name", RECIPES)
def test_members_are_their_recipes(name):
    """Rank, key, projection and interval are in what the state says of itself."""
    state = FAMILY[name].make(1.0, SETTING).init(PARAMS)
    fj.verify_state(RECIPES[name](), state)
    expected = RECIPES[name]().init(PARAMS)
    for ours, theirs in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_all_members_are_tested():
    others = set(FAMILY) - set(RECIPES)
    adamws = {"adamw", "adamw_int8", "adamw_orthogonal"}
    muons = {"muon", "sketched_muon", "flora_muon"}  # In test_family.
    assert others == adamws | muons | {"adafactor", "adafactor_with_momentum"}


@pytest.mark.parametrize("name", ["adamw", "adamw_orthogonal", "apollo_mini"])
def test_decay_and_mask_of_members(name):
    """The embedding is Adam's, without weight decay and with the decay that is set."""
    tx = FAMILY[name].make(1.0, SETTING)
    first, second = (gradients(seed)["wte"]["embedding"] for seed in range(2))
    updates = two_updates(tx)[1]["wte"]["embedding"]
    mu = (0.1 * 0.9 * first + 0.1 * second) / (1 - 0.9**2)
    nu = (0.1 * 0.9 * first**2 + 0.1 * second**2) / (1 - 0.9**2)
    expected = -mu / np.sqrt(nu)
    np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-4)
