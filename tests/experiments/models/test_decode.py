"""Decoding with a cache gives what the model without one gives."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import blocks, build, decode
from experiments.models.config import DecoderConfig
from tests.experiments.models.tiny import CONFIGS, T5, prompts_of, randomized

pytestmark = pytest.mark.full

LENGTH = 6


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """A model that ends some row early, with its end."""
    config = CONFIGS[request.param]
    graphdef, params = build.create(config, 0)
    params = randomized(params, scale=0.5)
    return config, graphdef, params


def logits_at(config, model, batch, tokens, t):
    """Logits after the first t of `tokens` (B, LENGTH), by running everything anew."""
    if not isinstance(config, DecoderConfig):
        start = jnp.zeros((len(tokens), 1), jnp.int32)
        return model(batch["source"], jnp.append(start, tokens, axis=1))[:, t]
    prompt = batch["prompt"]
    mask = jnp.append(batch["prompt_mask"], jnp.ones(tokens.shape, bool), axis=1)
    logits = model(jnp.append(prompt, tokens, axis=1), mask)
    return logits[:, prompt.shape[1] - 1 + t]


def uncached(config, graphdef, params, batch, eos):
    @jax.jit
    def best_at(tokens, t):
        model = nnx.merge(graphdef, params)
        return jnp.argmax(logits_at(config, model, batch, tokens, t), axis=-1)

    rows = len(next(iter(batch.values())))
    tokens = np.zeros((rows, LENGTH), np.int32)
    done = np.zeros(rows, bool)
    for t in range(LENGTH):
        best = np.asarray(best_at(tokens, t))
        tokens[:, t] = np.where(done, 0, best)
        done |= best == eos
    return tokens


@pytest.mark.parametrize("scan", [False, True])
def test_greedy_is_the_uncached_loop(case, scan):
    config, graphdef, params = case
    batch = prompts_of(config)
    free = uncached(config, graphdef, params, batch, eos=-1)
    eos = int(free[0, 2])
    expected = uncached(config, graphdef, params, batch, eos)
    assert (expected[0] == 0).any()
    if scan:
        graphdef = build.create(dataclasses.replace(config, scan=True), 0)[0]
        params = blocks.stack(params)
    for end, tokens in ((-1, free), (eos, expected)):
        found = decode.greedy(graphdef, params, batch, length=LENGTH, eos=end, pad=0)
        np.testing.assert_array_equal(found, tokens)


@pytest.mark.parametrize("penalty", [0.0, 4.0])
def test_beam_with_room_for_everything_finds_the_best(penalty):
    # 5 tokens, 3 steps: 80 beams keep every beginning, so that the best of all texts
    # has to come out, whatever the penalty.
    config = dataclasses.replace(T5, vocab_size=5, layers=1, decoder_layers=1)
    graphdef, params = build.create(config, 0)
    params = randomized(params, seed=3, scale=0.3)
    texts = np.array(list(itertools.product(range(5), repeat=3)))
    shifted = np.pad(texts[:, :-1], ((0, 0), (1, 0)))
    source = np.array([[1, 2, 3, 4]])
    model = nnx.merge(graphdef, params)
    logs = jax.nn.log_softmax(model(np.tile(source, (125, 1)), shifted))
    logs = np.take_along_axis(np.asarray(logs), texts[..., None], axis=2)[..., 0]
    eos = int(texts[np.argmax(logs.sum(axis=1)), 0])  # so that to end at once is good
    before_end = np.cumsum(texts == eos, axis=1) - (texts == eos) == 0
    scores = (logs * before_end).sum(axis=1) / before_end.sum(axis=1) ** penalty
    best = (texts * before_end)[np.argmax(scores)]
    found = decode.beam(
        graphdef,
        params,
        {"source": source},
        length=3,
        eos=eos,
        pad=0,
        beams=80,
        length_penalty=penalty,
    )
    assert before_end[np.argmax(scores)].sum() == (1 if penalty == 0 else 3)
    np.testing.assert_array_equal(found[0], best)


def test_decoding_is_compiled_once(case):
    config = case[0]
    one, other = (build.create(config, seed) for seed in (0, 1))
    for function, options in ((decode.greedy, {}), (decode.beam, {"beams": 2})):
        settings = {"length": 3, "eos": 1, "pad": 0, **options}
        function(*one, prompts_of(config), **settings)
        before = function._cache_size()
        function(*other, prompts_of(config, seed=9), **settings)
        assert function._cache_size() == before


def test_refused_arguments(case):
    config, graphdef, params = case
    batch = prompts_of(config)
    with pytest.raises(ValueError, match="`length` must be at least 1, got 0"):
        decode.greedy(graphdef, params, batch, length=0, eos=1, pad=0)
    with pytest.raises(ValueError, match="`length` must be at least 1, got -1"):
        decode.beam(graphdef, params, batch, length=-1, eos=1, pad=0, beams=2)
    with pytest.raises(ValueError, match="`beams` must be at least 1, got 0"):
        decode.beam(graphdef, params, batch, length=2, eos=1, pad=0, beams=0)
