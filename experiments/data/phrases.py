"""German phrases and their English counterparts, from Unicode's CLDR by way of Babel.

Names of territories, languages and currencies, and what the formatters make of them
and of numbers and dates: amounts, durations, measures, dates, lists, entries. This is
a smoke-scale task with a vocabulary and a grammar of its own, and no substitute for
IWSLT. Since it is compositional, exact match means something: whole combinations of
items are held out, and to translate them is to have understood the parts.
"""

import datetime
import pathlib
import random
from collections.abc import Callable, Iterable
from typing import NamedTuple

from babel import Locale, dates, lists, numbers, units

from experiments.data.pairs import Pair, Splits, split_of

SAMPLES = 60_000
"""Phrases that are sampled; repetitions leave fewer."""

LOCALES = (Locale("de"), Locale("en"))
"""Of the sources and of the targets."""

_UNITS = {
    "angle": "degree",
    "area": "hectare square-kilometer square-meter square-mile",
    "digital": "gigabyte kilobyte megabit",
    "duration": "day decade hour minute month second week year",
    "electric": "ampere volt",
    "energy": "joule kilocalorie kilowatt-hour",
    "force": "newton",
    "frequency": "megahertz",
    "graphics": "pixel",
    "length": "centimeter foot inch kilometer light-year meter mile millimeter",
    "pressure": "hectopascal millibar",
    "mass": "gram kilogram milligram ounce pound tonne",
    "power": "horsepower kilowatt watt",
    "speed": "kilometer-per-hour knot meter-per-second",
    "temperature": "celsius fahrenheit",
    "volume": "barrel cubic-meter liter milliliter tablespoon teaspoon",
}
UNITS = tuple(f"{kind}-{unit}" for kind in _UNITS for unit in _UNITS[kind].split())
"""The units of measures, by their names in CLDR."""

_DAYS = {"day": 1, "week": 7, "month": 30, "year": 365}
_SCALES = (1, 10, 1000, 100_000)


class Phrase(NamedTuple):
    """A pair and what it was composed of.

    Attributes:
        combination: the template and the items; a name alone has one item. Numbers and
            years that vary within a combination are left out.
        pair: the texts.
    """

    combination: tuple[str, ...]
    pair: Pair


def load(data_dir: pathlib.Path, download: bool = False) -> Splits:
    """Returns the phrases of seed 0, the same for one version of Babel."""
    del data_dir, download  # made from what is installed
    return {
        split: [phrase.pair for phrase in members]
        for split, members in split(phrases(SAMPLES, seed=0)).items()
    }


def phrases(samples: int, seed: int) -> list[Phrase]:
    """Returns all names and `samples` composed phrases.

    A source has one target, and occurs once.
    """
    random_ = random.Random(seed)
    names = _unambiguous(_names())
    composed = (random_.choice(_TEMPLATES)(random_, names) for _ in range(samples))
    return _unambiguous([*names, *composed])


def split(members: Iterable[Phrase]) -> dict[str, list[Phrase]]:
    """Splits phrases by the hash of their combination.

    Names alone are for training, and so is every combination of which an item occurs
    nowhere else there: what is held out is never a word, only how words combine.
    """
    splits: dict[str, list[Phrase]] = {"train": [], "validation": [], "test": []}
    for phrase in members:
        alone = len(phrase.combination) == 2
        key = "\0".join(phrase.combination)
        splits["train" if alone else split_of(key)].append(phrase)
    known = {item for phrase in splits["train"] for item in phrase.combination}
    for name in ("validation", "test"):
        fit = [p for p in splits[name] if known.issuperset(p.combination)]
        splits["train"] += [p for p in splits[name] if not known.issuperset(p[0])]
        splits[name] = fit
    return splits


def _unambiguous(members: list[Phrase]) -> list[Phrase]:
    """Leaves out repetitions, and the sources that have several targets."""
    targets: dict[str, set[str]] = {}
    for phrase in members:
        targets.setdefault(phrase.pair.source, set()).add(phrase.pair.target)
    first = {phrase.pair.source: phrase for phrase in reversed(members)}
    return [p for p in first.values() if len(targets[p.pair.source]) == 1]


def _names() -> list[Phrase]:
    """Returns the names that both languages have."""
    german, english = LOCALES
    return [
        Phrase((kind, f"{kind} {code}"), Pair(name, getattr(english, kind)[code]))
        for kind in ("territories", "languages", "currencies")
        for code, name in sorted(getattr(german, kind).items())
        if code in getattr(english, kind)
    ]


def _phrase(
    combination: tuple[str, ...], write: Callable[[int, Locale], str]
) -> Phrase:
    """Has a phrase written in both languages; `write` gets the number of the side."""
    texts = (write(i, at) for i, at in enumerate(LOCALES))
    # CLDR's spaces of many widths become one kind: tokenizers do not keep them apart.
    return Phrase(combination, Pair(*(" ".join(text.split()) for text in texts)))


def _number(random_: random.Random) -> float:
    number = random_.randint(1, random_.choice(_SCALES))
    return number + 0.5 if random_.random() < 0.2 else number


def _list(random_: random.Random, names: list[Phrase]) -> Phrase:
    style = random_.choice(("standard", "or"))
    members = random_.sample(names, random_.choice((2, 3)))
    return _phrase(
        (f"list {style}", *(member.combination[1] for member in members)),
        lambda i, at: lists.format_list([m.pair[i] for m in members], style, at),
    )


def _entry(random_: random.Random, names: list[Phrase]) -> Phrase:
    name = random_.choice(names)
    unit, number = random_.choice(UNITS), _number(random_)
    return _phrase(
        ("entry", name.combination[1], unit),
        lambda i, at: f"{name.pair[i]}: {units.format_unit(number, unit, locale=at)}",
    )


def _measure(random_: random.Random, names: list[Phrase]) -> Phrase:
    del names
    unit, number = random_.choice(UNITS), _number(random_)
    return _phrase(
        ("measure", unit, f"number {int(number)}"),
        lambda i, at: units.format_unit(number, unit, locale=at),
    )


def _amount(random_: random.Random, names: list[Phrase]) -> Phrase:
    name = random_.choice([n for n in names if n.combination[0] == "currencies"])
    code, number = name.combination[1].split()[1], _number(random_)
    return _phrase(
        ("amount", name.combination[1], f"number {int(number)}"),
        lambda i, at: numbers.format_currency(
            number, code, locale=at, format_type="name"
        ),
    )


def _date(random_: random.Random, names: list[Phrase]) -> Phrase:
    del names
    style = random_.choice(("full", "long", "short"))
    day = datetime.date(random_.randint(1900, 2099), 1, 1)
    day += datetime.timedelta(days=random_.randrange(365))
    return _phrase(
        (f"date {style}", f"month {day.month}", f"day {day.day}"),
        lambda i, at: dates.format_date(day, style, at),
    )


def _duration(random_: random.Random, names: list[Phrase]) -> Phrase:
    del names
    unit, count = random_.choice(list(_DAYS)), random_.randint(1, 60)
    directed, sign = random_.random() < 0.7, random_.choice((-1, 1))
    delta = datetime.timedelta(days=sign * count * _DAYS[unit])
    kind = f"duration {sign}" if directed else "duration"
    # The threshold keeps 14 days from becoming 2 weeks.
    options = {"granularity": unit, "threshold": 1e9, "add_direction": directed}
    return _phrase(
        (kind, unit, f"number {count}"),
        lambda i, at: dates.format_timedelta(delta, locale=at, **options),
    )


_TEMPLATES = (_list, _list, _entry, _entry, _measure, _amount, _date, _duration)
