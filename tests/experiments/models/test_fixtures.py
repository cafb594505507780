"""The models give the numbers that PyTorch gave, which lie beside."""

import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.models import build, decode
from experiments.models.config import DecoderConfig
from tests.experiments.models import tiny

LENGTH, BEAMS = 9, 3  # with which the fixtures were made


@pytest.fixture(scope="module", params=tiny.CONFIGS)
def case(request):
    """Settings, model, parameters and the numbers of one fixture."""
    hugging_face = pytest.importorskip("experiments.models.hugging_face")
    config = tiny.CONFIGS[request.param]
    file = pathlib.Path(__file__).parent / "fixtures" / f"{request.param}.npz"
    numbers = dict(np.load(file))
    tensors = {
        name.removeprefix("tensor/"): tensor
        for name, tensor in numbers.items()
        if name.startswith("tensor/")
    }
    params = hugging_face.from_tensors(tensors, config)
    return config, build.create(config, 0)[0], params, numbers


@pytest.mark.sample(1)
def test_logits(case):
    config, graphdef, params, numbers = case
    model = nnx.merge(graphdef, params)
    if isinstance(config, DecoderConfig):
        batch = tiny.prompts_of(config, seed=3)
        logits = jax.jit(lambda *args: model(*args))(*batch.values())
    else:
        batch = tiny.batch_of(config, seed=3)
        logits = jax.jit(lambda batch: model.logits(model.training(batch)[0]))(batch)
    mask = numbers["mask"]
    assert np.abs(numbers["logits"]).max() > 1
    np.testing.assert_allclose(
        np.asarray(logits)[mask], numbers["logits"][mask], rtol=0, atol=1e-4
    )


@pytest.mark.sample(1)
def test_greedy_decoding(case):
    config, graphdef, params, numbers = case
    tokens = decode.greedy(
        graphdef,
        params,
        tiny.prompts_of(config),
        length=LENGTH,
        eos=int(numbers["eos"]),
        pad=0,
    )
    assert (numbers["greedy"] == 0).any()  # some row ends early
    np.testing.assert_array_equal(tokens, numbers["greedy"])


@pytest.mark.full
def test_beam_decoding(case):
    config, graphdef, params, numbers = case
    tokens = decode.beam(
        graphdef,
        params,
        tiny.prompts_of(config),
        length=LENGTH,
        eos=int(numbers["eos"]),
        pad=0,
        beams=BEAMS,
    )
    assert (numbers["beam"] != numbers["greedy"]).any()
    np.testing.assert_array_equal(tokens, numbers["beam"])
