"""Arrays of examples against rows written out by hand, and the order of batches."""

import numpy as np
import pytest

from experiments.common.errors import ConfigError
from experiments.data import batches, vocabulary
from experiments.data.pairs import Pair


class Letters(vocabulary.Vocabulary):
    """One token a letter: pad 0, eos 1, then "a" is 2. Other characters are dropped."""

    size, pad, eos, fingerprint = 28, 0, 1, "letters"

    def __init__(self):
        """There is nothing to take over."""

    def encode(self, texts):
        return [[ord(c) - 95 for c in text if c.isalpha()] for text in texts]


class Spaced(Letters):
    """Also " " is 30, "=" is 31 and ">" is 32; padding is the end, as in GPT-2."""

    size, pad, eos = 33, 1, 1

    def encode(self, texts):
        others = {" ": 30, "=": 31, ">": 32}
        return [[others.get(c, ord(c) - 95) for c in text] for text in texts]


PAIRS = [Pair("ab", "c"), Pair("abcdefgh", "ghijkl"), Pair("", "")]
_, SPACE, EQUALS, GREATER = 1, 30, 31, 32
ARROW = [SPACE, EQUALS, GREATER]


def test_encoder_decoder():
    layout = batches.Layout(Letters(), "z: ", source_length=6, target_length=4)
    first, long, empty = layout.encoder_decoder(PAIRS)
    np.testing.assert_array_equal(first["source"], [27, 2, 3, 1, 0, 0])
    np.testing.assert_array_equal(first["target"], [4, 1, 0, 0])
    np.testing.assert_array_equal(long["source"], [27, 2, 3, 4, 5, 1])
    np.testing.assert_array_equal(long["target"], [8, 9, 10, 1])
    np.testing.assert_array_equal(empty["source"], [27, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(empty["target"], [1, 0, 0, 0])
    assert first["source"].dtype == first["target"].dtype == np.int32


def test_decoder_only():
    layout = batches.Layout(Spaced(), "z", source_length=7, target_length=4)
    first, long, empty = layout.decoder_only(PAIRS)
    row = [27, 2, 3, *ARROW, SPACE, 4, 1, 1, 1, 1]  # z ab =>  c, end, padding
    np.testing.assert_array_equal(first["tokens"], row)
    np.testing.assert_array_equal(first["weights"], [1, 1, 1, 0])
    row = [27, 2, 3, 4, *ARROW, SPACE, 8, 9, 1, 1]  # both are cut, the arrow is not
    np.testing.assert_array_equal(long["tokens"], row)
    np.testing.assert_array_equal(long["weights"], [1] * 4)
    row = [27, *ARROW, SPACE, 1, 1, 1, 1, 1, 1, 1]
    np.testing.assert_array_equal(empty["tokens"], row)
    np.testing.assert_array_equal(empty["weights"], [1, 1, 0, 0])
    assert [each["first"] for each in (first, long, empty)] == [5, 6, 3]
    assert first["tokens"].dtype == first["first"].dtype == np.int32
    assert first["weights"].dtype == np.float32


def test_plain_texts():
    layout = batches.Layout(Spaced(), None, source_length=3, target_length=2)
    short, long = layout.decoder_only([Pair("", "abc"), Pair("", "abcdefgh")])
    np.testing.assert_array_equal(short["tokens"], [2, 3, 4, 1, 1, 1])
    np.testing.assert_array_equal(short["weights"], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(long["tokens"], [2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(long["weights"], [1] * 5)


def test_prompts_are_left_padded():
    layout = batches.Layout(Spaced(), "z", source_length=7, target_length=4)
    first, long, empty = layout.prompts(PAIRS)
    np.testing.assert_array_equal(first["prompt"], [1, 27, 2, 3, *ARROW])
    np.testing.assert_array_equal(first["prompt_mask"], [False] + [True] * 6)
    np.testing.assert_array_equal(long["prompt"], [27, 2, 3, 4, *ARROW])
    np.testing.assert_array_equal(long["prompt_mask"], [True] * 7)
    np.testing.assert_array_equal(empty["prompt"], [1, 1, 1, 27, *ARROW])
    np.testing.assert_array_equal(empty["prompt_mask"], [False] * 3 + [True] * 4)
    assert first["prompt"].dtype == np.int32
    assert first["prompt_mask"].dtype == bool


def test_a_prompt_is_what_stood_before_the_target():
    pairs = [Pair("Der Hund bellt" * n, "The dog barks") for n in range(1, 5)]
    vocab = vocabulary.byte_pair([text for pair in pairs for text in pair], 280)
    layout = batches.Layout(vocab, "translate: ", source_length=20, target_length=16)
    rows = layout.decoder_only(pairs)
    for row, start in zip(rows, layout.prompts(pairs), strict=True):
        prompt = start["prompt"][start["prompt_mask"]]
        np.testing.assert_array_equal(row["tokens"][: len(prompt)], prompt)
        assert row["first"] == len(prompt) - 1
        labels = row["tokens"][len(prompt) :][: int(row["weights"].sum())]
        assert vocab.decode([labels]) == [" The dog barks"]


def test_asked_in_a_format_of_its_own():
    class Asked(Spaced):
        def frame(self):
            return vocabulary.Frame([9, 9], [8], "x")

    layout = batches.Layout(Asked(), "z", source_length=7, target_length=4)
    row, long, _ = layout.decoder_only(PAIRS)
    np.testing.assert_array_equal(row["tokens"], [9, 9, 27, 2, 3, 8, 25, 4, 1, 1, 1, 1])
    assert row["first"] == 5
    np.testing.assert_array_equal(row["weights"], [1, 1, 1, 0])
    np.testing.assert_array_equal(long["tokens"][:7], [9, 9, 27, 2, 3, 4, 8])
    start = layout.prompts(PAIRS)[0]
    np.testing.assert_array_equal(
        start["prompt"][start["prompt_mask"]], row["tokens"][:6]
    )


def test_sources_are_too_short():
    layout = batches.Layout(Spaced(), "", source_length=3, target_length=2)
    message = r"`--source-length` must be at least 4 \(what"
    for function in (layout.prompts, layout.decoder_only):
        with pytest.raises(ConfigError, match=message):
            function(PAIRS)


@pytest.fixture(scope="module")
def examples():
    return [{"x": np.array([i, -i], np.int32)} for i in range(10)]


def test_batches_are_a_function_of_seed_and_number(examples):
    first, again = (batches.batched(examples, 4, seed=1) for _ in range(2))
    assert first[0]["x"].shape == (4, 2)
    assert first[0]["x"].dtype == np.int32
    np.testing.assert_array_equal(first[7]["x"], again[7]["x"])
    other = batches.batched(examples, 4, seed=2)
    assert any(not np.array_equal(first[i]["x"], other[i]["x"]) for i in range(3))


def test_an_epoch_shows_every_example_once(examples):
    order = batches.batched(examples, 4, seed=0)
    seen = np.concatenate([order[i]["x"][:, 0] for i in range(10)])  # 4 epochs
    epochs = seen.reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_in_order_fills_up_the_last_batch(examples):
    made = batches.in_order(examples, 4)
    assert [real for _, real in made] == [4, 4, 2]
    rows = [batch["x"][:, 0].tolist() for batch, _ in made]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert [real for _, real in batches.in_order(examples, 5)] == [5, 5]


def test_nothing_to_make_batches_of():
    with pytest.raises(ConfigError, match="there is no example to make batches of; "):
        batches.batched([], 2, seed=0)
    with pytest.raises(ConfigError, match="there is no example to make batches of; "):
        batches.in_order([], 2)
