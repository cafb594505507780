"""What a training refuses, without training."""

import types

import jax.numpy as jnp
import optax
import pytest

import flora_jax as fj
from experiments.common.checkpoints import State
from experiments.common.config import Run
from experiments.common.errors import ConfigError, NonFiniteLossError
from experiments.common.loop import Training
from experiments.main_job.config import Config


def test_a_checkpoint_of_another_optimizer():
    params = {"kernel": jnp.ones((128, 256))}
    saved, tx = (
        fj.compressed_accumulation(optax.sgd(0.1), 2, fj.Sketch(16, projection=x))
        for x in (fj.CountSketch(), fj.Rademacher())
    )
    state = State(params, saved.init(params))
    kept = types.SimpleNamespace(folder="runs/a", restore=lambda state: (3, state))
    training = types.SimpleNamespace(_kept=kept, state=state)
    message = (
        r"runs/a holds a checkpoint of another optimizer: .*Rademacher\(.*\) in tx"
    )
    with pytest.raises(ConfigError, match=message):
        Training._restore(training, tx)


@pytest.mark.parametrize(
    ("method", "flag"),
    [("full_momentum", "--learning-rate"), ("lora_momentum", "--lora-learning-rate")],
)
def test_a_loss_that_is_not_finite(method, flag):
    training = types.SimpleNamespace(run=Run(Config(), method, None))
    row = {"update": 3, "learning_rate": 0.1}
    message = f"the loss is nan at update 3, learning rate 0.1; lower `{flag}`"
    with pytest.raises(NonFiniteLossError, match=message):
        Training._check_finite(training, row, float("nan"))
