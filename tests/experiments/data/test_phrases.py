"""CLDR phrases: right, unambiguous, and held out by whole combinations."""

import collections
import random
import re

import pytest

from experiments.data import phrases
from experiments.data.pairs import Pair


@pytest.fixture(scope="module")
def splits():
    return phrases.split(phrases.phrases(6000, seed=1))


@pytest.fixture(scope="module")
def everything(splits):
    return sum(splits.values(), [])


def test_names_are_translated(everything):
    pairs = {phrase.pair for phrase in everything}
    assert Pair("Deutschland", "Germany") in pairs
    assert Pair("Schweizer Franken", "Swiss Franc") in pairs
    assert Pair("Niederländisch", "Dutch") in pairs


@pytest.mark.parametrize(
    ("template", "options", "pair"),
    [
        ("_measure", {"randint": 1234}, ("1.234 Tage", "1,234 days")),
        ("_measure", {"random": 0.1}, ("1,5 Tage", "1.5 days")),
        ("_amount", {"randint": 1234}, ("1.234,00 Euro", "1,234.00 euros")),
        ("_entry", {"randint": 2}, ("Euro: 2 Tage", "Euro: 2 days")),
        ("_date", {"randint": 2021}, ("31. März 2021", "March 31, 2021")),
        ("_duration", {"randint": 14}, ("in 14 Tagen", "in 14 days")),
        ("_list", {}, ("Euro und US-Dollar", "Euro and US Dollar")),
    ],
)
def test_templates_write_what_cldr_says(template, options, pair):
    class Fixed:
        """Chooses what the test says."""

        def choice(self, options):
            for wanted in ("long", "day", "duration-day", 2, "standard", 1):
                if wanted in options:
                    return wanted
            return options[0]

        def sample(self, population, count):
            return population[:count]

        def randint(self, low, high):
            return options.get("randint", 1)

        def random(self):
            return options.get("random", 0.5)

        def randrange(self, stop):
            return 89  # days after January 1st

    names = [
        phrases.Phrase(("currencies", "currencies EUR"), Pair("Euro", "Euro")),
        phrases.Phrase(
            ("currencies", "currencies USD"), Pair("US-Dollar", "US Dollar")
        ),
    ]
    assert getattr(phrases, template)(Fixed(), names).pair == pair


def test_a_source_has_one_target(everything):
    sources = collections.Counter(phrase.pair.source for phrase in everything)
    assert set(sources.values()) == {1}
    names = collections.defaultdict(set)
    for phrase in phrases._names():
        names[phrase.pair.source].add(phrase.pair.target)
    ambiguous = {source for source, targets in names.items() if len(targets) > 1}
    assert ambiguous  # or the next lines say nothing
    assert not ambiguous & set(sources)
    # Nor do they occur within other phrases, which would have several targets too.
    lists = [p.pair for p in everything if p.combination[0].startswith("list")]
    parts = {part for pair in lists for part in re.split(", | und | oder ", pair[0])}
    assert len(parts) > 500
    assert not ambiguous & parts
    assert not any("\xa0" in text for phrase in everything for text in phrase.pair)


def test_whole_combinations_are_held_out(splits):
    train = {phrase.combination for phrase in splits["train"]}
    items = {item for combination in train for item in combination}
    held_out = splits["validation"] + splits["test"]
    assert len({phrase.combination[0] for phrase in held_out}) > 8  # most templates
    for phrase in held_out:
        assert phrase.combination not in train
        assert items.issuperset(phrase.combination)
    validation, test = (
        {phrase.combination for phrase in splits[name]}
        for name in ("validation", "test")
    )
    assert not validation & test


def test_an_item_that_training_lacks_moves_there():
    def phrase(number):
        combination = ("measure", "length-meter", f"number {number}")
        return phrases.Phrase(combination, Pair(f"{number} Meter", f"{number} meters"))

    members = [phrase(number) for number in range(400)]
    splits = phrases.split(members)  # every number occurs once
    assert sorted(splits["train"]) == sorted(members)
    assert not splits["validation"]
    assert not splits["test"]


def test_numbers_vary_within_a_combination(everything):
    counts = collections.Counter(phrase.combination for phrase in everything)
    assert counts.most_common(1)[0][1] > 1


def test_phrases_are_deterministic():
    state = random.getstate()
    first, second = (phrases.phrases(300, seed=2) for _ in range(2))
    assert first == second
    assert phrases.phrases(300, seed=3) != first
    assert random.getstate() == state


def test_size_of_the_default(monkeypatch, tmp_path):
    monkeypatch.setattr(phrases, "SAMPLES", phrases.SAMPLES // 10)
    splits = phrases.load(tmp_path)
    total = sum(map(len, splits.values()))
    assert 4_000 < total < phrases.SAMPLES + 2_000
    for name in ("validation", "test"):
        assert 0.02 < len(splits[name]) / total < 0.06
