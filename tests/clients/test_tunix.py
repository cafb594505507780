"""google-tunix's PeftTrainer, full fine-tuning and LoRA, on one and eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.sft import peft_trainer, utils

import flora_jax as fj
from tests.clients.common import (
    MOMENTS,
    RATE,
    SKETCH,
    TRANSFORMATIONS,
    bits,
    kernel_bytes,
    width_bytes,
)

STEPS = 4
CONFIG = {
    "num_layers": 1,
    "vocab_size": 256,
    "embed_dim": 256,
    "hidden_dim": 512,
    "num_heads": 4,
    "head_dim": 64,
    "num_kv_heads": 2,
    "rope_theta": 10_000,
    "norm_eps": 1e-6,
}
every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


def mesh(devices, tensor=1):
    shape = (devices // tensor, tensor)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(
        shape, ("fsdp", "tp"), axis_types=kinds, devices=jax.devices()[:devices]
    )


def model_on(where, dtype=jnp.float32):
    """A small Qwen3 whose weights are sharded as its configuration says."""
    config = qwen3.ModelConfig(**CONFIG, param_dtype=dtype)
    with where:
        model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
        state = nnx.state(model)
        sharded = jax.device_put(state, nnx.get_named_sharding(state, where))
        nnx.update(model, sharded)
    return model


def batches(count):
    """One batch again and again: its loss falls from the first update on."""
    for _ in range(count):
        tokens = np.random.default_rng(0).integers(0, 256, (8, 16), dtype=np.int32)
        yield peft_trainer.TrainingInput(
            input_tokens=tokens, input_mask=np.ones_like(tokens)
        )


def model_input(batch):
    mask = batch.input_mask.astype(bool)
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


class Losses(peft_trainer.hooks.TrainingHooks):
    """Records the loss of each step."""

    def __init__(self):
        self.values = []

    def on_train_step_end(self, trainer, step, loss):
        self.values.append(float(loss))

    def _nothing(self, *args):
        pass

    on_train_start = on_train_end = on_train_step_start = _nothing
    on_eval_step_start = on_eval_step_end = _nothing


def train(tx, where, steps=STEPS, folder=None, model=None, **settings):
    """Trains; returns the trainer and the losses."""
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=100,
        max_steps=steps,
        checkpoint_root_directory=folder and str(folder),
        **settings,
    )
    with where:
        trainer = peft_trainer.PeftTrainer(model or model_on(where), tx, config)
        trainer.with_gen_model_input_fn(model_input)
        losses = Losses()
        trainer.with_training_hooks(losses)
        trainer.train(batches(settings.get("gradient_accumulation_steps", 1) * STEPS))
    return trainer, losses.values


def trained(trainer):
    return nnx.state(trainer.model), nnx.state(trainer.optimizer)


@every_transformation
def test_eight_devices_train_as_one_does(name):
    make = TRANSFORMATIONS[name]
    _, one = train(make(SKETCH), mesh(1))
    trainer, eight = train(make(SKETCH), mesh(8))
    assert len(one) == STEPS
    assert one[-1] < one[0]
    np.testing.assert_allclose(eight, one, rtol=1e-4)
    # The trainer writes P("fsdp", "tp", None), the compiler P("fsdp", "tp"): any
    # optimizer's second step compiles again, AdamW's too.
    assert programs(trainer) <= adamw_programs()


def programs(trainer):
    return trainer._jitted_train_step_fn.func.jitted_fn._cache_size()


@functools.cache
def adamw_programs():
    return programs(train(TRANSFORMATIONS["adamw"](SKETCH), mesh(8))[0])


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", MOMENTS)
def test_a_device_holds_its_share(name, tensor):
    where = mesh(8, tensor)
    trainer, _ = train(TRANSFORMATIONS[name](SKETCH), where, steps=2)
    params = nnx.state(trainer.model, nnx.Param)
    state = trainer.optimizer.opt_state
    kernels, bases = kernel_bytes(state, params, SKETCH)
    print(f"{name}, {tensor}-way tensor parallel: {kernels} and {bases} bytes")
    assert kernels <= 1.15 * width_bytes(params, SKETCH, MOMENTS[name])
    assert bases <= 1.15 * width_bytes(params, SKETCH, 1)


@every_transformation
def test_a_resumed_run_equals_the_unbroken_one(name, tmp_path):
    make, where = TRANSFORMATIONS[name], mesh(8)
    whole, losses = train(make(SKETCH), where, folder=tmp_path / "whole")
    train(make(SKETCH), where, steps=2, folder=tmp_path / "broken")
    resumed, rest = train(make(SKETCH), where, folder=tmp_path / "broken")
    assert resumed.train_steps == STEPS
    assert rest == losses[2:]
    assert bits(trained(resumed)) == bits(trained(whole))


def test_our_accumulation_in_place_of_theirs():
    inner = fj.flora_adamw(RATE, SKETCH)
    tx = fj.compressed_accumulation(optax.sgd(RATE), 2, SKETCH)
    theirs, _ = train(inner, mesh(8), gradient_accumulation_steps=2)
    ours, losses = train(tx, mesh(8))
    assert all(np.isfinite(losses))
    params = nnx.state(ours.model, nnx.Param)
    full, _ = kernel_bytes(theirs.optimizer.opt_state, params, SKETCH)
    sketched, _ = kernel_bytes(ours.optimizer.opt_state, params, SKETCH)
    assert sketched <= 1.15 * width_bytes(params, SKETCH, 1) < full


@every_transformation
def test_bfloat16_parameters(name):
    where = mesh(8)
    model = model_on(where, jnp.bfloat16)
    trainer, losses = train(TRANSFORMATIONS[name](SKETCH), where, model=model)
    assert all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    params = nnx.state(trainer.model, nnx.Param)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@every_transformation
def test_lora_left_on(name):
    """Matrices of LoRA are below 128 wide: they stay dense, and train."""
    where = mesh(8)
    provider = qwix.LoraProvider(module_path=".*q_proj|.*gate_proj", rank=8, alpha=16)
    base = model_on(where)
    with where:
        model = qwix.apply_lora_to_model(base, provider, **base.get_model_input())
        state = nnx.state(model)
        nnx.update(model, jax.device_put(state, nnx.get_named_sharding(state, where)))
    before = bits(nnx.state(model, nnx.filterlib.Not(nnx.LoRAParam)))
    tx = TRANSFORMATIONS[name](SKETCH)
    if name == "adamw":
        trainer, losses = train(tx, where, model=model)
    else:
        with pytest.warns(UserWarning, match="sketches only 0 of"):
            trainer, losses = train(tx, where, model=model)
    assert all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    assert bits(nnx.state(trainer.model, nnx.filterlib.Not(nnx.LoRAParam))) == before
