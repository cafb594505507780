"""IWSLT 2017 in its published format, from files that the test writes."""

import pytest

from experiments.common.errors import ConfigError
from experiments.data import iwslt
from experiments.data.pairs import Pair

TRAIN = {
    "de": "<url>http://a</url>\n<title>Ein Titel</title>\n Hallo, Welt. \n"
    "<translator href='b'>Jemand</translator>\nGut & \u2028 böse &quot;hier&quot;\n\n",
    "en": "<url>http://a</url>\n<title>A title</title>\nHello, world.\n"
    "Good & \u2028 evil &quot;here&quot;\nnothing on the other side\n",
}
XML = """<?xml version="1.0" encoding="UTF-8"?>
<mteval><srcset setid="{name}" srclang="german">
<doc docid="1"><title>no text</title>
<seg id="1"> {name} {language} </seg>
<seg id="2">R & D &amp; &lt;b&gt;
&#39;so&#39;</seg></doc></srcset></mteval>
"""


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "manual" / "iwslt2017" / "de-en"
    folder.mkdir(parents=True)
    for language, text in TRAIN.items():
        file = folder / f"train.tags.de-en.{language}"
        file.write_text(text, encoding="utf-8")
        for name in ("dev2010", "tst2010", "tst2015"):
            text = XML.format(name=name, language=language)
            file = folder / f"IWSLT17.TED.{name}.de-en.{language}.xml"
            file.write_text(text, encoding="utf-8")
    return tmp_path


def test_published_format(data_dir):
    second = "R & D & <b>\n'so'"
    assert iwslt.load(data_dir) == {
        "train": [
            Pair("Hallo, Welt.", "Hello, world."),
            Pair('Gut & \u2028 böse "hier"', 'Good & \u2028 evil "here"'),
        ],
        "validation": [Pair("dev2010 de", "dev2010 en"), Pair(second, second)],
        "test": [
            Pair("tst2010 de", "tst2010 en"),
            Pair(second, second),
            Pair("tst2015 de", "tst2015 en"),
            Pair(second, second),
        ],
    }


def test_missing_files_are_named(data_dir):
    folder = data_dir / "manual" / "iwslt2017" / "de-en"
    (folder / "train.tags.de-en.en").unlink()
    (folder / "IWSLT17.TED.tst2015.de-en.en.xml").unlink()
    message = (
        r"lacks train\.tags\.de-en\.en, IWSLT17\.TED\.tst2015\.de-en\.en\.xml of "
        r".*fetch de-en\.tgz .* into .*manual.iwslt2017.de-en$"
    )
    with pytest.raises(ConfigError, match=message):
        iwslt.load(data_dir)


def test_nothing_was_fetched(tmp_path):
    with pytest.raises(ConfigError, match=r"lacks train.*dev2010.*tst20\*.*fetch"):
        iwslt.load(tmp_path)


def test_languages_do_not_go_together(data_dir):
    folder = data_dir / "manual" / "iwslt2017" / "de-en"
    file = folder / "IWSLT17.TED.dev2010.de-en.en.xml"
    file.write_text("<seg id='1'>one</seg>")
    with pytest.raises(ConfigError, match=r"has 2 lines of text and .* has 1; both"):
        iwslt.load(data_dir)
