"""The documentation site: every public name once, and its programs run."""

import inspect
import re
from pathlib import Path

import pytest

import flora_jax as fj

DOCS = Path(fj.__file__).parent / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
PROGRAMS = ("quickstart", "recipes")


def text(page):
    return (DOCS / f"{page}.md").read_text()


def test_every_public_name_stands_once_in_the_api():
    listed = re.findall(r"^\.\. auto\w+:: (\w+)", text("api"), re.M)
    assert sorted(listed) == sorted(fj.__all__)


def test_every_page_is_in_the_contents():
    contents = re.search(r"```\{toctree\}.*?\n\n(.*?)```", text("index"), re.S)[1]
    assert sorted(contents.split()) == sorted(set(PAGES) - {"index"})


@pytest.mark.parametrize("page", PROGRAMS)
def test_programs_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", text(page), re.S | re.M)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), names)  # noqa: S102


def test_programs_are_where_they_are_run():
    for page in set(PAGES) - set(PROGRAMS) - {"index"}:
        assert "```python" not in text(page), page


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    for name in re.findall(r"\bfj\.(\w+)", text(page)):
        assert name in fj.__all__, name


# A column of the tables of arguments, and whose arguments they are.
TABLES = {
    "fj.flora": fj.flora,
    "fj.galore": fj.galore,
    "fj.compressed_accumulation": fj.compressed_accumulation,
}


def test_arguments_of_the_tables_exist():
    """The second column names arguments of the function in its head, and defaults."""
    found = set()
    for table in re.findall(r"(?:^\|.*\n)+", text("migration"), re.M):
        head, _, *rows = (
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in table.splitlines()
        )
        factory = TABLES[head[1].strip("`")]
        found.add(head[1].strip("`"))
        known = inspect.signature(factory).parameters
        for row in rows:
            for name, default in re.findall(r"`([a-z_0-9]+)(?:=([^`]+))?`", row[1]):
                assert name in known, (head[1], name)
                if default and name not in ("state_dtype", "side", "b1"):
                    assert known[name].default == eval(default), name  # noqa: S307
    assert found == set(TABLES)
