"""Plain texts: blocks of whole lines, split by what they are from."""

import pytest

from experiments.data import texts
from experiments.data.registry import DATASETS

DOCUMENTS = [
    "".join(f"{'abc' * 30} {i} of {number}\n" for i in range(20))
    for number in range(200)
]


def test_blocks_of_whole_lines():
    splits = texts.split(DOCUMENTS)
    assert splits == texts.split(DOCUMENTS[::-1])
    assert {name: len(own) > 5 for name, own in splits.items()} == dict.fromkeys(
        ("train", "validation", "test"), True
    )
    sources = {
        name: {pair.target.split()[-1] for pair in own} for name, own in splits.items()
    }
    assert sum(map(len, sources.values())) == len(set.union(*sources.values())) == 200
    for own in splits.values():
        for pair in own:
            assert pair.source == ""
            assert pair.target.endswith("\n")
            assert texts.BLOCK <= len(pair.target) < texts.BLOCK + 120


@pytest.mark.parametrize(
    ("name", "word"), [("prose", "expression"), ("code", "import")]
)
def test_every_machine_has_them(name, word, tmp_path):
    splits = DATASETS[name].load(tmp_path)
    assert len(splits["train"]) > 400
    assert len(splits["validation"]) > 10
    assert any(word in pair.target for pair in splits["train"])
