"""Scores against values computed by hand from the definitions."""

import collections
import math

import pytest

from experiments.data import metrics


def test_rouge_by_hand():
    # Stemming makes "cats" and "cat" one word, but no two words of "sat" and "sits".
    scores = metrics.score(
        metrics.ROUGE, ["the cats sat on mats"], ["A cat sits on the mat."]
    )
    # Shared unigrams: the, cat, on, mat; of 5 and 6. Bigrams: none.
    assert scores["rouge1"] == pytest.approx(100 * 2 * 4 / 11)
    assert scores["rouge2"] == pytest.approx(0)
    # Longest common subsequence: cat on mat.
    assert scores["rougeL"] == pytest.approx(100 * 2 * 3 / 11)


def test_rouge_is_a_mean_over_examples():
    scores = metrics.score(["rouge2"], ["a b c", "x"], ["a b d", "y"])
    assert scores == {"rouge2": pytest.approx(100 * (2 * 1 / 4 + 0) / 2)}


def bleu(prediction, reference):
    """Papineni et al. (2002) for one pair of tokenized texts without zero counts."""
    logarithms = []
    for n in range(1, 5):
        ngrams = [
            collections.Counter(zip(*(words[i:] for i in range(n)), strict=False))
            for words in (prediction, reference)
        ]
        shared = (ngrams[0] & ngrams[1]).total()
        logarithms.append(math.log(shared / ngrams[0].total()))
    brevity = min(0.0, 1 - len(reference) / len(prediction))
    return 100 * math.exp(brevity + sum(logarithms) / 4)


def test_bleu_by_its_definition():
    prediction = "the quick brown fox jumps over a dog"
    reference = "the quick brown fox jumped over a lazy dog"
    scores = metrics.score(["bleu"], [prediction], [reference])
    expected = bleu(prediction.split(), reference.split())
    assert 10 < expected < 90
    assert scores["bleu"] == pytest.approx(expected)


def test_chrf_by_its_definition():
    prediction, reference = "abcdefgx", "abcdefgh"
    # Of 8, 7, ..., 3 n-grams of 1 to 6 letters all but one, the last, are shared;
    # precision and recall are the same, and so is their F-score.
    expected = 100 * sum((9 - n - 1) / (9 - n) for n in range(1, 7)) / 6
    scores = metrics.score(["chrf"], [prediction], [reference])
    assert scores["chrf"] == pytest.approx(expected)


def test_exact_match_ignores_outer_space_alone():
    predictions = [" one two", "One two", "one  two", "3"]
    references = ["one two", "one two", "one two", "3\n"]
    scores = metrics.score(["exact_match"], predictions, references)
    assert scores == {"exact_match": 50.0}


def test_perfect_and_empty_predictions():
    texts = ["the quick brown fox jumps over it", "a lazy dog sleeps here today"]
    for value in metrics.score(metrics.METRICS, texts, texts).values():
        assert value == pytest.approx(100)
    scores = metrics.score(metrics.METRICS, ["", ""], texts)
    assert list(scores) == list(metrics.METRICS)
    assert all(value == 0 for value in scores.values())


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="`predictions` must be .* got 1 and 2$"):
        metrics.score(["bleu"], ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        metrics.score(["bleu"], [], [])
    with pytest.raises(ValueError, match="`names` has meteor, which is no metric here"):
        metrics.score(["bleu", "meteor"], ["a"], ["a"])
